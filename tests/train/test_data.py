from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image

from monai_drdm.train.data import find_scans, load_bank, Scan


def volume(path, shape=(20, 24, 16), affine=None, scale=1000.0):
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    image = scale * np.exp(-4 * sum(axis**2 for axis in axes)) * (axes[0] > -0.5)
    nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4) if affine is None else affine), path)
    return image


def picture(path, shape=(30, 40), mode="L"):
    pixels = (np.random.RandomState(0).rand(*shape) * 255).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels


def series(folder, uid, slices, shape=(20, 24), prefix="", change=None):
    """A DICOM series of CT, numbered against the order of its positions; 1.5 x 1.5 x 3 mm. Returns it as (x, y, z).

    ``change`` may give the tags of a slice, by its number, other values.
    """
    folder.mkdir(exist_ok=True)
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    planes = []
    for k in range(slices):
        plane = (-1000 + 1400 * np.exp(-3 * (x**2 + 2 * y**2) - 3 * (k / slices - 0.3) ** 2)).astype(np.int16)
        image = SimpleITK.GetImageFromArray(plane[None])
        image.SetSpacing((1.5, 1.5, 3.0))
        image.SetOrigin((0, 0, 3.0 * k))
        tags = {"0008|0060": "CT", "0020|000d": "1.2.3.9", "0020|000e": uid, "0008|0018": f"{uid}.{k + 1}"}
        tags |= {"0020|0013": str(slices - k), "0020|0032": f"0\\0\\{3.0 * k}", "0020|0037": "1\\0\\0\\0\\1\\0"}
        tags |= {} if change is None else change(k)
        for tag, value in (tags | {"0028|1052": "0", "0028|1053": "1"}).items():
            image.SetMetaData(tag, value)
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{prefix}{k:03}.dcm"))
        writer.Execute(image)
        planes.append(plane.T)
    return np.stack(planes, axis=-1)


def test_folders_and_datalists(tmp_path):
    (tmp_path / "sub").mkdir()
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub" / "b.JPG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    assert [scan.path.name for scan in find_scans(tmp_path)] == ["a.png", "b.JPG"]
    (tmp_path / "list.json").write_text(json.dumps({"fold": [{"image": "a.png"}, {"image": "sub/b.JPG"}]}))
    assert [scan.path.name for scan in find_scans(tmp_path / "list.json", "fold")] == ["a.png", "b.JPG"]


def test_weights_are_shares_of_files_not_of_slices(tmp_path):
    """Two volumes of 12 and 30 slices drawn three to one, whatever their slices."""
    for name, count, value in (("a", 12, 1.0), ("b", 30, -1.0)):
        volume(tmp_path / f"{name}.nii", (16, 16, count), scale=value)
    entries = [{"image": "a.nii", "weight": 3}, {"image": "b.nii", "weight": 1.0}]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    scans = find_scans(tmp_path / "list.json")
    assert [scan.weight for scan in scans] == [3.0, 1.0]
    bank = load_bank(scans, spatial_dims=2, working_size=17, slice_axis=2)
    per_file = torch.zeros(2).index_add(0, bank.source, bank.weight)
    torch.testing.assert_close(per_file, torch.tensor([3.0, 1.0]))
    first = {bytes(image.numpy()) for image, source in zip(bank.images, bank.source) if source == 0}
    drawn = (bank.draw(400, torch.Generator().manual_seed(0)) * 255).round().to(torch.uint8)
    share = sum(bytes(image.numpy()) in first for image in drawn) / 400
    assert share == pytest.approx(0.75, abs=0.08)  # 3.7 standard deviations
    for wrong in (0, -1, "nan", 1e39):
        (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.nii", "weight": wrong}]}))
        with pytest.raises(ValueError, match="weight must be a positive number"):
            find_scans(tmp_path / "list.json")


def test_nothing_to_find(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder or datalist"):
        find_scans(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no image"):
        find_scans(tmp_path)
    (tmp_path / "list.json").write_text("{}")
    with pytest.raises(ValueError, match="section 'training'"):
        find_scans(tmp_path / "list.json")


def test_volumes_keep_their_physical_proportions(tmp_path):
    """A field of view of 20 x 48 x 16 mm: the longest side fills the cube, the others are centred in zeros."""
    volume(tmp_path / "a.nii.gz", affine=np.diag([1.0, 2.0, 1.0, 1.0]))
    bank = load_bank([Scan(tmp_path / "a.nii.gz")], spatial_dims=3, working_size=47)
    assert bank.images.shape == (1, 1, 47, 47, 47)
    assert bank.images.dtype == torch.uint8
    filled = bank.images[0, 0] > 2
    extent = [int(filled.any(dim=tuple(d for d in range(3) if d != axis)).sum()) for axis in range(3)]
    assert extent[1] > extent[0]
    assert bank.images.max() == 255
    assert not bank.images[0, 0, :12].any()


@pytest.mark.parametrize(("axis", "shape"), [(0, (24, 16)), (1, (20, 16)), (2, (20, 24))])
def test_volumes_become_slices(tmp_path, axis, shape):
    image = volume(tmp_path / "a.nii.gz")
    bank = load_bank([Scan(tmp_path / "a.nii.gz")], spatial_dims=2, working_size=33, slice_axis=axis)
    spread = image.std()
    planes = [plane for plane in np.moveaxis(image, axis, 0) if plane.std() > 0.05 * spread]
    assert len(bank) == len(planes) < image.shape[axis] + 1
    middle = bank.images[len(bank) // 2, 0].float() / 255
    assert float(middle.max()) > 0.9
    longest = int(np.argmax(shape))
    edge = middle.movedim(1 - longest, 0)
    assert not edge[0].any() or shape[0] == shape[1]


def test_all_axes_and_the_source_of_slices(tmp_path):
    for name in "ab":
        volume(tmp_path / f"{name}.nii")
    bank = load_bank(find_scans(tmp_path), spatial_dims=2, working_size=33)
    single = [load_bank(find_scans(tmp_path)[:1], spatial_dims=2, working_size=33, slice_axis=d) for d in range(3)]
    assert int((bank.source == 0).sum()) == sum(len(one) for one in single)
    training, validation = bank.split(0.5, seed=0)
    assert not set(training.source.tolist()) & set(validation.source.tolist())
    assert len(training) + len(validation) == len(bank)


def test_batches_are_floats_in_the_unit_range(tmp_path):
    picture(tmp_path / "a.png")
    bank = load_bank([Scan(tmp_path / "a.png")], spatial_dims=2, working_size=33)
    batch = bank.draw(2, torch.Generator().manual_seed(0))
    assert batch.shape == (2, 1, 33, 33)
    assert batch.dtype == torch.float32
    assert 0 <= float(batch.min()) < float(batch.max()) <= 1
    assert bank.split(0.3, 0)[1].images.shape == bank.images.shape  # one file is all there is


def test_bad_files_are_skipped_and_named(tmp_path):
    volume(tmp_path / "good.nii.gz")
    (tmp_path / "torn.nii.gz").write_bytes((tmp_path / "good.nii.gz").read_bytes()[:300])
    nib.save(nib.Nifti1Image(np.full((20, 20, 20), np.nan, np.float32), np.eye(4)), tmp_path / "nan.nii")
    nib.save(nib.Nifti1Image(np.full((20, 20, 20), 7, np.int16), np.eye(4)), tmp_path / "flat.nii")
    volume(tmp_path / "small.nii", (20, 4, 20))
    bank = load_bank(find_scans(tmp_path), spatial_dims=3, working_size=33)
    assert len(bank) == 1
    reasons = {line.split(": ")[0].rsplit("/", 1)[1]: line for line in bank.skipped}
    assert set(reasons) == {"torn.nii.gz", "nan.nii", "flat.nii", "small.nii"}
    assert "cannot be read" in reasons["torn.nii.gz"]
    assert "NaN" in reasons["nan.nii"]
    assert "constant" in reasons["flat.nii"]
    assert "smaller" in reasons["small.nii"]
    with pytest.raises(ValueError, match="none of 1 scans"):
        load_bank([Scan(tmp_path / "nan.nii")], spatial_dims=3, working_size=33)


def test_mixed_and_wrong_kinds_are_refused(tmp_path):
    volume(tmp_path / "a.nii.gz")
    picture(tmp_path / "b.png")
    with pytest.raises(ValueError, match="mixed"):
        load_bank(find_scans(tmp_path), spatial_dims=2, working_size=33)
    both = load_bank(find_scans(tmp_path), spatial_dims=2, working_size=33, slice_axis=0, mix_dimensions=True)
    assert int((both.source == 1).sum()) == 1 < int((both.source == 0).sum())
    with pytest.raises(ValueError, match="spatial_dims=2"):
        load_bank([Scan(tmp_path / "b.png")], spatial_dims=3, working_size=33)
    picture(tmp_path / "c.png", mode="RGB")
    with pytest.raises(ValueError, match="3 channels"):
        load_bank([Scan(tmp_path / "c.png")], spatial_dims=2, working_size=33)
    assert len(load_bank([Scan(tmp_path / "c.png")], spatial_dims=2, working_size=33, image_channel=1)) == 1
    with pytest.raises(ValueError, match="image_channel must be below 3"):
        load_bank([Scan(tmp_path / "c.png")], spatial_dims=2, working_size=33, image_channel=3)


def test_a_dicom_series_is_one_volume(tmp_path):
    """The same volume as NIfTI gives the same bank; x, y and their signs are the file's, as MONAI reads them."""
    values = series(tmp_path / "ct", "1.2.3.1", 16)
    bank = load_bank(find_scans(tmp_path / "ct"), spatial_dims=3, working_size=33)
    nib.save(nib.Nifti1Image(values, np.diag([-1.5, -1.5, 3, 1])), tmp_path / "ct.nii.gz")
    expected = load_bank([Scan(tmp_path / "ct.nii.gz")], spatial_dims=3, working_size=33)
    assert bank.skipped == ()
    assert torch.equal(bank.images, expected.images)


def test_time_points_and_gaps_are_no_volume(tmp_path):
    """ITK would stack ten positions twice, or pull what is left together."""
    series(tmp_path / "twice", "1.2.3.1", 10)
    series(tmp_path / "twice", "1.2.3.1", 10, prefix="later")
    for path in (tmp_path / "twice").glob("later*"):  # its own instances of the same series
        path.write_bytes(path.read_bytes().replace(b"1.2.3.1.", b"1.2.3.1.9"[:8]))
    series(tmp_path / "gap", "1.2.3.2", 16)
    for k in range(4, 12):
        (tmp_path / "gap" / f"{k:03}.dcm").unlink()
    series(tmp_path / "whole", "1.2.3.3", 12)
    bank = load_bank(find_scans(tmp_path), spatial_dims=3, working_size=33)
    assert len(bank) == 1
    reasons = "\n".join(bank.skipped)
    assert "several slices lie at one place" in reasons
    assert "slices are missing: most lie 3 mm apart" in reasons


SAGITTAL = {"0020|0037": "0\\1\\0\\0\\0\\-1"}
MIXED_SERIES = {
    "several orientations": lambda k: SAGITTAL if k >= 20 else {},
    "slices are missing: most lie 3 mm apart, in the mean": lambda k: {"0020|0032": f"0\\0\\{3.0 * (k + 2 * (k > 8))}"},
}


@pytest.mark.parametrize("reason", MIXED_SERIES)
def test_slices_that_are_not_one_volume(tmp_path, reason):
    """What one series may hold in spite of its name; ITK would stack it evenly."""
    series(tmp_path / "mixed", "1.2.3.1", 30, change=MIXED_SERIES[reason])
    series(
        tmp_path / "whole", "1.2.3.2", 12, change=lambda k: {"0020|0032": f"{0.001 * k}\\0\\{3.0 * k + 0.1 * (k % 2)}"}
    )
    series(tmp_path / "one missing", "1.2.3.3", 12, change=lambda k: {"0020|0032": f"0\\0\\{3.0 * (k + (k > 6))}"})
    bank = load_bank(find_scans(tmp_path), spatial_dims=3, working_size=33)
    assert len(bank) == 2
    assert len(bank.skipped) == 1
    assert str(tmp_path / "mixed") in bank.skipped[0]
    assert reason in bank.skipped[0]


def test_slices_without_a_place(tmp_path):
    """All of a series may be without, as pictures taken of a screen are, but not some."""
    series(tmp_path / "some", "1.2.3.1", 12)
    series(tmp_path / "all", "1.2.3.2", 12)
    place, other = b"\x20\x00\x32\x00", b"\x20\x00\x31\x00"  # tags of implicit representation
    for path in (tmp_path / "some" / "003.dcm", *(tmp_path / "all").iterdir()):
        assert path.read_bytes().count(place) == 1
        path.write_bytes(path.read_bytes().replace(place, other))
    bank = load_bank(find_scans(tmp_path), spatial_dims=3, working_size=33)
    assert len(bank) == 1
    assert [line.split(": ", 1)[1] for line in bank.skipped] == [
        "cannot be read: 1 of 12 slices do not say where they lie"
    ]


def test_series_in_folders_of_a_listed_one(tmp_path):
    """A study in a datalist stands for its series; a folder without any is said to hold none."""
    values = series(tmp_path, "1.2.3.1", 12)  # makes its folder
    (tmp_path / "study" / "ct").mkdir(parents=True)
    for path in tmp_path.glob("*.dcm"):
        path.rename(tmp_path / "study" / "ct" / path.name)
    (tmp_path / "empty").mkdir()
    entries = [{"image": str(tmp_path / name)} for name in ("study", "empty")]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    bank = load_bank(find_scans(tmp_path / "list.json"), spatial_dims=3, working_size=33)
    assert len(bank) == 1
    assert values.shape[2] == 12
    assert bank.skipped == (f"{tmp_path / 'empty'}: is a folder without a DICOM series; list other images one by one",)


def test_linked_and_hidden_folders_and_runs(tmp_path):
    """Links are followed, once and not in circles; hidden folders and runs hold no scans."""
    for name in ("patients/a", "elsewhere/b", "patients/.cache", "patients/run/sheets", "patients/run/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
        picture(tmp_path / name / "scan.png")
    (tmp_path / "patients" / "run" / "config.json").write_text("{}")
    (tmp_path / "patients" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "patients")
    found = [scan.path.relative_to(tmp_path / "patients").as_posix() for scan in find_scans(tmp_path / "patients")]
    assert found == ["a/scan.png", "linked/b/scan.png"]


def test_what_would_be_read_as_something_else_is_skipped(tmp_path):
    """Palettes, complex numbers, and volumes whose place is not a number or has no extent."""
    picture(tmp_path / "good.png")
    picture(tmp_path / "palette.png", mode="P")
    np.save(tmp_path / "complex.npy", np.ones((20, 20)) + 1j * np.eye(20))
    for name, value in (("nan", np.nan), ("flat", 0.0)):
        file = nib.Nifti1Image(np.random.RandomState(0).rand(20, 24).astype(np.float32), np.eye(4))
        header = bytearray(file.to_bytes())
        header[252:256] = np.array([0, 1], "<i2").tobytes()  # no qform, an sform
        header[280:296] = np.array([value, 0, 0, 0], "<f4").tobytes()  # its first row
        (tmp_path / f"{name}.nii").write_bytes(header)
    bank = load_bank(find_scans(tmp_path), spatial_dims=2, working_size=33)
    assert len(bank) == 1
    reasons = {line.split(": ")[0].rsplit("/")[-1]: line for line in bank.skipped}
    assert "palette image" in reasons["palette.png"]
    assert "omplex" in reasons["complex.npy"]
    assert "affine holds NaN" in reasons["nan.nii"]
    assert "positive spacings" in reasons["flat.nii"]


def test_what_is_listed_twice_is_one_source(tmp_path):
    """Several raters of an image must not put it on both sides of a split."""
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    bank = load_bank([Scan(tmp_path / f"{name}.png") for name in "aabbcc"], spatial_dims=2, working_size=33)
    training, validation = bank.split(0.3, 0)
    assert (len(training), len(validation)) == (4, 2)
    assert not set(training.source.tolist()) & set(validation.source.tolist())


def test_an_empty_name_is_not_the_current_folder():
    with pytest.raises(ValueError, match="data must name a folder or datalist, got an empty text"):
        find_scans("")


def test_a_folder_of_several_series_and_damaged_files(tmp_path):
    """Two series, a scout beside them, and two files that are cut: what can be used is used, the rest is counted."""
    series(tmp_path / "ct", "1.2.3.1", 16)
    series(tmp_path / "ct", "1.2.3.2", 12, prefix="second")
    series(tmp_path / "ct", "1.2.3.3", 1, (40, 24), prefix="scout")
    for name, length in (("005.dcm", 60), ("second003.dcm", 900)):
        file = tmp_path / "ct" / name
        file.write_bytes(file.read_bytes()[:length])
    bank = load_bank(find_scans(tmp_path), spatial_dims=3, working_size=33)
    assert len(bank) == len(torch.unique(bank.source)) == 2
    lines = bank.report().splitlines()
    assert lines[0] == "3 of 5 scans skipped:"
    assert [line.strip().split(": ")[0] for line in sorted(lines[1:])] == [
        str(tmp_path / "ct" / name) for name in ("005.dcm", "scout000.dcm", "second003.dcm")
    ]


def test_single_dicom_files_are_images(tmp_path):
    """Radiographs in one folder are not slices of one body."""
    for number, shape in enumerate([(20, 24), (20, 24), (30, 20)]):
        series(tmp_path / "cxr", f"1.2.3.{number}", 1, shape, prefix=str(number))
    bank = load_bank(find_scans(tmp_path), spatial_dims=2, working_size=33)
    assert bank.source.tolist() == [0, 1, 2]
    assert bank.report() == ""


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".tif", ".tiff", ".npy"])
def test_every_format_of_volumes(tmp_path, suffix):
    values = volume(tmp_path / "as.nii.gz").astype(np.uint16)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "as.nii.gz")
    expected = load_bank([Scan(tmp_path / "as.nii.gz")], spatial_dims=3, working_size=33)
    (tmp_path / "scans").mkdir()
    if suffix == ".npy":
        np.save(tmp_path / "scans" / "a.npy", values)
    elif suffix.startswith(".nii"):
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "scans" / f"a{suffix}")
    else:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values.T), str(tmp_path / "scans" / f"a{suffix}"))
    assert torch.equal(
        load_bank(find_scans(tmp_path / "scans"), spatial_dims=3, working_size=33).images, expected.images
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"])
def test_every_format_of_pictures(tmp_path, suffix):
    """Flat squares, which JPEG keeps; pictures may lie either way."""
    pixels = np.kron([[0, 90, 200], [255, 30, 140]], np.ones((16, 16))).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}")
    image = load_bank(find_scans(tmp_path), spatial_dims=2, working_size=49).images[0, 0].float()
    np.save(tmp_path / "b.npy", pixels.T)
    expected = load_bank([Scan(tmp_path / "b.npy")], spatial_dims=2, working_size=49).images[0, 0].float()
    assert float((image - expected).abs().mean()) < 3


def test_what_is_too_small(tmp_path):
    """Below 8 voxels along an axis; one large enough plane makes a thin volume fit for 2D."""
    picture(tmp_path / "thin.png", (5, 60))
    with pytest.raises(ValueError, match=r"none of 1 scans can be used:\n.*thin.png: is smaller than 8 voxels"):
        load_bank([Scan(tmp_path / "thin.png")], spatial_dims=2, working_size=33)
    volume(tmp_path / "thin.nii", (20, 24, 3))
    with pytest.raises(ValueError, match=r"thin.nii: is smaller than 8 voxels: \(20, 24, 3\)"):
        load_bank([Scan(tmp_path / "thin.nii")], spatial_dims=3, working_size=33)
    assert len(load_bank([Scan(tmp_path / "thin.nii")], spatial_dims=2, working_size=33)) >= 1
    volume(tmp_path / "tiny.nii", (7, 7, 7))
    with pytest.raises(ValueError, match="has no slice of 8 voxels"):
        load_bank([Scan(tmp_path / "tiny.nii")], spatial_dims=2, working_size=33)


def test_links_that_lead_nowhere_are_named(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "gone.nii.gz").symlink_to("elsewhere.nii.gz")
    (tmp_path / "loop").symlink_to(".")
    bank = load_bank(find_scans(tmp_path), spatial_dims=2, working_size=33)
    assert len(bank) == 1
    assert bank.report().splitlines()[0] == "2 of 3 scans skipped:"
    assert "circle.png: cannot be read" in bank.report()
    assert "gone.nii.gz: cannot be read" in bank.report()


def test_series_of_images_over_time_need_a_choice(tmp_path):
    frames = np.stack([volume(tmp_path / "a.nii.gz"), volume(tmp_path / "a.nii.gz", scale=5)[::-1]], axis=-1)
    nib.save(nib.Nifti1Image(frames, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match="has 2 channels"):
        load_bank([Scan(tmp_path / "a.nii.gz")], spatial_dims=3, working_size=33)
    both = [load_bank([Scan(tmp_path / "a.nii.gz")], spatial_dims=3, working_size=33, image_channel=c) for c in (0, 1)]
    assert not torch.equal(both[0].images, both[1].images)
