"""Write CT and MR scans of limbs with labels, for training and for the benchmarks.

Source: arms, legs and hips of people with a soft-tissue sarcoma (Vallières et al., Physics in Medicine and Biology
2015; The Cancer Imaging Archive, CC BY 3.0), cropped about the tumour for the Image Biomarker Standardisation
Initiative, in a clone of github.com/theibsi/data_sets.

    git clone https://github.com/theibsi/data_sets ibsi
    python tools/limb_data.py ibsi --out DATA/limbs        # DATA: the folder that MONAI_DRDM_DATA names

Writes ``ct`` and ``mr`` with ``images`` and ``labels`` each, on the grids of the source (about 1 x 1 x 3.3 mm). CT is
cut to -200 to 400 HU, as networks are commonly given it. Labels: 1 bone (of CT only, by threshold, marrow filled in), 2
tumour, as outlined by the source. Bone within two voxels of the border of a slice is not labelled. Scans whose
files are larger than 4 MB are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
from clones import commit_of
from scipy import ndimage
from tqdm import tqdm

COMMIT = "6da96021bc91faf4c0cb7fd7fa56a4225d2064a8"
LEFT_OUT = {
    "CT": {7, 9, 11, 13, 16, 17, 20, 21, 27, 30, 37, 39, 45, 46, 49},
    "MR_T1": {9, 20},
}
"""Patients whose files are larger than 4 MB."""
PATIENTS = range(1, 52)
WINDOW = (-200, 400)
BONE, TUMOUR = 1, 2
BONE_HU = 250
SMALLEST_BONE = 300
"""Voxels, about 1 cm³."""


def bones(values: np.ndarray) -> np.ndarray:
    """Bones of a CT ``(X, Y, Z)`` in HU with their marrow; what is thin, such as the scanner's table, is left out."""
    parts, count = ndimage.label(values > BONE_HU)
    sizes = ndimage.sum_labels(parts > 0, parts, range(1, count + 1))
    large = np.isin(parts, 1 + np.flatnonzero(np.asarray(sizes) >= SMALLEST_BONE))
    filled = [ndimage.binary_fill_holes(ndimage.binary_closing(one)) for one in np.moveaxis(large, 2, 0)]
    return np.stack([ndimage.binary_opening(one, iterations=2) for one in filled], axis=2)


def convert(folder: Path, kind: str, out: Path) -> None:
    """Write one scan and its label."""
    image, mask = (nib.load(folder / f"{kind}_{part}.nii.gz") for part in ("image", "mask"))
    if image.shape != mask.shape or not np.allclose(image.affine, mask.affine, atol=0.01):
        raise SystemExit(f"{folder}: the mask does not lie on the grid of its image.")
    values = np.asarray(image.dataobj, dtype=np.float32)
    label = np.zeros(image.shape, dtype=np.uint8)
    if kind == "CT":
        label[bones(values)] = BONE
        values = values.clip(*WINDOW)
    label[np.asarray(mask.dataobj) > 0] = TUMOUR
    name = f"{folder.name}.nii.gz"
    nib.save(nib.Nifti1Image(values.round().astype(np.int16), image.affine), out / "images" / name)
    nib.save(nib.Nifti1Image(label, image.affine), out / "labels" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    options = parser.parse_args()
    commit_of(options.clone, [COMMIT])
    for kind, name in (("CT", "ct"), ("MR_T1", "mr")):
        for part in ("images", "labels"):
            (options.out / name / part).mkdir(parents=True)
        for number in tqdm([one for one in PATIENTS if one not in LEFT_OUT[kind]], desc=name):
            convert(options.clone / "ibsi_validation" / "nifti" / f"STS_{number:03d}", kind, options.out / name)


if __name__ == "__main__":
    main()
