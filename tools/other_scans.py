"""Write scans of kinds that the networks were never trained on, with labels, for ``other_kinds.py``.

Source: scans of the neck of one person, with spinal cords, in a clone of
github.com/spinalcordtoolbox/sct_testing_data (NeuroPoly, MIT; the repository holds only data).

    git clone https://github.com/spinalcordtoolbox/sct_testing_data
    python tools/other_scans.py sct_testing_data --out DATA/other    # DATA: the folder that MONAI_DRDM_DATA names

Images and labels keep their grids. The label is 1 in the cord, but 2 in its grey matter where that was outlined. The
commit is checked, so everybody has the same scans; the commit also tells which repository a clone is of.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
from clones import commit_of

SOURCES = {
    "af4c7e8783c9dcf8bcfc6c53b190af46260bb875": {
        "cord_t1": ("t1/t1w", {1: "t1/t1w_seg-manual"}),
        "cord_t2": ("t2/t2", {1: "t2/t2_seg-manual"}),
        "cord_t2star": ("t2s/t2s", {1: "t2s/t2s_seg", 2: "t2s/t2s_gmseg_manual"}),
        "neck_t2star": ("t2s/t2s_uncropped", {2: "t2s/t2s_uncropped_gmseg_manual"}),
    },
}
"""For each commit and name of a scan: the image and its label maps, the later ones laid over the earlier."""


def merged(clone: Path, parts: dict[int, str], image: nib.Nifti1Image) -> nib.Nifti1Image:
    """One label map of several, on the grid of the image."""
    label = np.zeros(image.shape, dtype=np.uint8)
    for value, name in parts.items():
        part = nib.load(clone / f"{name}.nii.gz")
        if part.shape != image.shape or not np.allclose(part.affine, image.affine, atol=0.01):
            raise SystemExit(f"{name} does not lie on the grid of its image.")
        label[np.asarray(part.dataobj) > 0] = value
    return nib.Nifti1Image(label, image.affine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    options = parser.parse_args()
    chosen = [(clone, SOURCES[commit_of(clone, SOURCES)]) for clone in options.clones]
    for name in ("images", "labels"):
        (options.out / name).mkdir(parents=True)
    for clone, scans in chosen:
        for name, (image, parts) in scans.items():
            source = clone / f"{image}.nii.gz"
            shutil.copyfile(source, options.out / "images" / f"{name}.nii.gz")
            nib.save(merged(clone, parts, nib.load(source)), options.out / "labels" / f"{name}.nii.gz")
    print(f"{sum(len(scans) for _, scans in chosen)} scans in {options.out}")


if __name__ == "__main__":
    main()
