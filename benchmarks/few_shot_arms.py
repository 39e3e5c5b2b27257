"""The arms of the few-shot benchmark: what moves the labelled images, and the settings each may choose from.

Every arm adds to the same change of intensity. Fields are drawn ahead of training, ``Protocol.bank`` for every image,
and kept on the segmenter's grid; each training image takes one of its own at random, then a pose. So all arms cost the
same per iteration. The pose of all arms is what the ``affine`` arm chose.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from few_shot_protocols import Case, margins, Protocol
from monai.transforms import Rand2DElastic, Rand3DElastic
from safetensors.torch import load_file, save_file
from torch import Tensor

from monai_drdm.diffusion import DRDM
from monai_drdm.fields import identity_grid, resize_ddf, sample
from monai_drdm.networks import load_network, network_sha256
from monai_drdm.train.process import Appearance, change_appearance, Pose, random_pose

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
STRENGTHS: dict[str, dict[int, tuple[tuple[float, float], ...]]] = {
    "elastic": {2: ((0.0, 1.5), (0.0, 3.0), (0.0, 6.0)), 3: ((0.0, 100.0), (0.0, 250.0), (0.0, 500.0))},
    "random": {2: ((0.02, 0.1), (0.05, 0.2), (0.1, 0.4)), 3: ((0.05, 0.2), (0.1, 0.4), (0.2, 0.6))},
    "drdm": {2: ((0.2, 0.5), (0.3, 0.8), (0.6, 1.0)), 3: ((0.2, 0.5), (0.3, 0.8), (0.6, 1.0))},
}
PROBABILITIES = (0.5, 0.9)
ARMS = {"none": "", "affine": "", "elastic": "elastic", "random": "random", "drdm": "drdm", "drdm-tuned": "drdm"}
"""Arms, and what draws their fields. ``drdm-tuned`` takes a network tuned on the pool's images."""


def candidates(arm: str, dims: int, pose: Setting) -> list[Setting]:
    """What an arm may choose from: six for each, eight for ``affine``, whose pose the others have."""
    if arm == "none":
        return [Setting()]
    if arm == "affine":
        return list(AFFINE)
    kept = {key: getattr(pose, key) for key in ("rotation_deg", "scale", "shift_frac", "flip")}
    strengths = STRENGTHS[ARMS[arm]][dims]
    return [Setting(**kept, low=low, high=high, prob=prob) for low, high in strengths for prob in PROBABILITIES]


class Fields:
    """Banks of fields, drawn when first asked for and kept in a folder: a new one when the sampler's code changes."""

    def __init__(self, folder: Path, tuned: str | None = None) -> None:
        self.folder, self.tuned = folder, tuned
        self._models: dict[str, DRDM] = {}

    def bank(self, arm: str, setting: Setting, protocol: Protocol, case: Case) -> Tensor | None:
        """``(N, K, D, *grid)`` voxels for the images of a case; None for arms without fields."""
        kind = ARMS[arm]
        if not kind:
            return None
        model = None if kind == "elastic" else self._model(arm, protocol)
        key = {
            "kind": kind,
            "range": [setting.low, setting.high],
            "protocol": [protocol.domain, protocol.grid, protocol.bank],
            "case": case.name,
            "network": self.name_for(arm, protocol),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / f"{kind}-{case.name}-{digest}.safetensors"
        if not path.is_file():
            seed = int(hashlib.sha256(f"{kind}/{case.name}".encode()).hexdigest()[:7], 16)
            fields = _draw(model, kind, setting, protocol, case, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            save_file({"ddf": fields.half().contiguous()}, partial)
            partial.replace(path)
        return load_file(path)["ddf"]

    def name_for(self, arm: str, protocol: Protocol) -> str:
        """The network that draws an arm's fields, as rows name it."""
        if ARMS[arm] != "drdm":
            return ""
        model = self._model(arm, protocol)
        return f"{model.network.card.name} {network_sha256(model.network)[:8]}, {model.steps} steps"

    def _model(self, arm: str, protocol: Protocol) -> DRDM:
        shipped = {2: "anatomy-2d", 3: "anatomy-3d"}[len(protocol.grid)]
        if arm == "drdm-tuned" and self.tuned is None:
            raise SystemExit("arm drdm-tuned needs --network, a network tuned on the pool's images.")
        name = str(self.tuned) if arm == "drdm-tuned" else shipped
        if name not in self._models:
            self._models[name] = DRDM(load_network(name))
        return self._models[name]


def _draw(model: DRDM | None, kind: str, setting: Setting, protocol: Protocol, case: Case, seed: int) -> Tensor:
    found = []
    for i, image in enumerate(case.source):
        seeds = [seed + i * protocol.bank + k for k in range(protocol.bank)]
        levels = [_between(setting.low, setting.high, one) for one in seeds]
        if model is None:
            elastic = _elastic(protocol, setting)
            found.append(torch.stack([elastic(one) for one in seeds]))
        elif kind == "drdm":
            found.append(_to_grid(model.sample(image.expand(protocol.bank, *image.shape), levels, seeds), protocol))
        else:
            found.append(_to_grid(model.diffuse(image.shape[1:], levels, seeds), protocol))
    return torch.stack(found)


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


class Augmenter:
    """Random training batches of one arm."""

    def __init__(self, protocol: Protocol, setting: Setting, cases: list[Case], banks: list[Tensor | None]) -> None:
        self.protocol, self.setting = protocol, setting
        self.images = torch.cat([case.image for case in cases])
        self.labels = torch.cat([case.label for case in cases])
        there = [bank for bank in banks if bank is not None]
        self.bank = torch.cat(there) if there else None

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``(B, 1, *grid)`` image and label."""
        count, size = len(self.images), self.protocol.batch
        chosen = torch.randint(count, (size,), generator=generator)
        shape = self.protocol.grid
        matrix, shift = random_pose(generator, size, shape, self.setting.pose)
        form = (1, -1, *(1,) * len(shape))
        centre = torch.tensor([(n - 1) / 2 for n in shape]).view(form)
        turned = torch.einsum("bij,bj...->bi...", matrix, identity_grid(shape).expand(size, -1, *shape) - centre)
        position = turned + centre + shift.view(size, -1, *form[2:])
        fires = torch.rand(size, generator=generator) < self.setting.prob
        draw = torch.randint(self.protocol.bank, (size,), generator=generator)
        if self.bank is not None:
            ddf = self.bank[chosen, draw].float() * fires.view(-1, 1, *form[2:])
            position = position + sample(ddf, position)
        image = sample(self.images[chosen], position)
        label = sample(self.labels[chosen], position, "nearest")
        return change_appearance(image, generator, INTENSITY), label
