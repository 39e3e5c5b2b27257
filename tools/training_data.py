"""List the scans that networks are trained on: the pools of the open data sets.

    python tools/training_data.py anatomy-2d --out anatomy-2d.json    # IXI, hippocampus, chest X-rays
    python tools/training_data.py anatomy-3d --out anatomy-3d.json    # IXI, hippocampus
    python tools/training_data.py wide-2d --out wide-2d.json          # these, limbs and nuclei
    python tools/training_data.py wide-3d --out wide-3d.json          # these, and limbs
    python tools/training_data.py acdc --out acdc-slices              # ACDC patients 1-60, images only

The first four write MONAI datalists whose weights give every collection its share; the networks in the package were
trained on the first two. The last writes a folder of slices.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # the parts that all benchmarks share
from common.scans import data_folder

POOLS = {
    "ixi": ("ixi/images/*.nii.gz", slice(0, 26)),
    "hippocampus": ("hippocampus/images/*.nii.gz", slice(0, 140)),
    "cxr": ("cxr/images/*.png", slice(0, 40)),
    "limb-ct": ("limbs/ct/images/*.nii.gz", slice(0, 20)),
    "limb-mr": ("limbs/mr/images/*.nii.gz", slice(0, 28)),
    "nuclei": ("nuclei/images/*.png", slice(0, 500)),
}
SHARES = {
    "anatomy-2d": {"ixi": 0.5, "hippocampus": 0.2, "cxr": 0.3},
    "anatomy-3d": {"ixi": 0.6, "hippocampus": 0.4},
    "wide-2d": {"ixi": 0.3, "hippocampus": 0.12, "cxr": 0.18, "limb-ct": 0.15, "limb-mr": 0.15, "nuclei": 0.1},
    "wide-3d": {"ixi": 0.4, "hippocampus": 0.3, "limb-ct": 0.15, "limb-mr": 0.15},
}
ACDC_POOL = range(1, 61)


def datalist(name: str) -> dict[str, list[dict[str, object]]]:
    entries: list[dict[str, object]] = []
    for collection, share in SHARES[name].items():
        pattern, pool = POOLS[collection]
        paths = sorted(data_folder().glob(pattern))[pool]
        if len(paths) != pool.stop - pool.start:
            raise SystemExit(f"{data_folder() / pattern}: {pool.stop} scans are needed; see benchmarks/README.md.")
        entries += [{"image": str(path.resolve()), "weight": share / len(paths)} for path in paths]
    return {"training": entries}


def write_acdc(folder: Path) -> int:
    archive = np.load(data_folder() / "acdc" / "acdc2d_160.npz")
    patients, images = archive["patient"], archive["image"]  # each is unpacked anew whenever it is asked for
    folder.mkdir(parents=True)
    chosen = np.flatnonzero(np.isin(patients, list(ACDC_POOL)))
    for index in chosen:
        np.save(folder / f"patient{patients[index]:03d}_{index:04d}.npy", images[index])
    return len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=(*SHARES, "acdc"))
    parser.add_argument("--out", type=Path, required=True, help="new file or folder")
    options = parser.parse_args()
    if options.out.exists():
        raise SystemExit(f"{options.out} exists; choose another.")
    if options.name == "acdc":
        print(f"{write_acdc(options.out)} slices in {options.out}")
        return
    entries = datalist(options.name)
    options.out.write_text(json.dumps(entries, indent=1) + "\n")
    print(f"{len(entries['training'])} scans in {options.out}")


if __name__ == "__main__":
    main()
