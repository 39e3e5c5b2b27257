from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from monai_drdm.networks import save_network, VelocityUNet

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
    network = VelocityUNet(2, channels=(4, 6))
    network.card = dataclasses.replace(network.card, working_size=33, steps=1)
    save_network(network, tmp_path / "n.safetensors")
    folders = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
    options = ["--classes", "2", "--size", "32", "--prob", "1", "--network", str(tmp_path / "n.safetensors")]
    first = example.main([*folders, *options, "--epochs", "1"])
    last = example.main([*folders, *options, "--epochs", "8"])
    assert last < 0.7 * first  # a bright disc is learned under augmentation


def test_few_shot_segmentation_learns_with_and_without(tmp_path, monkeypatch):
    """The short form: both networks get better, on drawn hearts and on volumes of one's own."""
    example = load_example("few_shot_segmentation")
    monkeypatch.setitem(example.ARMS, "affine + DRDM", 0.1)  # deform seldom, which is what takes its time
    short = ["--size", "32", "--scans", "7", "--steps", "20", "--every", "10"]
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


def run_notebook(name, monkeypatch, settings, pictures=4):
    """All cells of a notebook, with other settings than its first cell's; it must have been run as it is."""
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(cell["execution_count"] for cell in cells)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
    assert all(output["output_type"] != "error" for output in outputs)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    names: dict = {}
    for cell in cells:
        source = "".join(cell["source"])
        exec(compile(settings if source.startswith("DATA = None") else source, "notebook", "exec"), names)
    return names


def test_few_shot_notebook_runs_and_was_run(monkeypatch):
    """All cells at a small size; the committed outputs hold their pictures and no error."""
    names = run_notebook("few_shot_segmentation", monkeypatch, "DATA, STEPS, SIZE, SCANS = None, 4, 24, 7")
    assert set(names["trained"]) == {"affine", "affine + DRDM"}
    assert all(run["dice"][-1] > 0.1 for run in names["trained"].values())


def test_registration_learns_from_pairs(tmp_path, monkeypatch):
    """The short form: scans that were not seen come nearer to each other, on drawn hearts and volumes of one's own."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = load_example("registration")
    short = ["--judged", "3", "--pairs", "1"]
    result = example.main(["--out", str(tmp_path / "drawn"), *short, "--size", "32", "--scans", "6", "--steps", "30"])
    assert result["difference"] < result["difference_before"]
    assert result["folds_percent"] < 0.1
    assert json.loads((tmp_path / "drawn" / "result.json").read_text(encoding="utf-8")) == result
    for picture in ("registered.png", "separability.png", "pairs/overview.png"):
        assert np.asarray(Image.open(tmp_path / "drawn" / picture)).std() > 1
    learned = {path.name for path in (tmp_path / "drawn" / "learned" / "images").iterdir()}
    judged = {path.name for path in (tmp_path / "drawn" / "judged" / "images").iterdir()}
    assert (len(learned), len(judged), learned & judged) == (3, 3, set())
    with pytest.raises(SystemExit, match="not empty"):
        example.main(["--out", str(tmp_path / "drawn")])
    (tmp_path / "own" / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(4):
        volume = generator.random((16, 18, 20)).astype(np.float32)
        nib.save(
            nib.Nifti1Image(volume, np.diag([6.0, 1.0, 1.0, 1.0])), tmp_path / "own" / "images" / f"{number}.nii.gz"
        )
    options = ["--judged", "2", "--pairs", "1", "--steps", "2"]
    own = example.main(["--out", str(tmp_path / "run"), "--data", str(tmp_path / "own"), *options])
    assert "dice" not in own  # no labels, no overlap
    with pytest.raises(SystemExit, match="need 12 scans or more"):
        example.main(["--out", str(tmp_path / "few"), "--data", str(tmp_path / "own")])


def test_registration_notebook_runs_and_was_run(monkeypatch):
    settings = "DATA, JUDGED, PAIRS, STEPS, SCANS, SIZE = None, 3, 1, 6, 5, 32"
    names = run_notebook("registration", monkeypatch, settings)
    assert len(names["found"]) == 3
    assert all(one["score"].fold_fraction < 1e-3 for one in names["found"])
