from __future__ import annotations

import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest

from monai_drdm.cli import main
from monai_drdm.networks import save_network, VelocityUNet

FILES = ["field.nii.gz", "figure.png", "image.nii.gz", "label.nii.gz", "record.json"]
AFFINE = np.diag([2.1, 0.7, 1.0, 1.0])


@pytest.fixture
def network_file(tmp_path):
    """A small network that leaves fields as they are."""
    network = VelocityUNet(2, channels=(4, 6))
    network.card = dataclasses.replace(network.card, name="untrained", working_size=33, steps=1)
    path = tmp_path / "untrained.safetensors"
    save_network(network, path)
    return path


@pytest.fixture
def own(tmp_path):
    """The arguments of a small image and its label."""
    axes = np.meshgrid(np.linspace(-1, 1, 50), np.linspace(-1, 1, 35), indexing="ij")
    image = np.exp(-3 * (axes[0] ** 2 + axes[1] ** 2)).astype(np.float32)
    label = (image > 0.5).astype(np.int16) * 7
    for key, values in (("image", image), ("label", label)):
        nib.save(nib.Nifti1Image(values[:, :, None], AFFINE), tmp_path / f"{key}.nii.gz")
    return "--image", tmp_path / "image.nii.gz", "--label", tmp_path / "label.nii.gz"


def run(*arguments):
    return main(["demo", *map(str, arguments)])


def test_default_scan_and_network_need_no_download(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MONAI_DRDM_WEIGHTS", str(tmp_path / "empty"))
    out = tmp_path / "out"
    assert run("--out", out, "--level", 0.4) == 0
    assert not (tmp_path / "empty").exists()
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert capsys.readouterr().out.count("\n") == len(FILES)
    source = nib.load(_nibabel_scan())
    for name in ("image.nii.gz", "label.nii.gz", "field.nii.gz"):
        np.testing.assert_allclose(nib.load(out / name).affine, source.affine, atol=1e-5)
    image, label = (nib.load(out / f"{key}.nii.gz").get_fdata() for key in ("image", "label"))
    assert image.shape == label.shape == source.shape[:3]
    assert set(np.unique(label)) == {0, 1}
    original = source.get_fdata()[..., 0]
    assert np.abs(image - original).mean() > 1
    # the label still is the bright foreground of the deformed scan
    assert image[label == 1].mean() > 3 * image[label == 0].mean()
    field = nib.load(out / "field.nii.gz")
    assert field.shape == (*source.shape[:3], 1, 3)
    # an in-plane field: in voxels, nothing moves across slices
    voxels = field.get_fdata()[:, :, :, 0] @ np.linalg.inv(source.affine[:3, :3]).T
    assert np.abs(voxels[..., 2]).max() < 1e-3
    assert np.abs(voxels[..., :2]).max() > 1
    record = json.loads((out / "record.json").read_text())
    assert (record["network"], record["deformation_level"]) == ("anatomy-2d", 0.4)
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_same_seed_same_files_and_nothing_overwritten(network_file, own, tmp_path, capsys):
    for name in ("a", "b"):
        assert run("--network", network_file, *own, "--out", tmp_path / name, "--seed", 3) == 0
    first, second = (nib.load(tmp_path / name / "image.nii.gz") for name in ("a", "b"))
    np.testing.assert_array_equal(first.get_fdata(), second.get_fdata())
    label = nib.load(tmp_path / "a" / "label.nii.gz")
    assert set(np.unique(label.get_fdata())) == {0, 7}
    assert label.get_data_dtype() == np.int16
    np.testing.assert_allclose(label.affine, AFFINE)
    assert run("--network", network_file, *own, "--out", tmp_path / "a") == 1
    assert "not an empty folder" in capsys.readouterr().err


def test_all_files_or_none(network_file, tmp_path, capsys):
    """Labels that cannot be written leave nothing behind, so that the command can be given again."""
    for name, values in (("image", np.random.RandomState(0).rand(20, 24)), ("label", np.full((20, 24), 2**40))):
        nib.save(nib.Nifti1Image(values, np.eye(4), dtype=values.dtype), tmp_path / f"{name}.nii")
    scans = ["--image", str(tmp_path / "image.nii"), "--label", str(tmp_path / "label.nii")]
    assert run("--network", str(network_file), *scans, "--out", str(tmp_path / "out")) == 1
    assert "beyond 32 bits" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["image.nii", "label.nii", network_file.name])


def test_missing_file_is_explained(network_file, tmp_path, capsys):
    assert run("--network", network_file, "--image", tmp_path / "no.nii.gz", "--out", tmp_path / "out") == 1
    assert "no.nii.gz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unreadable_file_is_explained(network_file, tmp_path, capsys):
    (tmp_path / "junk.nii").write_bytes(b"0123456789")
    assert run("--network", network_file, "--image", tmp_path / "junk.nii", "--out", tmp_path / "out") == 1
    assert "junk.nii cannot be read" in capsys.readouterr().err


def test_demo_with_published_weights(published_weights, own, tmp_path):
    options = ("--network", "zheng2026-cmr-2d", "--level", 0.05)
    assert run("--out", tmp_path / "out", *own, *options) == 0
    assert json.loads((tmp_path / "out" / "record.json").read_text())["network"] == "zheng2026-cmr-2d"


def _nibabel_scan():
    from importlib.resources import files

    return str(files("nibabel") / "tests" / "data" / "example4d.nii.gz")
