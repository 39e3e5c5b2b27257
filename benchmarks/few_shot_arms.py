"""The arms of the few-shot benchmark: what moves the labelled images, and the settings each may choose from.

Every arm adds to the same change of intensity. Fields are drawn ahead of training, ``Protocol.bank`` for every image,
and kept on the segmenter's grid; each training image takes one of its own at random, then a pose. So all arms cost the
same per iteration. The pose of all arms is what the ``affine`` arm chose.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from few_shot_protocols import Case, margins, Protocol
from monai.transforms import (
    Compose,
    Rand2DElastic,
    Rand3DElastic,
    RandAdjustContrast,
    RandGaussianNoise,
    RandGaussianSharpen,
    RandGaussianSmooth,
    RandScaleIntensity,
    RandShiftIntensity,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import monai_drdm
from monai_drdm.diffusion import DRDM
from monai_drdm.fields import compose, gaussian_smooth, identity_grid, resize_ddf, sample
from monai_drdm.networks import load_network, network_sha256, RecoveryNetwork
from monai_drdm.train.process import Appearance, change_appearance, Pose, random_pose, uniform

INTENSITY = Appearance(gamma=0.25, contrast=0.2, bias=0.1, blur_vox=0.5, noise=0.03)
_MARGIN = 16


@dataclass(frozen=True)
class Setting:
    """How strong an arm is: a pose, and a field of some strength with some probability."""

    rotation_deg: float = 0.0
    scale: float = 0.0
    shift_frac: float = 0.0
    flip: float = 0.0
    low: float = 0.0
    high: float = 0.0
    """Range of strengths of fields: displacement of nodes in voxels, noise magnitude, or deformation level."""
    prob: float = 0.0
    amplitude: float = 1.0
    """Lever: displacements are multiplied by a factor between this and 1."""
    second: float = 0.0
    """Lever: chance that a field is composed with another one of the same image."""
    smooth: float = 0.0
    """Lever: standard deviation in voxels by which fields are smoothed."""
    guided: int = 1
    """Lever: so many fields are drawn for each that is kept, those that change the label most."""
    ramp: int = 0
    """Lever: iterations over which the probability rises from 0."""
    recovery: float = 1.0
    """Lever: factor on every recovery step; less of it leaves more of the random field."""
    steps: int = 0
    """Lever: recovery steps, where not as many as the network was made for."""

    def row(self) -> dict[str, float]:
        """As JSON lines name it: levers only where they are pulled."""
        levers = ("amplitude", "second", "smooth", "guided", "ramp", "recovery", "steps")
        return {
            k: v for k, v in asdict(self).items() if k not in levers or v != Setting.__dataclass_fields__[k].default
        }

    @property
    def pose(self) -> Pose:
        """Without the field."""
        return Pose(flip=self.flip, rotation_deg=self.rotation_deg, scale=self.scale, shift_frac=self.shift_frac)


AFFINE = (
    *(
        Setting(rotation_deg=rotation, scale=scale, shift_frac=shift, flip=flip)
        for rotation, scale, shift in ((10.0, 0.1, 0.05), (20.0, 0.2, 0.08), (30.0, 0.3, 0.1))
        for flip in (0.0, 0.5)
    ),
    # two more trials: the strongest of the first six was the best
    Setting(rotation_deg=60.0, scale=0.3, shift_frac=0.1, flip=0.5),
    Setting(rotation_deg=180.0, scale=0.3, shift_frac=0.1, flip=0.5),
)
STRENGTHS: dict[str, dict[int, tuple[tuple[float, ...], ...]]] = {
    "elastic": {2: ((0.0, 1.5), (0.0, 3.0), (0.0, 6.0)), 3: ((0.0, 100.0), (0.0, 250.0), (0.0, 500.0))},
    "torchio": {2: ((0.0, 3.0), (0.0, 6.0), (0.0, 10.0)), 3: ((0.0, 2.0), (0.0, 4.0), (0.0, 7.5))},
    "random": {2: ((0.02, 0.1), (0.05, 0.2), (0.1, 0.4)), 3: ((0.05, 0.2), (0.1, 0.4), (0.2, 0.6))},
    "drdm": {2: ((0.2, 0.5), (0.3, 0.8), (0.6, 1.0)), 3: ((0.2, 0.5), (0.3, 0.8), (0.6, 1.0))},
}
"""Lowest and highest strength."""
SPARSE = STRENGTHS | {"drdm": {2: ((0.2, 0.5), (0.3, 0.8), (0.3, 0.8, 0.24)), 3: STRENGTHS["drdm"][3]}}
"""Those of the search with 1 subject; the third number is the factor on recovery, a lever that helped there."""
PROBABILITIES = (0.5, 0.9)
POSE = ("rotation_deg", "scale", "shift_frac", "flip")


@dataclass(frozen=True)
class Arm:
    """What moves and restyles the labelled images."""

    fields: str = ""
    """What draws its fields: `elastic` and `torchio` are peers, `random` our fields without network, `drdm`."""
    network: str = ""
    """Of DRDM; the one in the package unless named, `tuned` is the one on the command line."""
    setting_of: str = ""
    """The arm whose search it takes its setting from, instead of one of its own."""
    posed: bool = True
    recovers: bool = True
    """Whether its network can take less of each recovery step."""
    stacked: bool = False
    """Intensities change by a stack of MONAI's transforms, each with chance 0.5, instead of ``INTENSITY``."""


ARMS = {
    "none": Arm(posed=False),
    "affine": Arm(),
    "elastic": Arm("elastic"),
    "random": Arm("random"),
    "drdm": Arm("drdm"),
    "drdm-tuned": Arm("drdm", network="tuned", setting_of="drdm"),
    "torchio": Arm("torchio"),
    "bigaug": Arm("elastic", setting_of="elastic", stacked=True),
    "drdm-published": Arm("drdm", network="zheng2026-cmr-2d", setting_of="drdm", recovers=False),
    "drdm-only": Arm("drdm", setting_of="drdm", posed=False),
}
CORE = ("affine", "elastic", "random", "drdm", "drdm-tuned")


def candidates(
    arm: str,
    dims: int,
    pose: Setting,
    strengths: dict[str, dict[int, tuple[tuple[float, ...], ...]]] = STRENGTHS,
    probabilities: tuple[float, ...] = PROBABILITIES,
) -> list[Setting]:
    """What an arm may choose from: as many for each, eight for ``affine``, whose pose the others have."""
    if arm == "affine":
        return list(AFFINE)
    if not ARMS[arm].fields or ARMS[arm].setting_of:
        return []
    kept = {key: getattr(pose, key) for key in POSE}
    return [
        Setting(**kept, low=low, high=high, prob=prob, recovery=rest[0] if rest else 1.0)
        for low, high, *rest in strengths[ARMS[arm].fields][dims]
        for prob in probabilities
    ]


class Fields:
    """Banks of fields, drawn when first asked for and kept in a folder; other code draws anew."""

    def __init__(self, folder: Path, tuned: str | None = None) -> None:
        self.folder, self.tuned = folder, tuned
        self._networks: dict[str, RecoveryNetwork] = {}

    def bank(self, arm: str, setting: Setting, protocol: Protocol, case: Case) -> Tensor | None:
        """``(N, K, D, *grid)`` voxels for the images of a case; None for arms without fields."""
        kind = ARMS[arm].fields
        if not kind:
            return None
        model = self._model(arm, protocol, setting.recovery, setting.steps) if kind in ("random", "drdm") else None
        key = {
            "kind": kind,
            "range": [setting.low, setting.high],
            "protocol": [protocol.domain, protocol.grid, protocol.bank],
            "case": case.name,
            "network": self.name_for(arm, protocol),
            "code": self.code_of(arm),
        }
        key |= {name: value for name, value in setting.row().items() if name in ("guided", "recovery", "steps")}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / f"{kind}-{case.name}-{digest}.safetensors"
        if not path.is_file():
            seed = int(hashlib.sha256(f"{kind}/{case.name}".encode()).hexdigest()[:7], 16)
            fields = _draw(model, kind, setting, protocol, case, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            save_file({"ddf": fields.half().contiguous()}, partial)
            partial.replace(path)
        fields = load_file(path)["ddf"]
        if setting.smooth:
            smooth = gaussian_smooth(fields.flatten(0, 1).float(), setting.smooth)
            fields = smooth.half().view_as(fields)
        return fields

    def name_for(self, arm: str, protocol: Protocol) -> str:
        """The network that draws an arm's fields, as rows name it."""
        if ARMS[arm].fields != "drdm":
            return ""
        model = self._model(arm, protocol)
        return f"{model.network.card.name} {network_sha256(model.network)[:8]}, {model.steps} steps"

    def code_of(self, arm: str) -> str:
        """Names the code that draws an arm's fields: a digest of ours, the version of a peer."""
        kind = ARMS[arm].fields
        if kind in ("elastic", "torchio"):
            package = {"elastic": "monai", "torchio": "torchio"}[kind]
            return f"{package} {version(package)}"
        return _code_digest() if kind else ""

    def _model(self, arm: str, protocol: Protocol, recovery: float = 1.0, steps: int = 0) -> DRDM:
        shipped = {2: "anatomy-2d", 3: "anatomy-3d"}[len(protocol.grid)]
        name = ARMS[arm].network or shipped
        if name == "tuned":
            if self.tuned is None:
                raise SystemExit(f"arm {arm} needs --network, a network tuned on the pool's images.")
            name = self.tuned
        if name not in self._networks:
            self._networks[name] = load_network(name)
        return DRDM(self._networks[name], steps=steps or None, recovery=recovery)


@cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    for folder in ("diffusion", "fields", "networks"):
        for path in sorted((Path(monai_drdm.__file__).parent / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _draw(model: DRDM | None, kind: str, setting: Setting, protocol: Protocol, case: Case, seed: int) -> Tensor:
    found = []
    for i, image in enumerate(case.source):
        drawn = []
        for extra in range(setting.guided):
            seeds = [seed + i * protocol.bank + k + 1_000_003 * extra for k in range(protocol.bank)]
            levels = [_between(setting.low, setting.high, one) for one in seeds]
            if model is None:
                peer = {"elastic": _elastic, "torchio": _torchio}[kind](protocol, setting)
                drawn.append(torch.stack([peer(one) for one in seeds]))
            elif kind == "drdm":
                drawn.append(_to_grid(model.sample(image.expand(protocol.bank, *image.shape), levels, seeds), protocol))
            else:
                drawn.append(_to_grid(model.diffuse(image.shape[1:], levels, seeds), protocol))
        fields = torch.cat(drawn)
        if setting.guided > 1:
            fields = fields[_reshaping(fields, case.label[i, 0] > 0).topk(protocol.bank).indices]
        found.append(fields)
    return torch.stack(found)


def _reshaping(fields: Tensor, inside: Tensor) -> Tensor:
    """``(K,)`` root mean square of what an affine map leaves of fields ``(K, D, *grid)`` in labelled voxels."""
    if int(inside.sum()) < 16:
        return torch.arange(len(fields), 0, -1.0)
    where = inside.nonzero().float()
    design = torch.cat([where, torch.ones(len(where), 1)], dim=1)
    moved = fields[:, :, inside].transpose(1, 2).float()  # (K, voxels, D)
    affine = torch.linalg.lstsq(design.expand(len(fields), -1, -1), moved).solution
    return (moved - design @ affine).square().sum(-1).mean(-1).sqrt()


def _to_grid(ddf: Tensor, protocol: Protocol) -> Tensor:
    """``(K, D, *S)`` on the segmenter's grid; in the margins it goes on as at the border."""
    if protocol.resample:
        return resize_ddf(ddf, protocol.grid)
    return F.pad(ddf, margins(ddf, protocol), mode="replicate")


def _between(low: float, high: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed + 1)
    return low + (high - low) * float(torch.rand((), generator=generator))


def _elastic(protocol: Protocol, setting: Setting) -> Callable[[int], Tensor]:
    """MONAI's elastic deformation, as a field: where it takes coordinates, beyond the border too."""
    larger = tuple(n + 2 * _MARGIN for n in protocol.grid)
    grid = identity_grid(larger)
    if len(protocol.grid) == 2:
        transform = Rand2DElastic((16, 16), (setting.low, setting.high), prob=1.0, padding_mode="border")
    else:
        transform = Rand3DElastic((5, 8), (setting.low, setting.high), prob=1.0, padding_mode="border")
    inner = (slice(None), *(slice(_MARGIN, _MARGIN + n) for n in protocol.grid))

    def draw(seed: int) -> Tensor:
        transform.set_random_state(seed)
        return (torch.as_tensor(transform(grid)) - grid)[inner]

    return draw


def _torchio(protocol: Protocol, setting: Setting) -> Callable[[int], Tensor]:
    """TorchIO's elastic deformation, as a field."""
    try:
        import torchio
    except ImportError:
        raise SystemExit("arm torchio needs TorchIO: pip install torchio") from None
    dims = len(protocol.grid)
    grid = identity_grid(tuple(n + 2 * _MARGIN for n in protocol.grid))
    transform = torchio.RandomElasticDeformation(max_displacement=(setting.high,) * dims + (0,) * (3 - dims))
    inner = (slice(None), *(slice(_MARGIN, _MARGIN + n) for n in protocol.grid))

    def draw(seed: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return (transform(grid if dims == 3 else grid[..., None]).view_as(grid) - grid)[inner]

    return draw


def stack(seed: int) -> Compose:
    """Intensity transforms as of Zhang et al., Generalizing deep learning for medical image segmentation (2020)."""
    transforms = Compose(
        [
            RandGaussianSharpen(prob=0.5),
            RandGaussianSmooth((0.25, 1.5), (0.25, 1.5), (0.25, 1.5), prob=0.5),
            RandGaussianNoise(prob=0.5, std=0.1),
            RandShiftIntensity(0.1, prob=0.5),
            RandAdjustContrast(prob=0.5, gamma=(0.5, 2.0)),
            RandScaleIntensity(0.1, prob=0.5),
        ]
    )
    return transforms.set_random_state(seed)


class Augmenter:
    """Random training batches of one arm."""

    def __init__(
        self,
        protocol: Protocol,
        setting: Setting,
        cases: list[Case],
        banks: list[Tensor | None],
        stack: Compose | None = None,
    ) -> None:
        self.protocol, self.setting, self.stack = protocol, setting, stack
        self.images = torch.cat([case.image for case in cases])
        self.labels = torch.cat([case.label for case in cases])
        there = [bank for bank in banks if bank is not None]
        self.bank = torch.cat(there) if there else None

    def batch(self, generator: torch.Generator, iteration: int) -> tuple[Tensor, Tensor]:
        """``(B, 1, *grid)`` image and label."""
        count, size = len(self.images), self.protocol.batch
        chosen = torch.randint(count, (size,), generator=generator)
        shape = self.protocol.grid
        matrix, shift = random_pose(generator, size, shape, self.setting.pose)
        form = (1, -1, *(1,) * len(shape))
        centre = torch.tensor([(n - 1) / 2 for n in shape]).view(form)
        turned = torch.einsum("bij,bj...->bi...", matrix, identity_grid(shape).expand(size, -1, *shape) - centre)
        position = turned + centre + shift.view(size, -1, *form[2:])
        if self.bank is not None:
            ddf = self._ddf(chosen, generator, iteration)
            position = position + sample(ddf, position)
        image = sample(self.images[chosen], position)
        label = sample(self.labels[chosen], position, "nearest")
        if self.stack is not None:
            return torch.stack([self.stack(one).as_tensor().clamp(0, 1) for one in image]), label
        return change_appearance(image, generator, INTENSITY), label

    def _ddf(self, chosen: Tensor, generator: torch.Generator, iteration: int) -> Tensor:
        assert self.bank is not None
        setting, size = self.setting, len(chosen)

        def drawn() -> Tensor:
            return self.bank[chosen, torch.randint(self.bank.shape[1], (size,), generator=generator)].float()

        def chance(prob: float) -> Tensor:
            return (torch.rand(size, generator=generator) < prob).view(-1, 1, *(1,) * len(self.protocol.grid))

        fires = chance(setting.prob * min(1.0, iteration / setting.ramp) if setting.ramp else setting.prob)
        ddf = drawn() * fires
        if setting.second:
            ddf = compose(ddf, drawn() * (fires & chance(setting.second)))
        if setting.amplitude < 1:
            ddf = ddf * uniform(generator, (size, *(1,) * (ddf.ndim - 1)), setting.amplitude, 1.0)
        return ddf
