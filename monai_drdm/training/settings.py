"""The settings of a training run: a frozen dataclass, read from a YAML or JSON file and ``key=value`` arguments."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from reprlib import repr as short
from typing import Any, get_args, get_type_hints, TypeVar

from monai_drdm.documents import Document

_SETTINGS = Document("settings", "Write NAME: VALUE in every line, as YAML, or a JSON object.")
EARLIER = {"optimizer": "adamw"}
"""What the runs of version 1.0 had, which did not write these settings."""


def setting(
    default: Any, text: str, *, low: float = -math.inf, high: float = math.inf, choices: tuple[Any, ...] = ()
) -> Any:
    """A dataclass field with a line of help and the range of its numbers, or the values it may have."""
    return field(default=default, metadata={"help": text, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class RunConfig:
    """The settings that all training runs have in common.

    Raises:
        TypeError: a setting has a wrong type.
        ValueError: a setting is out of its range.
    """

    batch_size: int = setting(16, "images in a batch, on each process", low=1, high=4096)
    epoch_length: int = setting(200, "steps between validations and checkpoints; max_minutes adds some", low=1)
    max_epochs: int = setting(1000, "epochs at most", low=1)
    max_minutes: float = setting(
        math.inf, "minutes of training at most; then the run ends as if it were finished", low=0
    )
    patience: int = setting(0, "stop after this many epochs without a better validation; 0: never", low=0)
    learning_rate: float | None = setting(
        None,
        "learning rate after the warm-up; it falls to zero along a cosine; none: a value for the kind of network",
        low=0,
        high=1,
    )
    optimizer: str | None = setting(
        None, "muon or adamw; none: the one that suits the kind of network", choices=("muon", "adamw")
    )
    warmup_steps: int = setting(
        100, "steps during which the learning rate rises; with max_minutes at most a tenth of the time", low=0
    )
    weight_decay: float = setting(1e-4, "weight decay, times the learning rate", low=0, high=1)
    clip_norm: float = setting(1.0, "largest norm of the gradient; 0: no limit", low=0)
    ema_decay: float = setting(
        0.999, "decay of the exponential average of the weights, which is what is saved", low=0, high=1
    )
    bfloat16: bool = setting(True, "convolutions in bfloat16 where the device computes in it; fields stay in float32")
    seed: int = setting(0, "fixes data order, fields and weights", low=0, high=2**31 - 1)
    device: str = setting("", "torch device; empty: a GPU if there is one")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for one in fields(self):
            value = _checked_type(getattr(self, one.name), hints[one.name], one.name)
            object.__setattr__(self, one.name, value)
            _check_range(value, one.name, **{k: one.metadata[k] for k in ("low", "high", "choices")})

    def to_json(self) -> str:
        """The settings as JSON, with infinity as ``"inf"``."""
        values = {k: "inf" if v == math.inf else v for k, v in asdict(self).items()}
        return json.dumps(values, indent=2) + "\n"


Config = TypeVar("Config", bound=RunConfig)


def read_config(
    config_class: type[Config],
    file: str | Path | None = None,
    settings: Sequence[str] = (),
    of_run: bool = False,
    **overrides: Any,
) -> Config:
    """Settings from a YAML or JSON file, then from ``key=value`` strings, then from keywords; later ones win.

    Args:
        config_class: the dataclass of the settings.
        file: a mapping of settings; None: the defaults.
        settings: strings such as ``"batch_size=8"``, whose values are read as YAML.
        of_run: the file was written by a run, perhaps of an earlier version.
        overrides: values by name; None leaves a setting as it is.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: a value has a wrong type.
        ValueError: a setting is unknown, a value is out of range, or the file does not hold a mapping.
    """
    values = {} if file is None else _SETTINGS.read_yaml(Path(file))
    if of_run:
        values = EARLIER | values
    for text in settings:
        key, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--set must be key=value, got {text!r}.")
        values[key.strip()] = _SETTINGS.parse_yaml(value, f"--set {text}")
    values |= {key: value for key, value in overrides.items() if value is not None}
    names = {one.name for one in fields(config_class)}
    unknown = sorted(str(name) for name in set(values) - names)
    if unknown:
        close = closest_settings(config_class, unknown)
        meant = f"; did you mean {', '.join(close)}?" if close else "."
        raise ValueError(f"unknown settings {unknown}{meant} Known are {', '.join(sorted(names))}.")
    return config_class(**values)


def closest_settings(config_class: type[RunConfig], words: Sequence[str]) -> list[str]:
    """For each word the setting with the most similar name, if there is one."""
    names = [one.name for one in fields(config_class)]
    return [name for word in words for name in get_close_matches(word.lower().replace("-", "_"), names, n=1)]


def config_file(folder: Path) -> Path:
    """Where the settings of a run are written."""
    return folder / "config.json"


def describe_settings(config_class: type[RunConfig]) -> str:
    """One line for every setting: its name, default and meaning."""
    return "\n".join(f"  {one.name} = {one.default!r}: {one.metadata['help']}" for one in fields(config_class))


def _checked_type(value: Any, hint: Any, name: str) -> Any:
    """The value, converted to its declared type: integers to floats, lists to tuples, paths to strings."""
    if type(None) in get_args(hint) and (value is None or str(value).lower() == "none"):
        return None
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if hint == tuple[int, ...]:
        if isinstance(value, (list, tuple)) and all(_is_integer(one) for one in value):
            return tuple(int(one) for one in value)
        raise TypeError(f"{name} must be a list of integers, got {short(value)}.")
    kind = kinds[0]
    if kind is float:
        number = _number(value)
        if number is not None and not math.isnan(number):
            return number
    elif kind is int and _is_integer(value):
        return int(value)
    elif kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    elif type(value) is kind:
        return value
    raise TypeError(f"{name} must be {getattr(kind, '__name__', kind)}, got {short(value)}.")


def _is_integer(value: Any) -> bool:
    """Whether a value is an integer of Python or NumPy, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    """The value as a float, or None if it is no number. Strings count: YAML reads 1e-3 as a string."""
    try:
        return None if isinstance(value, bool) or not isinstance(value, (Real, str)) else float(value)
    except (OverflowError, ValueError):  # neither are integers that are larger than every float
        return None


def _check_range(value: Any, name: str, low: float, high: float, choices: tuple[Any, ...]) -> None:
    if choices and value is not None and value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
    numbers = value if isinstance(value, tuple) else (value,) if type(value) in (int, float) else ()
    if not all(low <= number <= high for number in numbers):
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}.")
