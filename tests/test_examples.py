from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from monai_drdm.networks import RecResACNet, save_network

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_segmentation_pipeline_trains(tmp_path):
    example = load_example("segmentation_pipeline")
    for key in ("images", "labels"):
        (tmp_path / key).mkdir()
    axes = np.meshgrid(np.linspace(-1, 1, 40), np.linspace(-1, 1, 36), np.linspace(-1, 1, 3), indexing="ij")
    disc = axes[0] ** 2 + axes[1] ** 2 < 0.3
    for case in "ab":
        nib.save(nib.Nifti1Image(disc * 100.0, np.eye(4)), tmp_path / "images" / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(disc.astype(np.uint8), np.eye(4)), tmp_path / "labels" / f"{case}.nii.gz")
    network = RecResACNet(2)
    torch.nn.init.zeros_(network.conv_out.weight)
    torch.nn.init.zeros_(network.conv_out.bias)
    network.card = dataclasses.replace(network.card, working_size=32, steps=1)
    save_network(network, tmp_path / "n.safetensors")
    folders = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
    options = ["--classes", "2", "--size", "32", "--prob", "1", "--network", str(tmp_path / "n.safetensors")]
    first = example.main([*folders, *options, "--epochs", "1"])
    last = example.main([*folders, *options, "--epochs", "12"])
    assert last < 0.7 * first  # a bright disc is learned under augmentation


def test_few_shot_segmentation_learns_with_and_without(tmp_path):
    """The short form: both networks get better, on drawn hearts and on volumes of one's own."""
    example = load_example("few_shot_segmentation")
    short = ["--size", "32", "--scans", "7", "--steps", "40", "--every", "10"]
    result = example.main(["--out", str(tmp_path / "drawn"), *short])
    assert list(result) == ["affine", "affine + DRDM"]
    assert min(result.values()) > 0.3
    assert json.loads((tmp_path / "drawn" / "result.json").read_text(encoding="utf-8")) == result
    for picture in ("curves.png", "overlays.png"):
        assert np.asarray(Image.open(tmp_path / "drawn" / picture)).std() > 1
    with pytest.raises(SystemExit, match="not empty"):
        example.main(["--out", str(tmp_path / "drawn"), *short])
    generator = np.random.default_rng(1)
    for number in range(6):
        slices = [example.draw_heart(generator, 40) for _ in range(2)]
        for key, arrays in zip(("images", "labels"), zip(*slices)):
            (tmp_path / "own" / key).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(np.stack(arrays, -1), np.eye(4)), tmp_path / "own" / key / f"{number}.nii.gz")
    own = example.main(["--out", str(tmp_path / "run"), "--data", str(tmp_path / "own"), *short, "--steps", "2"])
    assert all(0 <= dice <= 1 for dice in own.values())
    assert len(list((tmp_path / "run" / "data" / "images").iterdir())) == 12


def test_few_shot_notebook_runs_and_was_run(monkeypatch):
    """All cells at a small size; the committed outputs hold their pictures and no error."""
    notebook = json.loads((EXAMPLES / "few_shot_segmentation.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(cell["execution_count"] for cell in cells)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert all(output["output_type"] != "error" for output in outputs)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    names: dict = {}
    for cell in cells:
        source = "".join(cell["source"])
        if source.startswith("DATA = None"):
            source = "DATA, STEPS, SIZE, SCANS = None, 20, 32, 7"
        exec(compile(source, "notebook", "exec"), names)
    assert set(names["trained"]) == {"affine", "affine + DRDM"}
    assert all(run["dice"][-1] > 0.1 for run in names["trained"].values())
