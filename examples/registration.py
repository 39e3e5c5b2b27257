"""From one folder of scans to a registration network: no second scan of anybody, no label, no field from elsewhere.

    python examples/registration.py --out registration                  # hearts drawn by this script
    python examples/registration.py --out registration --data scans/    # your own: scans/images (and scans/labels)

Makes pairs with known fields of all scans but the last ones (``pairs/``), trains one of MONAI's registration networks
on them (``run/network.safetensors``), and registers the last scans, each to the next: ``registered.png``,
``separability.png`` and ``result.json``. Your own scans are 2D or 3D NIfTI images on grids of about one size; labels
have the file names of the images, and are never learned from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import drawn_hearts
import nibabel as nib
import numpy as np
import torch
from matplotlib.figure import Figure
from pictures import show

from monai_drdm.augment import make_pairs, PairSettings, plot_overview
from monai_drdm.fields import warp
from monai_drdm.io import find_cases, load_ddf
from monai_drdm.registration import evaluate_registration, load_registration, motion_separability, register
from monai_drdm.registration.data import ImageBank, load_images
from monai_drdm.registration.task import fit, RegistrationConfig
from monai_drdm.viz import middle_plane, plot_warped_grid, separability_figure

KINDS = ("images", "labels")
LEVEL = (0.6, 1.0)
"""Of both fields of a pair: people differ by more than one of them moves."""
ROUNDS = 2
"""How often the network registers."""
Registered = dict[str, Any]
"""One pair: `moving`, `fixed`, `warped`, their labels where there are any, the `ddf`, and the `score`."""


def draw_scans(folder: Path, count: int, size: int) -> None:
    """Hearts and their labels as NIfTI files."""
    drawn_hearts.draw_data(folder, count, size)


def link_split(data: Path, folder: Path, judged: int) -> None:
    """Links to the scans to learn from, and to those to judge by: the last ones."""
    if judged < 2:
        raise SystemExit(f"--judged must be 2 or more, for scans are registered to each other, got {judged}.")
    names = sorted(path.name for path in (data / "images").glob("*.nii*"))
    if len(names) < judged + 2:
        raise SystemExit(
            f"{data}/images: need {judged + 2} scans or more to judge by the last {judged}, got {len(names)}."
        )
    for part, members in (("learned", names[:-judged]), ("judged", names[-judged:])):
        for kind in (kind for kind in KINDS if (data / kind).is_dir()):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
            for name in members:
                (folder / part / kind / name).symlink_to((data / kind / name).resolve())


def spatial_dims(folder: Path) -> int:
    """Of the scans: 2 or 3."""
    first = sorted((folder / "images").iterdir())[0]
    return sum(size > 1 for size in nib.load(first).shape[:3])


def labels_of(folder: Path) -> Path | None:
    """Their folder, if there is one."""
    return folder / "labels" if (folder / "labels").is_dir() else None


def make_known_pairs(folder: Path, out: Path, pairs: int, **settings: Any) -> None:
    """Registration pairs of every scan, by DRDM: what ``monai-drdm pairs`` does."""
    cases = find_cases(folder / "images", labels_of(folder))
    settings = {"augmentation_level": LEVEL, "synthesis_level": LEVEL} | settings
    plot_overview(make_pairs(cases, out, PairSettings(pairs=pairs, **settings), progress=True))


def train(pairs: Path, out: Path, steps: int, dims: int, **settings: Any) -> torch.nn.Module:
    """A network that knows the fields of its pairs: what ``python -m monai_drdm.registration.train`` does."""
    config = RegistrationConfig(
        pairs=str(pairs),
        spatial_dims=dims,
        batch_size=8 if dims == 2 else 2,
        max_epochs=max(1, steps // 100),
        epoch_length=min(100, steps),
        warmup_steps=min(100, steps // 4),
        **settings,
    )
    weights = fit(config, out, progress=True)
    assert weights is not None
    return load_registration(weights)


def register_all(network: torch.nn.Module, folder: Path, dims: int) -> list[Registered]:
    """Every scan onto the next, and how well."""
    bank = load_images(folder / "images", labels_of(folder), spatial_dims=dims)
    return [_register_pair(network, bank, i) for i in range(len(bank))]


def _register_pair(network: torch.nn.Module, bank: ImageBank, fixed: int) -> Registered:
    pair = bank.pairs(torch.tensor([(fixed + 1) % len(bank)]), torch.tensor([fixed])).to(torch.device("cpu"))
    structures = [] if pair.fixed_label is None else [int(v) for v in pair.fixed_label.unique() if v > 0]
    labels = {"moving_label": pair.moving_label, "fixed_label": pair.fixed_label, "structures": structures}

    def method(moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return register(network, moving, fixed, rounds=ROUNDS)

    def nothing(moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(ddf)

    ddf = method(pair.moving, pair.fixed)
    return {
        "moving": pair.moving,
        "fixed": pair.fixed,
        "warped": warp(pair.moving, ddf),
        "moving_label": pair.moving_label,
        "fixed_label": pair.fixed_label,
        "warped_label": None if pair.moving_label is None else warp(pair.moving_label, ddf, "nearest"),
        "ddf": ddf,
        "score": evaluate_registration(method, pair.moving, pair.fixed, **labels),
        "before": evaluate_registration(nothing, pair.moving, pair.fixed, both_ways=False, **labels),
    }


def summary(found: Sequence[Registered]) -> dict[str, float]:
    """Means over pairs."""
    scores, before = [one["score"] for one in found], [one["before"] for one in found]
    result = {
        "folds_percent": 100 * float(np.mean([score.fold_fraction for score in scores])),
        "inverse_consistency_vox": float(np.mean([score.inverse_consistency_vox for score in scores])),
        "difference": float(np.mean([(one["warped"] - one["fixed"]).abs().mean() for one in found])),
        "difference_before": float(np.mean([(one["moving"] - one["fixed"]).abs().mean() for one in found])),
    }
    if all(score.dice for score in scores):
        result["dice_before"] = float(np.nanmean([np.nanmean(score.dice) for score in before]))
        result["dice"] = float(np.nanmean([np.nanmean(score.dice) for score in scores]))
    return result


def draw_registered(found: Sequence[Registered], count: int = 4) -> Figure:
    """Moving, warped and fixed images with the outlines of the fixed label, and the fields as grids."""
    shown = found[:: max(1, len(found) // count)][:count]
    names = ("moving", "moving, warped", "fixed", "field")
    figure = Figure(figsize=(2.5 * len(shown), 2.6 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(shown), squeeze=False)
    for column, one in zip(axes.T, shown):
        for axis, key in zip(column, ("moving", "warped", "fixed")):
            label = one["fixed_label"]  # the same outlines in all three: what is to fit
            show(axis, middle_plane(one[key][0])[None], torch.zeros(1, 1) if label is None else middle_plane(label[0]))
        ddf = one["ddf"][0]
        plot_warped_grid(column[3], ddf if len(ddf) == 2 else ddf[:2, ..., ddf.shape[-1] // 2])
        for axis, name in zip(column, names):
            axis.set_title(name, fontsize=9)
            axis.set_axis_off()
    return figure


def draw_separability(pairs: Path, found: Sequence[Registered]) -> Figure:
    """How differently near points move: in the fields learned from, and in those of the network."""
    largest = min(found[0]["ddf"].shape[2:]) // 2
    distances = sorted({round(largest ** (k / 12)) for k in range(13)})
    known = [load_ddf(path).as_tensor()[None] for path in sorted((pairs / "fields").iterdir())[:20]]
    curves = {
        "pairs by DRDM": torch.cat([motion_separability(ddf.float(), distances) for ddf in known]),
        "registered scans": torch.cat([motion_separability(one["ddf"], distances) for one in found]),
    }
    return separability_figure(distances, curves)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--data", type=Path, help="folder with images/, and labels/ to judge by; default: drawn hearts")
    parser.add_argument("--judged", type=int, default=10, help="scans at the end that are only judged by")
    parser.add_argument("--pairs", type=int, default=4, help="of every scan")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--size", type=int, default=96, help="of drawn hearts")
    parser.add_argument("--scans", type=int, default=40, help="how many hearts are drawn")
    args = parser.parse_args(arguments)
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"{args.out} is not empty; choose a new folder.")
    if args.data is None:
        draw_scans(args.out / "data", args.scans, args.size)
    link_split(args.data or args.out / "data", args.out, args.judged)
    dims = spatial_dims(args.out / "learned")
    make_known_pairs(args.out / "learned", args.out / "pairs", args.pairs)
    network = train(args.out / "pairs", args.out / "run", args.steps, dims)
    found = register_all(network, args.out / "judged", dims)
    draw_registered(found).savefig(args.out / "registered.png", dpi=120)
    draw_separability(args.out / "pairs", found).savefig(args.out / "separability.png", dpi=120)
    result = summary(found)
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(f"{name}: {value:.3f}" for name, value in result.items()))
    return result


if __name__ == "__main__":
    main()
