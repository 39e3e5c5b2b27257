from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
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
    for wrong in (0, -1, "nan"):
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
