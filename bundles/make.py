"""Assemble the MONAI bundles from this folder and the package.

    python bundles/make.py --out dist/bundles

A bundle is a folder: ``configs/`` and ``docs/`` come from here, ``LICENSE`` from the repository, versions and what is
known of a network from the package. ``models/model.pt`` holds the weights of a recovery network; the bundles that train
a segmenter have none. Their ``scripts/`` get ``trained.py``, and for few labels modules of ``examples/``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from monai_drdm import __version__, load_network
from monai_drdm.networks import NetworkCard

HERE = Path(__file__).parent
NETWORKS = ("anatomy-2d", "anatomy-3d")
SEGMENTERS: dict[str, tuple[str, ...]] = {
    "hippocampus_segmentation": (),
    "few_label_segmentation": ("mean_teacher.py", "scans.py"),
}
"""The bundles that train a segmenter, and which examples each of them needs."""
AXES = ("first", "second", "third")
SLICE_ROW = (
    "| `slice_axis` | null | lets this 2D network deform volumes: one field, drawn on the middle slice across this "
    "axis, moves all slices |\n"
)


def repository() -> str:
    """The address of the repository, which CITATION.cff holds."""
    found = re.search(r"^repository-code: (\S+)$", (HERE.parent / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert found is not None
    return found[1]


def software() -> dict[str, Any]:
    """Version of the bundle, and of what it was made with."""
    packages = ("monai-drdm", "nibabel", "pytorch-ignite", "tensorboard", "fire")
    return {
        "version": __version__,
        "changelog": {__version__: f"made from monai_drdm {__version__}"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in packages},
    }


def read_json(path: Path) -> dict[str, Any]:
    """A configuration of this folder."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a configuration as MONAI reads it."""
    path.write_text(json.dumps(values, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def start_bundle(source: Path, bundle: Path, words: dict[str, str]) -> None:
    """What every bundle has: its configurations and documents, with the words filled in, and the licence."""
    for folder in ("configs", "docs", "models"):
        (bundle / folder).mkdir(parents=True)
    for path in sorted((source / "docs").iterdir()):
        text = path.read_text(encoding="utf-8")
        for name, word in words.items():
            text = text.replace("{{" + name + "}}", word)
        (bundle / "docs" / path.name).write_text(text, encoding="utf-8")
    for path in sorted((source / "configs").iterdir()):
        shutil.copy(path, bundle / "configs")
    shutil.copy(HERE / "logging.conf", bundle / "configs")
    shutil.copy(HERE.parent / "LICENSE", bundle)
    metadata = bundle / "configs" / "metadata.json"
    values = read_json(metadata)
    write_json(metadata, {"schema": values.pop("schema"), **software(), **values})


def make_network_bundle(name: str, bundle: Path) -> None:
    """The bundle of a recovery network inside the package."""
    network = load_network(name)
    card = network.card
    words = {
        "name": name,
        "dims": str(card.spatial_dims),
        "steps": str(card.steps),
        "training_data": card.training_data,
        "licence": card.licence,
        "repository": repository(),
        "slice_row": SLICE_ROW if card.spatial_dims == 2 else "",
    }
    start_bundle(HERE / "recovery_network", bundle, words)
    torch.save(network.state_dict(), bundle / "models" / "model.pt")
    configs = bundle / "configs"
    inference = read_json(configs / "inference.json")
    inference["recovery"] |= {"spatial_dims": card.spatial_dims, "channels": list(card.channels)}
    write_json(configs / "inference.json", inference)
    write_json(configs / "metadata.json", network_metadata(read_json(configs / "metadata.json"), card))


def copy_scripts(source: Path, examples: tuple[str, ...], scripts: Path) -> None:
    """The Python code of a bundle that trains: its package's description, the shared checks, and some examples."""
    scripts.mkdir()
    for path in (source / "__init__.py", HERE / "trained.py", *(HERE.parent / "examples" / name for name in examples)):
        shutil.copy(path, scripts)


def network_metadata(values: dict[str, Any], card: NetworkCard) -> dict[str, Any]:
    """The metadata, with what the card of the network says."""
    values["task"] = values["task"].format(dims=card.spatial_dims)
    values |= {"data_source": card.training_data, "eval_metrics": dict(card.gates), "name": card.name}
    formats = values["network_data_format"]
    field = {str(axis): f"displacement along the {AXES[axis]} axis" for axis in range(card.spatial_dims)}
    formats["inputs"]["image"]["spatial_shape"] = ["*"] * card.spatial_dims
    formats["outputs"]["pred"] |= {
        "num_channels": card.spatial_dims,
        "spatial_shape": ["*"] * card.spatial_dims,
        "channel_def": field,
    }
    return values


def make_bundles(out: Path) -> list[Path]:
    """Assemble all bundles, and return their folders.

    Raises:
        FileExistsError: a bundle is there already. It may hold what was trained with it, so nothing is written.
    """
    names = [*(name.replace("-", "_") for name in NETWORKS), *SEGMENTERS]
    bundles = [out / name for name in names]
    for bundle in bundles:
        if bundle.exists():
            raise FileExistsError(f"{bundle} exists. Move it away, or choose another folder with --out.")
    for name, bundle in zip(NETWORKS, bundles):
        make_network_bundle(name, bundle)
    for name, examples in SEGMENTERS.items():
        start_bundle(HERE / name, out / name, {"repository": repository()})
        copy_scripts(HERE / name / "scripts", examples, out / name / "scripts")
    return bundles


def main(arguments: list[str] | None = None) -> None:
    """Assemble all bundles and say where they are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "dist" / "bundles", help="folder of the bundles")
    try:
        made = make_bundles(parser.parse_args(arguments).out)
    except FileExistsError as error:
        raise SystemExit(str(error)) from None
    print(*made, sep="\n")


if __name__ == "__main__":
    main()
