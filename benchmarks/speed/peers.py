"""Time our transforms beside those of other libraries on the same image and label, in one run.

All of them are timed in turns, so that the machine is the same for all; the peak memory of each is that of a process of
its own that does nothing else. Every peer fires every time and resamples the image linearly and the label by nearest
neighbour. Rows hold the load average of the machine: above the number of threads, others were at work.

    python benchmarks/speed/peers.py --shapes 256x256 128x128x128 --threads 1 2 --turns 7
    python benchmarks/speed/peers.py --table

TorchIO and batchgeneratorsv2 are measured where they are installed (pip install torchio batchgeneratorsv2).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    Rand2DElasticd,
    Rand3DElasticd,
    RandAffined,
    RandGridDistortiond,
    RandSmoothDeformd,
)
from tqdm import tqdm

from monai_drdm import BatchRandDRDMDeformd, DeformationBank, RandDRDMBankd, RandDRDMDeformd
from monai_drdm.fields import gaussian_smooth

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine, read_rows

PATH = Path(__file__).parent / "peers.jsonl"
KEYS, MODES = ["image", "label"], ["bilinear", "nearest"]
MONAI = {"keys": KEYS, "mode": MODES, "prob": 1.0, "padding_mode": "border"}
POSE = {"rotate_range": 0.3, "scale_range": 0.1, "translate_range": 5.0}
BATCH = {2: 8, 3: 2}
FIELDS = 4
"""Of an image in a bank."""
Sample = dict[str, Any]
Call = Callable[[Sample], object]


def make_sample(shape: tuple[int, ...]) -> Sample:
    """A smooth random image, and a label of four classes by its intensity."""
    noise = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    image = gaussian_smooth(noise, 0.04 * max(shape))[0]
    image = (image - image.min()) / (image.max() - image.min())
    return {"image": image, "label": (image * 4).clamp(max=3).to(torch.uint8), "name": "sample"}


def bank_of(sample: Sample) -> DeformationBank:
    return DeformationBank.build([sample], id_key="name", fields_per_image=FIELDS, progress=False)


def _ours(sample: Sample) -> dict[str, Call]:
    bank = bank_of(sample)
    settings: dict[str, Any] = {"keys": KEYS, "mode": MODES, "prob": 1.0}
    batched = BatchRandDRDMDeformd(**settings)
    size = BATCH[sample["image"].ndim - 1]
    batch = {key: torch.stack([sample[key]] * size) for key in KEYS}
    return {
        "RandDRDMBankd": RandDRDMBankd(bank=bank, id_key="name", **settings),
        "RandDRDMBankd with affine": RandDRDMBankd(bank=bank, id_key="name", **settings, **POSE),
        "RandDRDMDeformd": RandDRDMDeformd(**settings),
        f"DeformationBank.build, a field of {FIELDS}": lambda _: bank_of(sample),
        f"BatchRandDRDMDeformd, a sample of {size}": lambda _: batched(batch),
    }


def _monai(sample: Sample) -> dict[str, Call]:
    shape = tuple(sample["image"].shape[1:])
    found: dict[str, Call] = {"MONAI RandAffined": RandAffined(**MONAI, **POSE)}
    if len(shape) == 2:
        spacing = tuple(n / 8 for n in shape)
        found["MONAI Rand2DElasticd"] = Rand2DElasticd(spacing=spacing, magnitude_range=(1, 3), **MONAI)
    else:
        found["MONAI Rand3DElasticd"] = Rand3DElasticd(sigma_range=(5, 7), magnitude_range=(50, 150), **MONAI)
    found["MONAI RandGridDistortiond"] = RandGridDistortiond(num_cells=5, distort_limit=0.2, **MONAI)
    found["MONAI RandSmoothDeformd"] = RandSmoothDeformd(
        KEYS, spatial_size=shape, rand_size=(6,) * len(shape), prob=1.0, grid_mode=MODES
    )
    return found


def _torchio(sample: Sample) -> dict[str, Call]:
    try:
        import torchio
    except ImportError:
        return {}
    image, label = ((t if t.ndim == 4 else t[..., None]) for t in (sample["image"], sample["label"]))
    flat = image.shape[-1] == 1
    transform = torchio.RandomElasticDeformation(max_displacement=(7.5, 7.5, 0 if flat else 7.5))
    subject = torchio.Subject(image=torchio.ScalarImage(tensor=image), label=torchio.LabelMap(tensor=label))
    return {"TorchIO RandomElasticDeformation": lambda _: transform(subject)}


def _batchgenerators(sample: Sample) -> dict[str, Call]:
    try:
        from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    except ImportError:
        return {}
    transform = SpatialTransform(
        tuple(sample["image"].shape[1:]),
        0,
        False,
        p_elastic_deform=1.0,
        mode_seg="nearest",
        padding_mode_image="border",
    )
    label = sample["label"].to(torch.int16)
    return {"batchgeneratorsv2 SpatialTransform, elastic": lambda s: transform(image=s["image"], segmentation=label)}


MAKERS = (_ours, _monai, _torchio, _batchgenerators)


def calls_of(sample: Sample) -> dict[str, Call]:
    found: dict[str, Call] = {}
    for maker in MAKERS:
        found |= maker(sample)
    return found


def share_of(name: str) -> int:
    """Number of samples or fields that one call makes."""
    return int(name.split()[-1]) if name.startswith(("Batch", "DeformationBank")) else 1


def timed(shape: tuple[int, ...], threads: int, turns: int) -> None:
    """Time all transforms in turns, then measure the memory of each."""
    torch.set_num_threads(threads)
    sample = make_sample(shape)
    calls = calls_of(sample)
    where = machine() | {"run": datetime.now(timezone.utc).isoformat(timespec="seconds"), "shape": list(shape)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in tqdm(range(-1, turns), desc=f"{shape}, {threads} threads", unit="turn"):  # turn -1 warms up
        for name, call in calls.items():
            start = time.perf_counter()
            call(sample)
            if turn >= 0:
                seconds[name].append((time.perf_counter() - start) / share_of(name))
    for name, found in seconds.items():
        memory = memory_of(name, shape, threads)
        row = {"peer": name, "seconds": [round(s, 5) for s in found], "peak_mb": memory}
        append_rows(PATH, row | where | {"load_average": os.getloadavg()[0]})


def memory_of(name: str, shape: tuple[int, ...], threads: int) -> float:
    """Peak resident megabytes that three calls add, measured in a separate process."""
    command = [sys.executable, __file__, "--one", json.dumps([name, list(shape), threads])]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)  # noqa: S603
    return float(answer.stdout.split()[-1])


def one(name: str, shape: list[int], threads: int) -> None:
    """Print how far the peak memory of this process rises above that before the first call."""
    torch.set_num_threads(threads)
    sample = make_sample(tuple(shape))
    for maker in MAKERS:
        found = maker(sample)
        if name in found:
            before = resident_mb()
            reset_peak()
            for _ in range(3):
                found[name](sample)
            print(max(0.0, peak_mb() - before))
            return


def resident_mb() -> float:
    """Resident megabytes of this process now."""
    return _status("VmRSS:")


def peak_mb() -> float:
    """Largest resident megabytes of this process since ``reset_peak``."""
    return _status("VmHWM:")


def reset_peak() -> None:
    """Reset the peak memory of this process."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown tables of the latest run for every shape and number of threads."""
    parts = []
    groups = sorted({(tuple(r["shape"]), r["threads"]) for r in rows}, key=lambda g: (len(g[0]), *g))
    for shape, threads in groups:
        mine = [r for r in rows if (tuple(r["shape"]), r["threads"]) == (shape, threads)]
        latest = [r for r in mine if r["run"] == max(one["run"] for one in mine)]
        reference = next(r for r in latest if r["peer"] in ("MONAI Rand2DElasticd", "MONAI Rand3DElasticd"))
        lines = [
            f"{'×'.join(map(str, shape))}, {threads} thread{'s' * (threads > 1)}:",
            "",
            "| transform | ms (smallest to largest) | of MONAI's elastic | peak memory MB |",
            "|---|---|---|---|",
        ]
        for row in sorted(latest, key=lambda r: np.median(r["seconds"])):
            ms = 1e3 * np.array(row["seconds"])
            ratio = np.median(np.array(row["seconds"]) / np.array(reference["seconds"]))
            lines.append(
                f"| {row['peer']} | {np.median(ms):.1f} ({ms.min():.1f} to {ms.max():.1f}) | {ratio:.2f} "
                f"| {row['peak_mb']:.0f} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[(256, 256), (512, 512), (96,) * 3, (128,) * 3])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(*json.loads(args.one))
        return
    if not args.table:
        for shape in args.shapes:
            for threads in args.threads:
                timed(shape, threads, args.turns)
    print(table(read_rows(PATH)))


if __name__ == "__main__":
    main()
