"""Make the scans that ``registration-3d`` was trained on: two pools, and copies of their scans by ``anatomy-3d``.

    python tools/registration_data.py --work FOLDER
    monai-drdm register --images FOLDER/registration-3d.json --out run --max-minutes 120 --set network=pyramid ...

IXI brains at 4 mm and hippocampi, a group each; docs/registration.md has all settings. The last scans of each group
validate and have no copies. Copies that are there are not drawn again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from monai_drdm.cli import main as monai_drdm

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "registration"))
from synthetic_pairs import prepare

COPIES = {"ixi": ("0.4", "0.8", "--draws", "2"), "hippocampus": ("0.8", "--draws", "1")}
"""Levels, and how many copies of each scan at each of them."""
HELD = {"ixi": 6, "hippocampus": 14}
"""How many scans at the end of a group validate."""


def entries(name: str, work: Path) -> list[dict[str, str]]:
    """A group of the datalist: copies, then scans, those that validate last."""
    prepare(name, work)
    scans = sorted((work / name / "pool" / "images").iterdir())
    copies = work / "copies" / name
    words = ["augment", "--images", str(scans[0].parent), "--out", str(copies), "--levels", *COPIES[name]]
    if code := monai_drdm(words):
        raise SystemExit(code)
    held = tuple(f"{scan.name.partition('.')[0]}_" for scan in scans[-HELD[name] :])
    drawn = [copy for copy in sorted((copies / "images").iterdir()) if not copy.name.startswith(held)]
    return [{"image": str(path.absolute()), "group": name} for path in (*drawn, *scans)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for scans, copies and the datalist")
    work = parser.parse_args().work
    listed = [entry for name in COPIES for entry in entries(name, work)]
    path = work / "registration-3d.json"
    path.write_text(json.dumps({"training": listed}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(listed)} images in {path}")


if __name__ == "__main__":
    main()
