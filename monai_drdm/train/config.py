"""The settings of a training run: one frozen record, from defaults, a YAML or JSON file, and ``key=value``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from monai_drdm.networks import recresacnet, velocity_unet
from monai_drdm.train.process import Appearance, Pose

_KINDS = {"velocity_unet": velocity_unet.WORKING_SIZE, "recresacnet": recresacnet.WORKING_SIZE}
_LEARNING_RATE = {"velocity_unet": 2e-3, "recresacnet": 1e-4}
_SMALLEST = 17


def _setting(
    default: Any, text: str, *, low: float = -math.inf, high: float = math.inf, choices: tuple[Any, ...] = ()
) -> Any:
    """A field with a line of help and what its numbers may be."""
    return field(default=default, metadata={"help": text, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Raises:
        TypeError: an entry of a wrong type.
        ValueError: an entry out of its range, or entries that do not fit each other.
    """

    data: str = _setting("synthetic", "folder of scans, MONAI datalist, or 'synthetic' for random anatomy")
    section: str = _setting("training", "section of the datalist")
    synthetic_share: float = _setting(
        0.0, "share of random anatomy in every batch of real scans, in whole images", low=0, high=1
    )
    spatial_dims: int = _setting(2, "2 or 3", choices=(2, 3))
    slice_axis: int | None = _setting(
        None, "axis across which volumes are sliced for 2D; none: all three", low=0, high=2
    )
    mix_dimensions: bool = _setting(False, "take 2D images and slices of volumes together")
    image_channel: int | None = _setting(None, "channel of images that have several", low=0)
    network: str = _setting(
        "", "velocity_unet, or recresacnet as published; empty: that of init, or velocity_unet", choices=("", *_KINDS)
    )
    channels: tuple[int, ...] = _setting(
        (16, 32, 48, 64), "features on each grid, of a new velocity_unet", low=2, high=512
    )
    working_size: int = _setting(
        0,
        "voxels along the longest side, odd for velocity_unet; 0: that of init, or the network's own",
        low=0,
        high=1025,
    )
    batch_size: int = _setting(16, "images in a batch, on each process", low=1, high=4096)
    epoch_length: int = _setting(200, "steps between validations and checkpoints", low=1)
    max_epochs: int = _setting(1000, "epochs at most", low=1)
    max_minutes: float = _setting(math.inf, "minutes at most, after which the run ends as if done", low=0)
    patience: int = _setting(0, "epochs without a better validation after which to stop; 0: never", low=0)
    learning_rate: float | None = _setting(
        None, "after warm-up; falls to zero along a cosine; none: 2e-3, for recresacnet 1e-4", low=0, high=1
    )
    warmup_steps: int = _setting(100, "steps of rising learning rate", low=0)
    weight_decay: float = _setting(1e-4, "of AdamW", low=0, high=1)
    clip_norm: float = _setting(1.0, "largest norm of the gradient", low=0)
    ema_decay: float = _setting(0.999, "of the averaged weights that are kept", low=0, high=1)
    bfloat16: bool = _setting(True, "convolutions in bfloat16; fields stay in float32")
    level_low: float = _setting(0.02, "smallest deformation level", low=0, high=1)
    level_high: float = _setting(1.0, "largest deformation level", low=0, high=1)
    roll_out: float = _setting(
        0.5, "share of steps of velocity_unet on images that it has recovered in part", low=0, high=1
    )
    gradient_share: float = _setting(
        0.5,
        "share of velocity_unet's loss on differences between neighbours, which keeps outlines smooth",
        low=0,
        high=1,
    )
    folding_weight: float = _setting(0.0, "weight of the folding penalty", low=0)
    distance_weight: float = _setting(1.0, "weight of recresacnet's distance term", low=0)
    angle_weight: float = _setting(1.0, "weight of recresacnet's angle term", low=0)
    smoothness_weight: float = _setting(10.0, "weight of recresacnet's smoothness term", low=0)
    flip: float = _setting(Pose.flip, "chance of a flip along each axis", low=0, high=1)
    permute: float = _setting(Pose.permute, "chance that the axes change places", low=0, high=1)
    rotation_deg: float = _setting(Pose.rotation_deg, "largest rotation", low=0, high=180)
    scale: float = _setting(Pose.scale, "log of the largest magnification", low=0, high=1)
    shift_frac: float = _setting(Pose.shift_frac, "largest shift, as a fraction of the image", low=0, high=0.5)
    gamma: float = _setting(Appearance.gamma, "log of the largest gamma", low=0, high=2)
    contrast: float = _setting(Appearance.contrast, "largest change of contrast", low=0, high=1)
    bias: float = _setting(Appearance.bias, "strength of the bias field", low=0, high=1)
    blur_vox: float = _setting(Appearance.blur_vox, "largest blur", low=0, high=5)
    noise: float = _setting(Appearance.noise, "largest noise, in units of the intensity range", low=0, high=1)
    validation_share: float = _setting(0.1, "share of the scans kept for validation", low=0, high=0.5)
    init: str = _setting("", "network to start from: a name or a .safetensors file")
    seed: int = _setting(0, "fixes data order, fields and weights", low=0, high=2**31 - 1)
    device: str = _setting("", "torch device; empty: a GPU if there is one")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for one in fields(self):
            value = _checked_type(getattr(self, one.name), hints[one.name], one.name)
            object.__setattr__(self, one.name, value)
            _check_range(value, one.name, **{k: one.metadata[k] for k in ("low", "high", "choices")})
        self._complete()
        if 0 < self.working_size < _SMALLEST:
            raise ValueError(f"working_size must be {_SMALLEST} or more, got {self.working_size}.")
        if self.network == "velocity_unet" and self.working_size % 2 == 0 and self.working_size > 0:
            raise ValueError(f"working_size must be odd for velocity_unet, got {self.working_size}.")
        if len(self.channels) < 2:
            raise ValueError(f"channels must be two or more numbers, got {self.channels}.")
        if not 0 < self.level_low < self.level_high:
            raise ValueError(
                f"level_low must be above 0 and below level_high, got {self.level_low}, {self.level_high}."
            )
        if self.slice_axis is not None and self.spatial_dims == 3:
            raise ValueError("slice_axis is for 2D networks; leave it out, or set spatial_dims=2.")

    def _complete(self) -> None:
        """Fill in what depends on the network, as far as it is known without looking at ``init``."""
        known: dict[str, Any] = {}
        kind = self.network or ("" if self.init else "velocity_unet")
        if kind:
            known["network"] = kind
            if self.learning_rate is None:
                known["learning_rate"] = _LEARNING_RATE[kind]
            if not self.working_size and not self.init:
                known["working_size"] = _KINDS[kind][self.spatial_dims]
        for name, value in known.items():
            object.__setattr__(self, name, value)

    @property
    def pose(self) -> Pose:
        """How images are moved as a whole."""
        return Pose(self.flip, self.permute, self.rotation_deg, self.scale, self.shift_frac)

    @property
    def appearance(self) -> Appearance:
        """How much the look of images is changed."""
        return Appearance(self.gamma, self.contrast, self.bias, self.blur_vox, self.noise)

    def to_json(self) -> str:
        """The settings as JSON; an unlimited number is ``"inf"``."""
        values = {k: "inf" if v == math.inf else v for k, v in asdict(self).items()}
        return json.dumps(values, indent=2) + "\n"


def build_config(file: str | Path | None = None, settings: Sequence[str] = (), **known: Any) -> TrainConfig:
    """Settings from a YAML or JSON file, then ``key=value`` texts, then keywords; later ones win.

    Args:
        file: a mapping of settings; None: the defaults.
        settings: such as ``"batch_size=8"``; values are read as YAML.
        known: values given by name; None leaves a setting as it is.

    Raises:
        FileNotFoundError: no such file.
        TypeError: a value of a wrong type.
        ValueError: an unknown setting, a value out of range, or a file that is no mapping.
    """
    values = {} if file is None else _read(Path(file))
    for text in settings:
        key, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--set must be key=value, got {text!r}.")
        values[key.strip()] = _parse(value, f"--set {key}")
    values |= {key: value for key, value in known.items() if value is not None}
    names = {one.name for one in fields(TrainConfig)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise ValueError(f"unknown settings {unknown}; known are {', '.join(sorted(names))}.")
    return TrainConfig(**values)


def describe_settings() -> str:
    """One line for every setting: name, default, and what it means."""
    return "\n".join(f"  {one.name} = {one.default!r}: {one.metadata['help']}" for one in fields(TrainConfig))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no settings file {path}.")
    values = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(values).__name__}.")
    return dict(values)


def _parse(text: str, origin: str) -> Any:
    """A YAML value (JSON is one)."""
    import yaml  # an extra: training only

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} cannot be read: {error}") from None


def _checked_type(value: Any, hint: Any, name: str) -> Any:
    """The value as the type it is declared with: integers may stand for floats, lists for tuples."""
    if value is None and type(None) in get_args(hint):
        return None
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if hint == tuple[int, ...]:
        if isinstance(value, (list, tuple)) and all(type(one) is int for one in value):
            return tuple(value)
        raise TypeError(f"{name} must be a list of integers, got {value!r}.")
    kind = kinds[0]
    if kind is float:
        number = _number(value)
        if number is not None and not math.isnan(number):
            return number
    elif type(value) is kind:
        return value
    raise TypeError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}.")


def _number(value: Any) -> float | None:
    """A number, also as a text: YAML reads 1e-3 as one."""
    try:
        return float(value) if type(value) in (int, float, str) else None
    except ValueError:
        return None


def _check_range(value: Any, name: str, low: float, high: float, choices: tuple[Any, ...]) -> None:
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
    numbers = value if isinstance(value, tuple) else (value,) if type(value) in (int, float) else ()
    if not all(low <= number <= high for number in numbers):
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}.")
