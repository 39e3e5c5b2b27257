"""The examples for neighbours; those whose packages are not here are skipped."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_drdm.networks import save_network, VelocityUNet

EXAMPLES = Path(__file__).parents[1] / "examples"
AFFINE = np.array([[0, -1.5, 0, 10], [1.5, 0, 0, -20], [0, 0, 2, 5], [0, 0, 0, 1.0]])


@pytest.fixture
def recipe(monkeypatch):
    """Factory: imports an example by the name of its neighbour."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda name: importlib.import_module(f"recipe_{name}")


@pytest.fixture
def network(tmp_path):
    """Factory: the path of a small network, whose random fields are hardly recovered."""

    def build(dims):
        path = tmp_path / f"n{dims}.safetensors"
        if not path.exists():
            found = VelocityUNet(dims, channels=(4, 6))
            found.card = dataclasses.replace(found.card, working_size=17, steps=1)
            save_network(found, path)
        return str(path)

    return build


def disc(shape, shift=0.0):
    """A ball of ones."""
    axes = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    return (np.linalg.norm(axes + shift, axis=0) < 0.7).astype(np.uint8)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)


def test_pytorch_learns_from_deformed_batches(recipe, network):
    losses = recipe("pytorch").main(
        ["--steps", "30", "--scans", "8", "--size", "32", "--prob", "0.3", "--network", network(2), "--device", "cpu"]
    )
    assert len(losses) == 30
    assert losses[-1] < 0.7 * losses[0]


def test_lightning_deforms_batches_for_training_only(recipe, network, tmp_path):
    pytest.importorskip("lightning", reason="PyTorch Lightning is not installed")
    lightning = recipe("lightning")
    options = {"default_root_dir": tmp_path, "accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    settings = ["--scans", "8", "--size", "32", "--prob", "1", "--network", network(2)]
    first = lightning.main([*settings, "--epochs", "1"], **options)
    assert lightning.main([*settings, "--epochs", "8"], **options) < first
    module = lightning.Segmenter(1.0, network(2))
    module._trainer = type("Stage", (), {"training": False})()
    batch = {key: torch.rand(1, 1, 24, 24) for key in ("image", "label")}
    assert module.on_after_batch_transfer(batch, 0) is batch
    module._trainer.training = True
    assert not torch.equal(module.on_after_batch_transfer(batch, 0)["image"], batch["image"])


@pytest.fixture
def raw_data(tmp_path):
    """A raw data set of two channels; the second is a multiple of the first, and both show the label."""
    folder = tmp_path / "Dataset001_Disc"
    for number in range(6):
        label = disc((12, 16, 10), 0.02 * number)
        write(folder / "labelsTr" / f"disc_{number}.nii.gz", label)
        for channel, scale in enumerate((100, 1000)):
            write(folder / "imagesTr" / f"disc_{number}_{channel:04d}.nii.gz", (scale * label.astype(np.int16)))
    description = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "disc": 1}}
    description |= {"numTraining": 6, "file_ending": ".nii.gz", "name": "Disc"}
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


def test_nnunet_gets_a_raw_data_set_with_folds_that_keep_copies_together(recipe, network, raw_data, tmp_path):
    out = tmp_path / "Dataset501_DiscDRDM"
    nnunet = recipe("nnunet")
    nnunet.main([str(raw_data), str(out), "--copies", "2", "--network", network(3), "--channel", "1"])
    description = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    assert description["numTraining"] == 18 == len(list((out / "labelsTr").iterdir()))
    assert len(list((out / "imagesTr").iterdir())) == 36
    for case in ("disc_0_drdm0", "disc_0_drdm1", "disc_5_drdm0"):
        label, t1, t2 = (
            nib.load(out / path)
            for path in (f"labelsTr/{case}.nii.gz", f"imagesTr/{case}_0000.nii.gz", f"imagesTr/{case}_0001.nii.gz")
        )
        original = nib.load(raw_data / "labelsTr" / f"{case[:6]}.nii.gz")
        np.testing.assert_array_equal(label.affine, original.affine)
        moved, first, second = (np.asarray(one.dataobj).astype(float) for one in (label, t1, t2))
        assert t1.get_data_dtype() == np.int16
        assert 0.005 < (moved != np.asarray(original.dataobj)).mean() < 0.6
        assert set(np.unique(moved)) == {0, 1}
        assert abs(10 * first - second).max() <= 5.5  # one field for both channels; each is rounded
        assert ((first > 50) != moved).mean() < 0.02
    originals = {f"disc_{number}" for number in range(6)}
    folds = json.loads((out / "splits_final.json").read_text(encoding="utf-8"))
    assert sorted(name for fold in folds for name in fold["val"]) == sorted(originals)
    for fold in folds:
        sources = {name.split("_drdm")[0] for name in fold["train"]}
        assert sources == originals - set(fold["val"])
        assert len(fold["train"]) == 3 * len(sources)
    with pytest.raises(SystemExit, match="exists"):
        nnunet.main([str(raw_data), str(out)])
    (raw_data / "imagesTr" / "disc_2_0001.nii.gz").unlink()
    with pytest.raises(SystemExit, match=r"disc_2_0001.nii.gz is missing, with 0 more\. Each channel"):
        nnunet.main([str(raw_data), str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
    (raw_data / "dataset.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="file_ending"):
        nnunet.main([str(raw_data), str(tmp_path / "other")])


def test_nnunet_itself_finds_the_raw_data_set_whole(recipe, network, raw_data, tmp_path):
    check = pytest.importorskip(
        "nnunetv2.experiment_planning.verify_dataset_integrity", reason="nnU-Net is not installed"
    )
    out = tmp_path / "Dataset501_DiscDRDM"
    recipe("nnunet").main([str(raw_data), str(out), "--copies", "1", "--network", network(3)])
    check.verify_dataset_integrity(str(out), num_processes=1)
    (out / "imagesTr" / "disc_3_drdm0_0001.nii.gz").unlink()
    with pytest.raises((RuntimeError, AssertionError, FileNotFoundError)):
        check.verify_dataset_integrity(str(out), num_processes=1)


@pytest.mark.parametrize("shape", [(12, 16, 10), (20, 24, 1)])
def test_torchio_subjects_are_moved_and_replayed_from_their_history(recipe, network, tmp_path, shape):
    tio = pytest.importorskip("torchio", reason="TorchIO is not installed")
    weights = network(2 if shape[-1] == 1 else 3)
    label = disc(shape[:2])[..., None] if shape[-1] == 1 else disc(shape)
    for name, array in (("image", (100.0 * label).astype(np.float32)), ("label", label)):
        write(tmp_path / f"{name}.nii.gz", array)
    files = [str(tmp_path / f"{name}.nii.gz") for name in ("image", "label")]
    moved = recipe("torchio").main([*files, "--out", str(tmp_path / "out"), "--network", weights])
    canonical = tio.ToCanonical()(tio.Subject(image=tio.ScalarImage(files[0]), label=tio.LabelMap(files[1])))
    assert moved.image.shape == canonical.image.shape
    np.testing.assert_allclose(moved.image.affine, canonical.image.affine)
    assert 0.005 < (moved.label.data != canonical.label.data).float().mean() < 0.6
    assert ((moved.image.data > 50) != moved.label.data.bool()).float().mean() < 0.02
    again = moved.get_composed_history()(tio.Subject(image=tio.ScalarImage(files[0]), label=tio.LabelMap(files[1])))
    assert torch.equal(again.image.data, moved.image.data)
    saved = nib.load(tmp_path / "out" / "label.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj).squeeze(), moved.label.data.numpy().squeeze())
