"""nnU-Net: a raw data set, and deformed copies of its training cases, as a new raw data set.

    python examples/recipe_nnunet.py nnUNet_raw/Dataset004_Hippocampus nnUNet_raw/Dataset504_HippocampusDRDM --copies 3
    nnUNetv2_plan_and_preprocess -d 504 --verify_dataset_integrity
    cp nnUNet_raw/Dataset504_HippocampusDRDM/splits_final.json nnUNet_preprocessed/Dataset504_HippocampusDRDM/
    nnUNetv2_train 504 3d_fullres 0

All channels of a case (``CASE_0000``, ``CASE_0001``, …) and its label map are moved by one field. Intensities, labels,
affines and data types are kept. nnU-Net draws its folds among all cases; a deformed copy of a case in the training set
would then give away the case that is validated. ``splits_final.json`` therefore holds folds in which copies go with
their original and only originals are validated: copy it before training, as above.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from monai_drdm import RandDRDMDeformd
from monai_drdm.io import load_image

FOLDS = 5


def read_description(folder: Path) -> dict[str, Any]:
    """``dataset.json`` of a raw data set."""
    path = folder / "dataset.json"
    if not path.is_file():
        raise SystemExit(f"{folder} is no raw data set of nnU-Net: there is no dataset.json.")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    missing = {"channel_names", "labels", "numTraining", "file_ending"} - set(found)
    if missing or "dataset" in found:
        raise SystemExit(
            f"{path} must have the entries channel_names, labels, numTraining and file_ending, and no list 'dataset' "
            f"of files elsewhere. Missing: {sorted(missing)}."
        )
    return found


def deform_case(files: dict[str, Path], outputs: dict[str, Path], seed: str, deform: RandDRDMDeformd) -> None:
    """Write one deformed copy of a case."""
    images = {key: load_image(path) for key, path in files.items()}
    moved = deform({**{key: one.data for key, one in images.items()}, "seed": seed})
    for key, one in images.items():
        one.save_like(torch.as_tensor(moved[key]), outputs[key])


def find_files(folder: Path, case: str, channels: list[str], ending: str) -> dict[str, Path]:
    """The files of a case by key: its channels in order, and ``label``."""
    files = {number: folder / "imagesTr" / f"{case}_{int(number):04d}{ending}" for number in channels}
    return files | {"label": folder / "labelsTr" / f"{case}{ending}"}


def make_folds(cases: list[str], copies: int, splits: Path | None) -> list[dict[str, list[str]]]:
    """Folds in which the copies of a case go with it and only originals are validated."""
    if splits is not None:
        folds = json.loads(splits.read_text(encoding="utf-8"))
    else:
        order = np.random.default_rng(12345).permutation(cases).tolist()
        held_out = [sorted(order[fold::FOLDS]) for fold in range(min(FOLDS, len(order)))]
        folds = [{"train": sorted(set(cases) - set(val)), "val": val} for val in held_out]
    return [
        {
            "train": [name for case in fold["train"] for name in (case, *names_of_copies(case, copies))],
            "val": fold["val"],
        }
        for fold in folds
    ]


def names_of_copies(case: str, copies: int) -> list[str]:
    """What the deformed copies of a case are called."""
    return [f"{case}_drdm{number}" for number in range(copies)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="raw data set, such as nnUNet_raw/Dataset004_Hippocampus")
    parser.add_argument("out", type=Path, help="new raw data set, such as nnUNet_raw/Dataset504_HippocampusDRDM")
    parser.add_argument("--copies", type=int, default=3, help="deformed copies of each training case")
    parser.add_argument("--level", type=float, nargs=2, default=(0.3, 0.8), help="range of the deformation level")
    parser.add_argument("--channel", type=int, default=0, help="the channel that the network sees, counted from 0")
    parser.add_argument("--splits", type=Path, help="splits_final.json of the source, to keep its folds")
    parser.add_argument("--network", default="auto")
    parser.add_argument("--slice-axis", type=int, help="with a 2D network: the axis across which volumes are sliced")
    args = parser.parse_args(arguments)
    description = read_description(args.source)
    ending, channels = description["file_ending"], sorted(description["channel_names"], key=int)
    if args.out.exists():
        raise SystemExit(f"{args.out} exists; choose a new folder.")
    cases = sorted(path.name.removesuffix(ending) for path in (args.source / "labelsTr").glob(f"*{ending}"))
    missing = [
        path
        for case in cases
        for path in find_files(args.source, case, channels, ending).values()
        if not path.is_file()
    ]
    if missing:
        raise SystemExit(
            f"{missing[0]} is missing, with {len(missing) - 1} more. Each channel must be a file of its own; colour "
            "images, which hold several, cannot be used here."
        )
    keys = [*channels, "label"]
    deform = RandDRDMDeformd(
        keys,
        mode=["bilinear"] * len(channels) + ["nearest"],
        prob=1.0,
        deformation_level=args.level,
        image_key=channels[args.channel],
        seed_key="seed",
        network=args.network,
        slice_axis=args.slice_axis,
    )
    for name in ("imagesTr", "labelsTr"):
        (args.out / name).mkdir(parents=True)
    for case in tqdm(cases, desc="deforming"):
        files = find_files(args.source, case, channels, ending)
        for key, path in find_files(args.out, case, channels, ending).items():
            shutil.copy(files[key], path)
        for copy in names_of_copies(case, args.copies):
            deform_case(files, find_files(args.out, copy, channels, ending), copy, deform)
    folds = make_folds(cases, args.copies, args.splits)
    (args.out / "splits_final.json").write_text(json.dumps(folds, indent=4), encoding="utf-8")
    description |= {"numTraining": len(cases) * (1 + args.copies)}
    (args.out / "dataset.json").write_text(json.dumps(description, indent=4), encoding="utf-8")


if __name__ == "__main__":
    main()
