from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from monai_drdm.cli import main
from monai_drdm.io import load_ddf
from monai_drdm.registration import register_files, registration_card, RegistrationNetwork, save_registration
from monai_drdm.registration.networks import Structure


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Networks that move a little, the same everywhere, by their last bias."""
    folder = tmp_path_factory.mktemp("networks")
    for dims in (2, 3):
        network = RegistrationNetwork(Structure("voxelmorph", dims, 2, 1, True, 1, False))
        save_registration(network, folder / f"still-{dims}.safetensors")
        last = [one for one in network.modules() if isinstance(one, (torch.nn.Conv2d, torch.nn.Conv3d))][-1]
        with torch.no_grad():
            last.bias.copy_(torch.tensor([1.25, -0.75, 0.5][:dims]))
        save_registration(network, folder / f"{dims}.safetensors")
    return folder


def turned(angles, spacing, origin):
    """An affine with these turns about the axes, voxel sizes and place of the first voxel."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = (k for k in range(3) if k != axis)
        turn = np.eye(3)
        turn[a, a], turn[a, b], turn[b, a], turn[b, b] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = matrix @ turn
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix * spacing, origin
    return affine


def anatomy(shape, affine, shift=0.0):
    """A bright body with parts of different brightness, given in millimetres, so that any grid can show it."""
    index = np.stack([*np.indices(shape), np.ones(shape)], axis=-1)
    x, y, z = np.moveaxis(index @ affine[:3].T, -1, 0)
    body = np.exp(-((x - shift) ** 2 / 300 + y**2 / 220 + z**2 / 260))
    return 600 * body + 250 * np.exp(-((x - 5 - shift) ** 2 + (y + 4) ** 2 + z**2) / 30) - 100


FIXED = turned((0.1, -0.05, 0.2), (1.5, 2.0, 2.0), (-20, -18, -17))
MOVING = turned((0.0, 0.15, -0.1), (-2.0, 1.5, 2.5), (22, -19, -20))


@pytest.fixture
def volumes(tmp_path):
    """Two volumes on different, oblique grids, one of them flipped, and labels of the moving one."""
    moving, fixed = anatomy((22, 27, 17), MOVING, shift=3.0), anatomy((26, 19, 18), FIXED)
    files = {"moving": moving.astype(np.int16), "labels": (1000 * (moving > 200)).astype(np.uint16)}
    for name, values in files.items():
        nib.save(nib.Nifti1Image(values, MOVING), tmp_path / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(fixed.astype(np.float32), FIXED), tmp_path / "fixed.nii.gz")
    return tmp_path


def register(*words):
    return main(["register", *map(str, words)])


def by_itk(folder, out, name, interpolator, fill, field="field.nii.gz", suffix=".nii.gz"):
    """A file of the moving side as ITK resamples it by the written field, axes reversed."""
    field = SimpleITK.ReadImage(str(out / field), SimpleITK.sitkVectorFloat64)
    image = SimpleITK.ReadImage(str(folder / f"{name}{suffix}"))
    grid = SimpleITK.Image(field.GetSize(), SimpleITK.sitkUInt8)
    grid.CopyInformation(field)
    image = SimpleITK.Cast(image, SimpleITK.sitkFloat64)
    moved = SimpleITK.Resample(image, grid, SimpleITK.DisplacementFieldTransform(field), interpolator, fill)
    return SimpleITK.GetArrayFromImage(moved).T


@pytest.mark.parametrize("stages", [(), ("--affine", "--refine", 3, "--rounds", 2)], ids=["network", "all stages"])
def test_what_is_written_is_what_itk_makes_of_the_field(volumes, networks, stages, capsys):
    out = volumes / "out"
    files = volumes / "moving.nii.gz", volumes / "fixed.nii.gz"
    network = networks / ("still-3.safetensors" if stages else "3.safetensors")
    more = ("--labels", volumes / "labels.nii.gz", "--network", network, "--out", out)
    assert register(*files, *more, *stages) == 0
    said = capsys.readouterr().out.split()
    assert sorted(said) == sorted(str(path) for path in out.iterdir())
    warped, labels = nib.load(out / "warped.nii.gz"), nib.load(out / "labels.nii.gz")
    for file, dtype in ((warped, np.int16), (labels, np.uint16)):
        assert file.shape == (26, 19, 18)
        assert file.get_data_dtype() == dtype
        np.testing.assert_allclose(file.affine, FIXED, atol=1e-5)
    expected = by_itk(volumes, out, "moving", SimpleITK.sitkLinear, -1e6)
    seen = expected > -1e5
    assert seen.mean() > 0.6
    apart = np.abs(np.asarray(warped.dataobj).astype(float) - expected)[seen]
    assert apart.max() < 1.5  # rounding, and vectors in single precision
    marked = by_itk(volumes, out, "labels", SimpleITK.sitkNearestNeighbor, 0)
    assert set(np.unique(labels.dataobj)) == {0, 1000}
    assert (np.asarray(labels.dataobj) != marked)[seen].mean() < 2e-3
    record = json.loads((out / "record.json").read_text())
    assert record["settings"]["affine"] == bool(stages)
    numbers = record["statistics"]
    if stages:
        assert numbers["correlation"] > max(0.98, numbers["correlation_before"] + 0.01)
    else:  # the bias of the network is its velocity
        length = np.linalg.norm(np.array([1.25, -0.75, 0.5]) * [1.5, 2.0, 2.0])
        assert numbers["mean_displacement_mm"] == pytest.approx(length, rel=1e-3)
    assert record["network"]["path"].endswith("3.safetensors")
    assert numbers["fold_fraction"] == 0
    assert (out / "figure.png").stat().st_size > 20_000


def test_images_whose_headers_place_them_far_apart(volumes, networks):
    """Without a common place in the headers only the affine stage brings them together."""
    far = MOVING.copy()
    far[:3, 3] += (400, -300, 200)
    nib.save(nib.Nifti1Image(np.asarray(nib.load(volumes / "moving.nii.gz").dataobj), far), volumes / "far.nii.gz")
    files = volumes / "far.nii.gz", volumes / "fixed.nii.gz"
    assert register(*files, "--network", networks / "3.safetensors", "--out", volumes / "out", "--affine") == 0
    numbers = json.loads((volumes / "out" / "record.json").read_text())["statistics"]
    assert numbers["correlation"] > 0.9


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".png", ".nii"])
def test_flat_images_of_other_formats(tmp_path, networks, suffix):
    rng = np.random.default_rng(0)
    for name, shape in (("moving", (30, 36)), ("fixed", (33, 28))):
        values = gaussian_filter(rng.random(shape), 3)
        values = (255 * (values - values.min()) / np.ptp(values)).astype(np.uint8)
        path = str(tmp_path / f"{name}{suffix}")
        if suffix == ".png":
            Image.fromarray(values.T).save(path)
        elif suffix == ".nii":
            nib.save(nib.Nifti1Image(values[..., None], np.diag([2.0, 3.0, 1.0, 1.0])), path)
        else:
            image = SimpleITK.GetImageFromArray(values.T)
            image.SetSpacing((2.0, 3.0) if name == "fixed" else (2.5, 2.5))
            image.SetOrigin((4.0, -2.0))
            SimpleITK.WriteImage(image, path)
    files = tmp_path / f"moving{suffix}", tmp_path / f"fixed{suffix}"
    out = tmp_path / "out"
    assert register(*files, "--network", networks / "2.safetensors", "--out", out) == 0
    assert load_ddf(out / "field.mha").shape == (2, 33, 28)
    warped = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(out / f"warped{suffix}"))).T
    assert warped.dtype == np.uint8
    if suffix != ".nii":  # which ITK reads as a volume of one slice
        expected = by_itk(tmp_path, out, "moving", SimpleITK.sitkLinear, -1, "field.mha", suffix)
        seen = expected >= 0
        assert seen.mean() > 0.6
        assert np.abs(warped - expected)[seen].max() < 0.6


def test_whatever_order_the_words_have(volumes, networks):
    words = ["--network", networks / "3.safetensors", volumes / "moving.nii.gz", volumes / "fixed.nii.gz"]
    assert register(*words, "--out", volumes / "out") == 0


def test_no_network_is_needed(volumes):
    """An affine map and the refinement alone bring the images together; they are what is done if nothing is said."""
    files = volumes / "moving.nii.gz", volumes / "fixed.nii.gz"
    assert register("--out", volumes / "out", *files) == 0
    record = json.loads((volumes / "out" / "record.json").read_text())
    assert record["network"] is None
    assert (record["settings"]["affine"], record["settings"]["refine"]) == (True, 40)  # as help and pages say
    assert record["statistics"]["correlation"] > max(0.98, record["statistics"]["correlation_before"] + 0.01)
    assert record["statistics"]["fold_fraction"] == 0
    register_files(*files, None, volumes / "again")
    assert json.loads((volumes / "again" / "record.json").read_text())["settings"] == record["settings"]


@pytest.mark.parametrize(
    ("words", "stages"), [(("--refine", 3), (False, 3)), (("--affine",), (True, 0)), ((), (True, 40))]
)
def test_what_is_asked_for_is_done(volumes, words, stages):
    assert register(*words, volumes / "moving.nii.gz", volumes / "fixed.nii.gz", "--out", volumes / "out") == 0
    settings = json.loads((volumes / "out" / "record.json").read_text())["settings"]
    assert (settings["affine"], settings["refine"]) == stages


def test_nothing_to_do_is_an_error(volumes, capsys):
    files = volumes / "moving.nii.gz", volumes / "fixed.nii.gz"
    assert register(*files, "--refine", 0, "--out", volumes / "out") == 1
    assert "nothing would be registered: give a network, affine, refine" in capsys.readouterr().err


def test_networks_of_this_package_have_names(volumes, capsys):
    files = volumes / "moving.nii.gz", volumes / "fixed.nii.gz"
    assert register(*files, "--network", "registration-3d", "--out", volumes / "out") == 0
    described = json.loads((volumes / "out" / "record.json").read_text())["network"]
    assert described["sha256"] == registration_card("registration-3d").sha256
    assert register(*files, "--network", "4", "--out", volumes / "other") == 1
    assert "no registration network 4. Give registration-3d or the network.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["anatomy-3d", "zheng2026-cmr-2d", "auto"])
def test_networks_that_deform_one_scan_are_told_apart(volumes, name, capsys):
    files = volumes / "moving.nii.gz", volumes / "fixed.nii.gz"
    assert register(*files, "--network", name, "--out", volumes / "out") == 1
    said = capsys.readouterr().err
    assert f"no registration network {name}. A network of that name deforms one scan" in said
    assert "--affine --refine 40" in said
    assert not (volumes / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"moving": "none.nii.gz"}, "no file"),
        ({"--network": "none.safetensors"}, "no registration network"),
        ({"--network": "2.safetensors"}, "must be a 2D image of one channel, as the network and the other files need"),
        ({"--labels": "fixed.nii.gz"}, r"must lie on the grid of"),
        ({"--rounds": 0}, "rounds must be 1 or more, got 0"),
        ({"--refine": -1}, "refine must be 0 or more steps, got -1"),
        ({"--device": "nowhere"}, "device 'nowhere' cannot be used"),
        ({"fixed": "nan.nii.gz"}, "must hold finite numbers"),
        ({"--out": "."}, "is not an empty folder"),
    ],
    ids=str,
)
def test_wrong_calls_are_explained(volumes, networks, change, says, capsys):
    nan = np.full((9, 9, 9), np.nan, np.float32)
    nib.save(nib.Nifti1Image(nan, np.eye(4)), volumes / "nan.nii.gz")
    words = {"moving": "moving.nii.gz", "fixed": "fixed.nii.gz", "--network": "3.safetensors", "--out": "out"} | change
    before = sorted(volumes.iterdir())
    found = []
    for name, value in words.items():
        place = networks if name == "--network" else volumes
        value = value if name in ("--rounds", "--refine", "--device") else place / str(value)
        found += [value] if name in ("moving", "fixed") else [name, value]
    assert register(*found) == 1
    assert says in capsys.readouterr().err
    assert sorted(volumes.iterdir()) == before


def slice_of(affine, seed=0):
    """A NIfTI file of one slice."""
    values = gaussian_filter(np.random.default_rng(seed).random((30, 26, 1)), (3, 3, 0))
    return nib.Nifti1Image(values.astype(np.float32), affine)


@pytest.mark.parametrize(("degrees", "fits"), [(90, False), (20, False), (4, True)])
def test_slices_must_be_parallel(tmp_path, capsys, degrees, fits):
    turn = np.radians(degrees)
    tilted = np.eye(4)
    tilted[1:3, 1:3] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    nib.save(slice_of(tilted), tmp_path / "a.nii.gz")
    nib.save(slice_of(np.eye(4), seed=1), tmp_path / "b.nii.gz")
    code = register(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", "--refine", 2, "--out", tmp_path / "out")
    assert code == (0 if fits else 1)
    assert (
        fits or f"must be slices of parallel planes, got an angle of {degrees:.1f} degrees" in capsys.readouterr().err
    )


def test_what_cannot_be_written_is_said_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("monai_drdm.registration.pair_files.register", lambda *_, **__: pytest.fail("it worked"))
    Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20)).save(tmp_path / "fixed.png")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.random.rand(20, 20).astype(np.float32)), tmp_path / "m.mha")
    assert register(tmp_path / "m.mha", tmp_path / "fixed.png", "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "m.mha must hold unsigned integers of 8 or 16 bits, because" in said
    assert "got float32. Give the fixed image in another format" in said
    nib.save(slice_of(np.eye(4)), tmp_path / "a.nii.gz")
    inner = tmp_path / "fixed.png" / "out"
    assert register(tmp_path / "a.nii.gz", tmp_path / "a.nii.gz", "--out", inner) == 1
    assert f"{inner} cannot be written" in capsys.readouterr().err


def test_labels_may_be_stored_with_a_factor(volumes):
    """NIfTI files of floats in 16 bits, which are not exact."""
    labels = nib.load(volumes / "labels.nii.gz")
    image = nib.Nifti1Image(np.asarray(labels.dataobj).astype(np.float32) / 1000 * 3, labels.affine)
    image.header.set_data_dtype(np.int16)
    nib.save(image, volumes / "scaled.nii.gz")
    files = volumes / "moving.nii.gz", volumes / "fixed.nii.gz"
    assert register(*files, "--labels", volumes / "scaled.nii.gz", "--affine", "--out", volumes / "out") == 0
    assert set(np.unique(np.round(nib.load(volumes / "out" / "labels.nii.gz").dataobj, 2))) == {0, 3}


def test_an_empty_folder_is_enough(volumes):
    """Nothing is written beside it; a link to nowhere is no folder."""
    (volumes / "in" / "out").mkdir(parents=True)
    files, before = (volumes / "moving.nii.gz", volumes / "fixed.nii.gz"), (volumes / "in").stat().st_mtime_ns
    assert register(*files, "--affine", "--out", volumes / "in" / "out") == 0
    assert (volumes / "in").stat().st_mtime_ns == before
    assert sorted(path.name for path in (volumes / "in" / "out").iterdir())[0] == "field.nii.gz"
    (volumes / "link").symlink_to("nowhere")
    assert register(*files, "--affine", "--out", volumes / "link") == 1


def test_labels_are_whole_numbers(volumes, capsys):
    half = nib.load(volumes / "labels.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(half.dataobj) * 1.5e-3, half.affine), volumes / "half.nii.gz")
    files = volumes / "moving.nii.gz", volumes / "fixed.nii.gz"
    assert register(*files, "--labels", volumes / "half.nii.gz", "--out", volumes / "out") == 1
    assert "half.nii.gz must hold whole numbers" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [1.0, 1e30])
def test_correlation_is_that_of_what_both_images_show(volumes, factor):
    """Beside NumPy, on the voxels that ITK finds in the moving image; numbers may be large."""
    image = nib.load(volumes / "moving.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * np.float32(factor), image.affine), volumes / "m.nii.gz")
    assert register(volumes / "m.nii.gz", volumes / "fixed.nii.gz", "--affine", "--out", volumes / "out") == 0
    warped = by_itk(volumes, volumes / "out", "m", SimpleITK.sitkLinear, -1e38) / factor
    seen = warped > -1e7
    assert 0.5 < seen.mean() < 0.98
    expected = np.corrcoef(warped[seen], np.asarray(nib.load(volumes / "fixed.nii.gz").dataobj)[seen])[0, 1]
    numbers = json.loads((volumes / "out" / "record.json").read_text())["statistics"]
    assert numbers["correlation"] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("value", [5.0, 100.0, 0.1, 0.0])
@pytest.mark.parametrize("apart", [0.0, 0.7])
def test_constant_images_are_named(volumes, value, apart):
    place = FIXED.copy()
    place[:3, 3] += apart
    nib.save(nib.Nifti1Image(np.full((26, 19, 18), value, np.float32), place), volumes / "flat.nii.gz")
    with pytest.warns(UserWarning, match="the moving image is constant, so nothing was registered"):
        register_files(volumes / "flat.nii.gz", volumes / "fixed.nii.gz", None, volumes / "out")
    assert json.loads((volumes / "out" / "record.json").read_text())["statistics"]["correlation"] == 0


def test_the_default_dtype_does_not_matter(volumes):
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            register_files(volumes / "moving.nii.gz", volumes / "fixed.nii.gz", None, volumes / str(dtype))
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(np.asarray(nib.load(volumes / str(dtype) / "warped.nii.gz").dataobj))
    np.testing.assert_array_equal(*found)


def test_help_says_how_to_register_and_how_to_train(capsys):
    with pytest.raises(SystemExit):
        register("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "moving fixed" in said
    assert "python -m monai_drdm.registration.train --help" in said
    assert register("--pairs", "nowhere", "--out", "run", "--set", "spatial_dims=2") == 1
    assert "no folder of pairs" in capsys.readouterr().err
