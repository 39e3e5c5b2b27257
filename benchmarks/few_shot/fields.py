"""Draw the fields of every arm of the few-shot benchmark before training, and keep them in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from arms import ARMS, Setting
from common.labels import margins
from monai.transforms import Rand2DElastic, Rand3DElastic
from protocols import Case, Protocol
from safetensors.torch import load_file, save_file
from torch import Tensor

import monai_drdm
from monai_drdm.diffusion import DRDM
from monai_drdm.fields import gaussian_smooth, identity_grid, resize_ddf
from monai_drdm.networks import load_network, network_sha256, RecoveryNetwork

_MARGIN = 16


class Fields:
    """Banks of fields, drawn at first use and kept in a folder; they are drawn again when the drawing code changes."""

    def __init__(self, folder: Path, tuned: str | None = None) -> None:
        self.folder, self.tuned = folder, tuned
        self._networks: dict[str, RecoveryNetwork] = {}

    def bank(self, arm: str, setting: Setting, protocol: Protocol, case: Case) -> Tensor | None:
        """Fields for the images of a case, ``(N, K, D, *grid)`` in voxels; None for arms without fields."""
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
        """Name, hash and steps of the network that draws an arm's fields, as written to rows."""
        if ARMS[arm].fields != "drdm":
            return ""
        model = self._model(arm, protocol)
        return f"{model.network.card.name} {network_sha256(model.network)[:8]}, {model.steps} steps"

    def code_of(self, arm: str) -> str:
        """Identify the code that draws an arm's fields: a digest of our source, or the version of another library."""
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
    """How much each field changes shape: RMS ``(K,)`` of its non-affine part in labelled voxels."""
    if int(inside.sum()) < 16:
        return torch.arange(len(fields), 0, -1.0)
    where = inside.nonzero().float()
    design = torch.cat([where, torch.ones(len(where), 1)], dim=1)
    moved = fields[:, :, inside].transpose(1, 2).float()  # (K, voxels, D)
    affine = torch.linalg.lstsq(design.expand(len(fields), -1, -1), moved).solution
    return (moved - design @ affine).square().sum(-1).mean(-1).sqrt()


def _to_grid(ddf: Tensor, protocol: Protocol) -> Tensor:
    """Bring fields ``(K, D, *S)`` to the segmenter's grid; margins repeat the border."""
    if protocol.resample:
        return resize_ddf(ddf, protocol.grid)
    return F.pad(ddf, margins(ddf, protocol.grid), mode="replicate")


def _between(low: float, high: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed + 1)
    return low + (high - low) * float(torch.rand((), generator=generator))


def _elastic(protocol: Protocol, setting: Setting) -> Callable[[int], Tensor]:
    """MONAI's elastic deformation as a field, read off by applying it to a grid of coordinates with a margin."""
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
    """TorchIO's elastic deformation as a field, read off in the same way."""
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
