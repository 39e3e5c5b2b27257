from __future__ import annotations

import dataclasses
import json
from importlib.resources import files

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import map_coordinates

from monai_drdm.cli import main
from monai_drdm.drawn_chest import draw_chest, SPACING_MM, STRUCTURES
from monai_drdm.io import load_ddf
from monai_drdm.networks import save_network, VelocityUNet

FILES = ["field.nii.gz", "figure.png", "image.nii.gz", "label.nii.gz", "record.json", "recovery.gif"]
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
    assert run("--out", out) == 0
    assert not (tmp_path / "empty").exists()
    assert sorted(p.name for p in out.iterdir()) == FILES
    said = capsys.readouterr().out.splitlines()
    assert {str(out / name) for name in FILES} <= set(said)
    assert said[-1] == f"Open {out / 'figure.png'}"
    drawn, drawn_label = (one[0].numpy() for one in draw_chest())
    image, label = (nib.load(out / f"{key}.nii.gz") for key in ("image", "label"))
    assert nib.aff2axcodes(image.affine)[:2] == ("L", "A")
    np.testing.assert_allclose(image.header.get_zooms()[:2], SPACING_MM)
    moved, moved_label = image.get_fdata().squeeze(), label.get_fdata().squeeze()
    assert moved.shape == moved_label.shape == drawn.shape
    assert np.abs(moved - drawn).mean() > 0.02
    # the label goes where the image goes: every structure keeps its intensity
    for value in STRUCTURES:
        assert moved[moved_label == value].mean() == pytest.approx(drawn[drawn_label == value].mean(), abs=0.04)
    field = load_ddf(out / "field.nii.gz").as_tensor()
    at = np.stack(np.meshgrid(*map(np.arange, drawn.shape), indexing="ij")) + field.numpy()
    np.testing.assert_allclose(moved, map_coordinates(drawn, at, order=1, mode="nearest"), atol=1e-3)
    record = json.loads((out / "record.json").read_text())
    assert (record["network"], record["deformation_level"]) == ("anatomy-2d", 0.4)
    with Image.open(out / "figure.png") as figure, Image.open(out / "recovery.gif") as animation:
        assert figure.size[0] > 1000
        assert animation.n_frames > record["steps"]


def test_a_volume_is_moved_in_plane(network_file, tmp_path):
    """By a 2D network: the stack of its thick slices, and no slice to another place."""
    scan = str(files("nibabel") / "tests" / "data" / "example4d.nii.gz")
    assert run("--network", network_file, "--image", scan, "--out", tmp_path / "out") == 0
    source = nib.load(scan)
    for name in ("image.nii.gz", "label.nii.gz", "field.nii.gz"):
        np.testing.assert_allclose(nib.load(tmp_path / "out" / name).affine, source.affine, atol=1e-5)
    image, label = (nib.load(tmp_path / "out" / f"{key}.nii.gz").get_fdata() for key in ("image", "label"))
    assert image.shape == label.shape == source.shape[:3]
    assert set(np.unique(label)) == {0, 1}
    assert image[label == 1].mean() > 3 * image[label == 0].mean()  # still what is bright
    field = nib.load(tmp_path / "out" / "field.nii.gz")
    voxels = field.get_fdata()[:, :, :, 0] @ np.linalg.inv(source.affine[:3, :3]).T
    assert np.abs(voxels[..., 2]).max() < 1e-3
    assert np.abs(voxels[..., :2]).max() > 1


def test_a_volume_is_deformed_in_3d_unless_another_network_is_named(tmp_path):
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in (26, 30, 22)), indexing="ij")
    volume = np.exp(-3 * sum(axis**2 for axis in axes)).astype(np.float32)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "scan.nii.gz")
    assert run("--image", tmp_path / "scan.nii.gz", "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "record.json").read_text())["network"] == "anatomy-3d"
    field = load_ddf(tmp_path / "out" / "field.nii.gz").as_tensor()
    assert field.shape == (3, *volume.shape)
    assert all(float(component.abs().mean()) > 0.05 for component in field)


def test_a_label_alone_is_refused(network_file, own, tmp_path, capsys):
    assert run("--network", network_file, *own[2:], "--out", tmp_path / "out") == 1
    assert "needs --image" in capsys.readouterr().err


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
