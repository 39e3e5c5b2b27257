"""What do the fields of the package's 3D network do to volumes of kinds for which there is no 3D segmenter?

Necks of ``tools/other_scans.py`` and limbs of test patients of ``tools/limb_data.py``, each under several fields of
the network at its defaults, and under the random fields that these start from, scaled to move points as far beyond an
affine map. Without a segmenter, three things are measured about one labelled structure (the cord; in the scan of the
whole neck only its grey matter; bones in CT of limbs; the tumour in MR of limbs):

- how unevenly it is stretched, as the spread of log det J inside it, beside the rest of the image;
- how much its volume changes;
- how much its cross-section varies from slice to slice, head to foot, beside the original. A real cord is nearly as
  thick in the next slice; one that thins and swells is not a cord.

    python benchmarks/plausibility/other_kinds.py                                 # 10 min
    python benchmarks/plausibility/other_kinds.py --table
    python benchmarks/plausibility/other_kinds.py --sheet cord_t1 --out docs/images/sheet_cord.png
    python benchmarks/plausibility/other_kinds.py --sheet limbct:STS_050 limbmr:STS_050 --out docs/images/sheet_limb.png

Rows are in ``other_kinds.jsonl``; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from monai_drdm.diffusion import DRDM
from monai_drdm.fields import fold_fraction, resize_image, voxels_to_mm, warp
from monai_drdm.metrics import log_jacobian, log_jacobian_std, mean_displacement, remove_affine
from monai_drdm.networks import load_network, network_sha256

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.labels import resize_nearest
from common.rows import append_rows, machine, read_rows
from common.scans import data_folder, DOMAINS
from contact_sheets import arrange

PATH = Path(__file__).parent / "other_kinds.jsonl"
KEY = ("scan", "network", "level", "seed", "kind")
LEVELS = (0.6, 0.8)
DRAWS, LIMB_DRAWS = 8, 2
"""Fields for each scan and level: of one person's neck, and of the limbs of several people."""
SHOWN = {
    "cord_t1": "neck, T1, crop",
    "cord_t2": "neck, T2, crop",
    "cord_t2star": "neck, T2*, crop",
    "neck_t2star": "whole neck, T2*",
    "limbct": "limbs, CT: bones",
    "limbmr": "limbs, MR: tumour",
}
"""Titles in the table: of scans, or of scans of one kind of several people."""
STRUCTURE = {"limbct": 1, "limbmr": 2}
"""Which label is measured; of necks all together."""
HEADS = (
    *("scan", "fields", "level", "n", "folds %", "px at 256 without affine", "mm", "σ log det J", "inside", "around"),
    *("volume changes by %", "at most", "cross-section varies by %", "seconds"),
)
FIELDS = {"network": "DRDM", "random": "random"}
SHOWN_DRAWS, SHOWN_LEVEL, COLOURS = 4, 0.6, 64
THICK = 3.0
"""Slices are called thick if they are this many times thicker than a pixel is wide."""


class Volume(NamedTuple):
    """A labelled scan with its grid."""

    name: str
    """Of people of whom there are several, after the kind and a colon."""
    image: Tensor  # (1, 1, *S) float32
    label: Tensor  # (1, 1, *S) uint8
    spacing: tuple[float, ...]
    upright: int
    """Axis from head to foot."""


def volume(path: Path, kind: str = "") -> Volume:
    """Read one scan, turned to the axes left, front, head, with the structure that is measured as its label."""
    pair = [nib.as_closest_canonical(nib.load(path.parents[1] / kind / path.name)) for kind in ("images", "labels")]
    values, marks = (torch.from_numpy(one.get_fdata(dtype=np.float32).copy())[None, None] for one in pair)
    spacing = tuple(float(one) for one in pair[0].header.get_zooms())
    structure = marks == STRUCTURE[kind] if kind else marks > 0
    name = path.name.split(".")[0]
    return Volume(f"{kind}:{name}" if kind else name, values, structure.byte(), spacing, upright=2)


def volumes() -> list[Volume]:
    """All scans, by name."""
    folder = data_folder() / "other" / "images"
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing: python tools/other_scans.py, see its first lines.")
    found = [volume(path) for path in sorted(folder.iterdir())]
    for kind in STRUCTURE:
        limbs = data_folder() / "limbs" / kind.removeprefix("limb") / "images"
        paths, test = sorted(limbs.glob("*")), DOMAINS[kind].splits["test"]
        if len(paths) < test.stop - 1:
            raise SystemExit(f"{limbs} is missing or not complete: python tools/limb_data.py, see its first lines.")
        found += [volume(paths[number - 1], kind) for number in test]
    return found


def cross_sections(label: Tensor, axis: int) -> float | None:
    """Standard deviation over mean of the structure's area in the slices across an axis.

    ``label`` is the part of every voxel that is inside, ``(1, 1, *S)``. Slices in which the structure touches the
    border of the image are left out; None: fewer than three are left.
    """
    inner = label[0, 0].movedim(axis, 0)
    border = inner.clone()
    border[:, 1:-1, 1:-1] = 0
    areas = inner.sum((1, 2))[(border.amax((1, 2)) < 0.5) & (inner.amax((1, 2)) >= 0.5)]
    return float(areas.std() / areas.mean()) if len(areas) > 2 else None


def measure(scan: Volume, ddf: Tensor) -> dict[str, float | None]:
    """Everything about one field."""
    size = max(n * s for n, s in zip(ddf.shape[2:], scan.spacing))
    rest = float(mean_displacement(voxels_to_mm(remove_affine(ddf), scan.spacing)))
    moved = warp((scan.label > 0).float(), ddf)
    inside = moved[0, 0][tuple(slice(0, n - 1) for n in ddf.shape[2:])] >= 0.5
    stretch = log_jacobian(ddf)[0]
    return {
        "folds": float(fold_fraction(ddf)),
        "rest_mm": rest,
        "rest_256": rest * 256 / size,
        "log_jacobian_std": float(log_jacobian_std(ddf)),
        "log_jacobian_std_inside": float(stretch[inside].std(correction=0)),
        "log_jacobian_std_outside": float(stretch[~inside].std(correction=0)),
        "volume": float(1 / stretch[inside].exp().mean()),  # the field maps the deformed structure to the original
        "cross_sections": cross_sections(moved, scan.upright),
    }


def run(draws: int | None) -> None:
    """Measure what the rows do not contain yet."""
    model = DRDM(load_network("anatomy-3d"))
    weights, there = network_sha256(model.network)[:8], {tuple(row[k] for k in KEY) for row in read_rows(PATH)}
    for scan in volumes():
        start = {"scan": scan.name, "network": weights}
        if (scan.name, weights, 0.0, 0, "original") not in there:
            still = {"cross_sections": cross_sections((scan.label > 0).float(), scan.upright)}
            append_rows(PATH, start | {"level": 0.0, "seed": 0, "kind": "original"} | still | machine())
        count = draws or (LIMB_DRAWS if ":" in scan.name else DRAWS)
        for level, seed in tqdm([(level, seed) for level in LEVELS for seed in range(count)], desc=scan.name):
            if (scan.name, weights, level, seed, "random") in there:
                continue
            key, clock = start | {"level": level, "seed": seed}, time.process_time()
            ddf = model.sample(scan.image, level, [seed], scan.spacing)
            seconds = time.process_time() - clock
            found = measure(scan, ddf) | {"seconds": seconds}
            rough = model.diffuse(scan.image.shape[2:], level, [seed], scan.spacing)
            rest = float(mean_displacement(voxels_to_mm(remove_affine(rough), scan.spacing)))
            control = measure(scan, rough * (found["rest_mm"] / rest))
            rows = [key | {"kind": "network"} | found, key | {"kind": "random"} | control]
            append_rows(PATH, *(row | machine() for row in rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of means over the draws, and over people if there are several."""
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["scan"].split(":")[0], row["kind"], row["level"]), []).append(row)
    for (scan, kind, level), found in sorted(groups.items(), key=lambda one: (one[0][0], one[0][2], one[0][1])):
        if kind == "original":
            unknown = " – |" * (len(HEADS) - 4)
            lines.append(f"| {SHOWN[scan]} | original |{unknown} {_mean(found, 'cross_sections', 1, 100)} | – |")
            continue
        change = [{"scan": row["scan"], "change": abs(row["volume"] - 1)} for row in found]
        folds = 100 * np.mean([row["folds"] for row in found])
        cells = [SHOWN[scan], FIELDS[kind], f"{level:g}", str(len(found)), f"{folds:.3f}"]
        cells += [_mean(found, "rest_256", 2), _mean(found, "rest_mm", 2), _mean(found, "log_jacobian_std", 3)]
        cells += [_mean(found, f"log_jacobian_std_{where}", 3) for where in ("inside", "outside")]
        cells += [_mean(change, "change", 1, 100), f"{100 * max(one['change'] for one in change):.0f}"]
        cells.append(_mean(found, "cross_sections", 1, 100))
        cells.append(f"{np.median([row['seconds'] for row in found]):.1f}" if kind == "network" else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "mean ± standard error over draws (limbs: over people); seconds: median of one thread"]
    )


def _mean(rows: list[dict[str, Any]], name: str, digits: int, factor: float = 1.0) -> str:
    scans: dict[str, list[float]] = {}
    for row in rows:
        if row[name] is not None:
            scans.setdefault(row["scan"], []).append(factor * row[name])
    if not scans:
        return "–"
    values = [float(np.mean(one)) for one in scans.values()] if len(scans) > 1 else next(iter(scans.values()))
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.{digits}f}"


def pictures(values: Tensor, spacing: tuple[float, ...], nearest: bool) -> list[Tensor]:
    """The three central planes of ``(1, 1, *S)``, with square pixels; of thick slices the middle one."""
    found = []
    thick = max(spacing) > THICK * min(spacing)
    for axis, n in enumerate(values.shape[2:]):
        if thick and spacing[axis] < max(spacing):
            continue
        flat, steps = values.select(axis + 2, n // 2), [s for k, s in enumerate(spacing) if k != axis]
        shape = tuple(round(m * s / min(steps)) for m, s in zip(flat.shape[2:], steps))
        sized = resize_nearest(flat, shape) if nearest else resize_image(flat.float(), shape)
        found.append(torch.rot90(sized[0, 0]))
    return found


def sheet(scans: list[Volume], out: Path) -> None:
    """Draw scans and their first draws."""
    model = DRDM(load_network("anatomy-3d"))
    rows = [row for scan in scans for row in sheet_rows(scan, model)]
    buffer = io.BytesIO()
    arrange(rows, labels=True).savefig(buffer)
    Image.open(buffer).convert("RGB").quantize(COLOURS).save(out, optimize=True)


def sheet_rows(scan: Volume, model: DRDM) -> list[list[tuple[str, Tensor, Tensor]]]:
    """The titles, images and labels of a scan and its draws, a row for each plane."""
    shown = [(SHOWN[scan.name.split(":")[0]], scan.image, scan.label)]
    for seed in range(SHOWN_DRAWS):
        ddf = model.sample(scan.image, SHOWN_LEVEL, [seed], scan.spacing)
        found = measure(scan, ddf)
        title = f"{found['rest_256']:.1f} px, folds {found['folds']:.3%}"
        shown.append((title, warp(scan.image, ddf), warp(scan.label, ddf, "nearest")))
    cut = [
        (title, pictures(image, scan.spacing, False), pictures(label, scan.spacing, True))
        for title, image, label in shown
    ]
    return [[(title, image[k], label[k]) for title, image, label in cut] for k in range(len(cut[0][1]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, help="fields for each scan and level (default: 8 of a neck, 2 of a limb)")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--sheet", nargs="+", help="only draw the contact sheet of these scans")
    parser.add_argument("--out", type=Path, help="PNG to write")
    args = parser.parse_args()
    if args.sheet:
        if args.out is None:
            parser.error("--sheet needs --out")
        known = {scan.name: scan for scan in volumes()}
        sheet([known[name] for name in args.sheet], args.out)
        return
    if not args.table:
        torch.set_num_threads(1)
        run(args.draws)
    print(table(read_rows(PATH)))


if __name__ == "__main__":
    main()
