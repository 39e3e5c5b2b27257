"""Measure what each optimisation gains, by timing two implementations on the same arrays.

Both are timed in turns on one thread, so that the machine is the same for both. The expected speed-up is written in
this file; it follows from the number of passes over memory.

    python benchmarks/speed/hot_paths.py --turns 9
    python benchmarks/speed/hot_paths.py --only "training step in bfloat16"
    python benchmarks/speed/hot_paths.py --table
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.blocks import Warp
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from monai_drdm.fields import exp_svf, identity_grid, resize_ddf, warp
from monai_drdm.fields.grid import sampling_grid, to_grid_sample
from monai_drdm.fields.sampling import gather_voxels, sample_on_grid
from monai_drdm.networks import load_network, VelocityUNet
from monai_drdm.networks.normalization import GroupNorm
from monai_drdm.train.augmentation import smooth_noise
from monai_drdm.train.synthetic import _organs

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine, read_rows

PATH = Path(__file__).parent / "hot_paths.jsonl"
SHAPES = {2: (256, 256), 3: (128, 128, 128)}
COARSE = {2: (81, 81), 3: (41, 41, 41)}
Ways = tuple[Callable[[], Any], Callable[[], Any]]


class Change(NamedTuple):
    """Two implementations of the same operation."""

    name: str
    predicted: float
    """Expected speed-up of the second implementation."""
    kept: bool
    why: str
    ways: Callable[[int], Ways]
    dims: tuple[int, ...] = (2, 3)


def _inputs(dims: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = SHAPES[dims]
    coarse = 2 * torch.randn(1, dims, *COARSE[dims], generator=generator)
    image = torch.rand(1, 1, *shape, generator=generator)
    return coarse, image, (4 * image).to(torch.uint8)


def _grid_by_identity(ddf: Tensor) -> Tensor:
    return to_grid_sample(ddf + identity_grid(ddf.shape[2:]), ddf.shape[2:])


def _nearest_by_index(label: Tensor, ddf: Tensor) -> Tensor:
    at = ddf + identity_grid(ddf.shape[2:])
    axes = [at[:, d].clamp(0, n - 1) for d, n in enumerate(label.shape[2:])]
    index = torch.stack(axes, dim=1).round().long().flatten(2)
    return gather_voxels(label, index, "border").view(label.shape)


def sampling(dims: int) -> Ways:
    ddf = resize_ddf(_inputs(dims)[0], SHAPES[dims])
    return lambda: _grid_by_identity(ddf), lambda: sampling_grid(ddf)


def one_grid(dims: int) -> Ways:
    coarse, image, _ = _inputs(dims)
    ddf = resize_ddf(coarse, SHAPES[dims])

    def shared() -> None:
        grid = sampling_grid(ddf)
        for _ in range(2):
            sample_on_grid(image, grid, "bilinear", "border")

    return lambda: [warp(image, ddf) for _ in range(2)], shared


def labels(dims: int) -> Ways:
    coarse, _, label = _inputs(dims)
    ddf = resize_ddf(coarse, SHAPES[dims])
    return lambda: _nearest_by_index(label, ddf), lambda: warp(label, ddf, "nearest")


def scaled_first(dims: int) -> Ways:
    coarse, shape, mode = _inputs(dims)[0], SHAPES[dims], {2: "bilinear", 3: "trilinear"}[dims]
    scale = torch.tensor([(n - 1) / (m - 1) for n, m in zip(shape, coarse.shape[2:])]).view(1, -1, *(1,) * dims)
    return lambda: F.interpolate(coarse, shape, mode=mode, align_corners=True) * scale, lambda: resize_ddf(
        coarse, shape
    )


def fused_upsampling(dims: int) -> Ways:
    """Upsample directly into the layout of ``grid_sample``, with channels-last memory."""
    coarse, shape, mode = _inputs(dims)[0], SHAPES[dims], {2: "bilinear", 3: "trilinear"}[dims]
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    scale = torch.tensor([2 / (m - 1) for m in coarse.shape[2:]]).view(1, -1, *(1,) * dims)

    def fused() -> Tensor:
        small = (coarse * scale).flip(1).contiguous(memory_format=layout)
        grid = F.interpolate(small, shape, mode=mode, align_corners=True).movedim(1, -1)
        for d, n in enumerate(shape):
            grid[..., dims - 1 - d] += torch.linspace(-1, 1, n).view(-1, *(1,) * (dims - 1 - d))
        return grid

    return lambda: sampling_grid(resize_ddf(coarse, shape)), fused


def _prediction(dims: int) -> tuple[Any, Tensor, Tensor]:
    network = load_network({2: "anatomy-2d", 3: "anatomy-3d"}[dims])
    size = network.card.working_size
    return network, torch.rand(1, 1, *(size,) * dims), torch.tensor([0.5])


def channels_last(dims: int) -> Ways:
    """One convolution of the size of those on the network's second grid."""
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    conv = {2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dims](32, 32, 3, padding=1)
    x = torch.rand(1, 32, *(41 if dims == 2 else 21,) * dims)
    other, y = copy.deepcopy(conv).to(memory_format=layout), x.contiguous(memory_format=layout)
    return lambda: conv(x), lambda: other(y)


def one_volume(shape: tuple[int, ...], dims: int) -> Ways:
    """The network on a single volume, with PyTorch's own choice of convolutions and with ours."""
    network, _, level = _prediction(dims)
    plain, x = copy.deepcopy(network), torch.rand(1, 1, *shape)
    for module in plain.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.__class__ = torch.nn.Conv3d
    return lambda: plain(x, level), lambda: network(x, level)


def compiled(dims: int) -> Ways:
    network, x, level = _prediction(dims)
    fast = torch.compile(network, dynamic=False)
    return lambda: network(x, level), lambda: fast(x, level)


def bfloat16(dims: int) -> Ways:
    network, x, level = _prediction(dims)

    def half() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(x, level)

    return lambda: network(x, level), half


def training(dims: int) -> Ways:
    """A training step of 16 images, with PyTorch's own order of features in the group norms and with ours."""
    ours = VelocityUNet(dims, channels=(16, 32, 64, 96))
    plain = copy.deepcopy(ours)
    for module in plain.modules():
        if isinstance(module, GroupNorm):
            module.__class__ = torch.nn.GroupNorm
    return partial(_training_step, plain), partial(_training_step, ours)


def compiled_training(dims: int) -> Ways:
    """The same training step, and compiled."""
    network = VelocityUNet(dims, channels=(16, 32, 64, 96))
    return partial(_training_step, network), partial(_training_step, torch.compile(network, dynamic=False))


def _training_step(network: Callable[[Tensor, Tensor], Tensor]) -> None:
    with torch.enable_grad():
        with torch.autocast("cpu", torch.bfloat16):
            predicted = network(torch.rand(16, 1, 161, 161), torch.rand(16))
        predicted.square().mean().backward()


def organs(dims: int) -> Ways:
    """The organs of random anatomy: all of their fields at once, sorted, or one field after the other."""
    batch, size = {2: (16, (161, 161)), 3: (2, (81, 81, 81))}[dims]

    def at_once() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        count, nodes = (int(torch.randint(*one, (1,), generator=generator)) for one in ((6, 16), (3, 8)))
        fields = smooth_noise(generator, batch, count, size, nodes) + 0.4 * smooth_noise(
            generator, batch, count, size, 9
        )
        symmetric = (torch.rand(batch, generator=generator) < 0.5).view(-1, *(1,) * (dims + 1))
        return torch.where(symmetric, fields + fields.flip(2), fields).topk(2, dim=1)[1][:, :1] + 1

    return at_once, lambda: _organs(torch.Generator().manual_seed(0), batch, size)[0]


def squarings(dims: int) -> Ways:
    """Integrate a velocity of at most 1 voxel: always with six squarings, or with as many as it needs."""
    svf = resize_ddf(_inputs(dims)[0], tuple((n + 1) // 2 for n in COARSE[dims]))
    svf = svf / svf.abs().max()
    return lambda: exp_svf(svf, 6), lambda: exp_svf(svf, at_most=6)


def beside_scipy(dims: int) -> Ways:
    """Warp an image with SciPy's linear interpolation and with ours."""
    coarse, image, _ = _inputs(dims)
    ddf = resize_ddf(coarse, SHAPES[dims])
    array, at = image[0, 0].numpy(), (ddf[0] + identity_grid(SHAPES[dims])).numpy()
    return lambda: ndimage.map_coordinates(array, at, order=1, mode="nearest"), lambda: warp(image, ddf)


def beside_monai(dims: int) -> Ways:
    """Warp an image with MONAI's ``Warp`` block and with ours."""
    coarse, image, _ = _inputs(dims)
    ddf, block = resize_ddf(coarse, SHAPES[dims]), Warp("bilinear", "border")
    return lambda: block(image, ddf), lambda: warp(image, ddf)


CHANGES = (
    Change("sampling grid without an identity grid", 3.0, True, "one pass instead of five", sampling),
    Change("one grid for two images", 1.3, True, "the grid is computed once", one_grid),
    Change("labels through grid_sample", 3.0, True, "no int64 index, no stacking", labels),
    Change("scale a field before it grows", 1.3, True, "one pass over the fine grid less", scaled_first),
    Change("upsample into grid_sample's layout", 1.2, False, "one pass less", fused_upsampling),
    Change("convolutions channels-last", 1.2, True, "kept in 2D, in the network", channels_last, (2,)),
    Change("convolutions channels-last", 1.2, False, "not used in 3D", channels_last, (3,)),
    Change("as many squarings as a step needs", 2.0, True, "three instead of six", squarings),
    Change("warp instead of SciPy's map_coordinates", 2.0, True, "vectorised, float32", beside_scipy),
    Change("warp instead of MONAI's Warp", 1.3, True, "no identity grid", beside_monai),
    Change("network of one volume, 81×81×81", 1.5, True, "oneDNN's convolutions", partial(one_volume, (81,) * 3), (3,)),
    Change(
        "network of one volume, 57×81×57", 3.0, True, "oneDNN's convolutions", partial(one_volume, (57, 81, 57)), (3,)
    ),
    Change("network compiled", 1.3, False, "an option: `compiled`", compiled, (2,)),
    Change("network in bfloat16", 1.0, False, "an option: `precision`; needs hardware for it", bfloat16),
    Change("training step in bfloat16", 1.3, True, "group norm in the usual order of features", training, (2,)),
    Change("training step compiled", 1.5, False, "compiling takes minutes", compiled_training, (2,)),
    Change("organs of random anatomy", 1.5, True, "one field at a time stays in the cache, nothing is sorted", organs),
)


@torch.no_grad()
def run(turns: int, only: list[str]) -> None:
    """Time these optimisations and write one row for each."""
    torch.set_num_threads(1)
    where = machine() | {"run": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    for change, dims in tqdm([(one, dims) for one in CHANGES if one.name in only for dims in one.dims], unit="change"):
        before, after = change.ways(dims)
        seconds: tuple[list[float], list[float]] = ([], [])
        for turn in range(-1, turns):  # turn -1 warms up
            for way, found in zip((before, after), seconds):
                start = time.perf_counter()
                way()
                if turn >= 0:
                    found.append(time.perf_counter() - start)
        row = {"change": change.name, "dims": dims, "predicted": change.predicted, "kept": change.kept}
        row |= {"why": change.why, "before": seconds[0], "after": seconds[1], "load_average": os.getloadavg()[0]}
        append_rows(PATH, row | where)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the latest run of each change, with the ratio within a turn."""
    lines = ["| change | grid | ms before | ms after | predicted | measured | kept | |", "|" + "---|" * 8]
    latest = {(row["change"], row["dims"]): row for row in rows}
    for row in latest.values():
        ratio = np.array(row["before"]) / np.array(row["after"])
        before, after = (1e3 * np.median(row[key]) for key in ("before", "after"))
        lines.append(
            f"| {row['change']} | {row['dims']}D | {before:.2f} | {after:.2f} | {row['predicted']:.1f}× "
            f"| {np.median(ratio):.2f}× ({ratio.min():.2f} to {ratio.max():.2f}) | {'yes' if row['kept'] else 'no'} "
            f"| {row['why']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(one.name for one in CHANGES))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CHANGE", help="changes to time")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.table:
        run(args.turns, args.only)
    print(table(read_rows(PATH)))


if __name__ == "__main__":
    main()
