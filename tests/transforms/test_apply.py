from __future__ import annotations

import copy
import pickle

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import CacheDataset, MetaTensor, PersistentDataset
from monai.transforms import Compose, EnsureTyped, LoadImaged, RandFlipd, ScaleIntensityd
from scipy.ndimage import map_coordinates

import monai_drdm
import monai_drdm.transforms
from monai_drdm import ApplyDDFd, RandDRDMDeformd
from monai_drdm.fields import identity_grid
from monai_drdm.io import load_ddf, load_image, save_ddf, save_image

SHAPES = {"2d": (28, 24), "3d": (16, 14, 12)}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
AFFINE = np.array([[-1.5, 0, 0, 7], [0, 0.8, 0, -3], [0, 0, 2.5, 0], [0, 0, 0, 1.0]])
FORMATS = {
    "nii": (".nii", None),
    "nii.gz": (".nii.gz", None),
    "nii itk": (".nii", "itk"),
    "mha": (".mha", None),
    "nrrd": (".nrrd", None),
}
each_format = pytest.mark.parametrize(("suffix", "convention"), FORMATS.values(), ids=FORMATS.keys())


def smooth_field(shape, strength=1.5, dtype=torch.float32):
    x = identity_grid(shape, dtype=torch.float64)
    waves = [torch.sin(0.35 * x[d] + d) * torch.cos(0.25 * x[d - 1]) for d in range(len(shape))]
    return (strength * torch.stack(waves)).to(dtype)


def pulled_back(values, ddf, order):
    """Scipy's ``image(x + ddf(x))``, the border continued."""
    where = identity_grid(ddf.shape[1:], dtype=torch.float64).numpy() + ddf.double().numpy()
    return np.stack([map_coordinates(np.asarray(channel), where, order=order, mode="nearest") for channel in values])


def variant(ddf, kind, folder):
    """A field in one of the forms that the transform takes."""
    if kind == "tensor":
        return ddf.clone()
    if kind == "numpy":
        return ddf.numpy().copy()
    if kind == "MetaTensor":
        return MetaTensor(ddf.clone())
    path = folder / "field.nii.gz"
    save_ddf(ddf, np.eye(4), path)
    return str(path) if kind == "str" else path


def exact(a, b):
    torch.testing.assert_close(torch.as_tensor(a).as_subclass(torch.Tensor), b, rtol=0, atol=0)


def test_names():
    for name in ("ApplyDDFd", "ApplyDDFD", "ApplyDDFDict"):
        assert getattr(monai_drdm.transforms, name) is ApplyDDFd
        assert name in monai_drdm.transforms.__all__
    assert monai_drdm.ApplyDDFd is ApplyDDFd
    assert "ApplyDDFd" in monai_drdm.__all__


@each_shape
@pytest.mark.parametrize("by_key", [False, True], ids=["ddf", "ddf_key"])
@pytest.mark.parametrize("kind", ["tensor", "numpy", "MetaTensor", "str", "Path"])
def test_every_form_of_a_field(tmp_path, scan, shape, kind, by_key):
    sample, ddf = scan(shape), smooth_field(shape)
    given = variant(ddf, kind, tmp_path)
    if by_key:
        transform = ApplyDDFd("image", ddf_key="field")
        sample["field"] = given
    else:
        transform = ApplyDDFd("image", given)
    out = transform(sample)
    expected = pulled_back(sample["image"].double(), ddf, order=1)
    np.testing.assert_allclose(out["image"].numpy(), expected, atol=1e-4)
    assert np.abs(out["image"].numpy() - sample["image"].numpy()).max() > 0.05
    torch.testing.assert_close(transform.last.ddf, ddf, rtol=0, atol=1e-5)
    assert type(transform.last.ddf) is torch.Tensor
    if by_key:
        assert out["field"] is given  # left as it is


@each_shape
def test_all_kinds_of_keys(scan, shape):
    dims, ddf = len(shape), smooth_field(shape)
    sample = scan(shape)
    sample["labels"] = torch.cat([sample["label"], 3 - sample["label"]]).to(torch.int64) + 2**40
    sample["p"] = np.random.default_rng(0).uniform(4, np.array(shape) - 5, (2, 6, dims))
    sample["b"] = torch.tensor([[3.0] * dims + [8.0] * dims])
    transform = ApplyDDFd(
        ("image", "label", "labels"), ddf, mode=("bilinear", "nearest", "nearest"), point_keys="p", box_keys="b"
    )
    out = transform(sample)
    np.testing.assert_allclose(out["image"].numpy(), pulled_back(sample["image"].double(), ddf, 1), atol=1e-4)
    for key in ("label", "labels"):
        where = (identity_grid(shape, dtype=torch.float64) + ddf).numpy()
        clipped = [np.clip(where[d], 0, n - 1) for d, n in enumerate(shape)]
        index = tuple(np.rint(axis).astype(int) for axis in clipped)
        clear = np.all([np.abs(axis % 1 - 0.5) > 1e-4 for axis in clipped], axis=0)  # halves may round either way
        assert out[key].dtype == sample[key].dtype
        assert np.array_equal(out[key].numpy()[:, clear], sample[key].numpy()[(slice(None), *index)][:, clear])
    q = out["p"].numpy()
    there = [map_coordinates(component.numpy(), q.reshape(-1, dims).T, order=1, mode="nearest") for component in ddf]
    np.testing.assert_allclose(q + np.stack(there, axis=-1).reshape(q.shape), sample["p"], atol=2e-3)
    assert out["p_valid"].all()
    corners = np.random.default_rng(1).uniform(3, 8, (1, 500, dims)) - 0.5
    held = ApplyDDFd("image", ddf, point_keys="c")({"image": sample["image"], "c": corners})["c"].numpy()[0] + 0.5
    box = out["b"].numpy()[0]
    assert (held >= box[:dims] - 0.05).all()
    assert (held <= box[dims:] + 0.05).all()
    assert np.abs(np.concatenate([held.min(axis=0), held.max(axis=0)]) - box).max() < 1


@each_shape
def test_equals_the_random_transform_with_this_field(small_network, scan, shape):
    dims = len(shape)
    affine = torch.from_numpy(AFFINE)
    sample = {key: MetaTensor(value, affine=affine) for key, value in scan(shape).items()}
    sample["p"] = torch.rand(1, 9, dims, generator=torch.Generator().manual_seed(0)) * 10 - 3
    sample["b"] = torch.tensor([[2.0] * dims + [9.0] * dims])
    options = {
        "mode": ("bilinear", "label"),
        "padding_mode": ("reflection", "zeros"),
        "point_keys": "p",
        "point_space": "world",
        "box_keys": "b",
    }
    random = RandDRDMDeformd(
        ("image", "label"), network=small_network(dims, working_size=16), prob=1.0, **options
    ).set_random_state(2)
    expected = random(sample)
    given = random.last.ddf
    for out in (
        ApplyDDFd(("image", "label"), given, **options)(sample),
        RandDRDMDeformd(("image", "label"), network=small_network(dims, working_size=16), **options)(
            sample, field=given
        ),
    ):
        assert set(out) == set(expected)
        for key in expected:
            exact(out[key], torch.as_tensor(expected[key]).as_subclass(torch.Tensor))


@each_shape
@each_format
def test_saved_fields_give_the_same_images(tmp_path, small_network, scan, shape, suffix, convention):
    affine = AFFINE.copy()
    if len(shape) == 2:
        affine[2, 2] = 1.0  # a 2D ITK file holds no slice thickness
    sample = {key: MetaTensor(value, affine=torch.from_numpy(affine)) for key, value in scan(shape).items()}
    random = RandDRDMDeformd(
        ("image", "label"), network=small_network(len(shape), working_size=16), prob=1.0, mode=("bilinear", "nearest")
    )
    expected = random.set_random_state(6)(sample)
    assert float((expected["image"] - sample["image"]).abs().max()) > 0.01
    path = tmp_path / f"field{suffix}"
    save_ddf(random.last.ddf, sample["image"].affine.numpy(), path, convention=convention)
    for given in (path, load_ddf(path)):
        out = ApplyDDFd(("image", "label"), given, mode=("bilinear", "nearest"))(sample)
        torch.testing.assert_close(out["image"].as_tensor(), expected["image"].as_tensor(), rtol=0, atol=1e-3)
        assert (out["label"] != expected["label"]).float().mean() < 2e-3


def test_files_from_image_to_field(tmp_path, scan):
    """What SimpleITK makes of an image file and a field file is what the transform makes of them."""
    ddf, affine = smooth_field((16, 14, 12), 1.0), AFFINE.copy()
    affine[:3, :3] = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) @ AFFINE[:3, :3]
    save_image(scan((16, 14, 12))["image"][0], affine, tmp_path / "image.nii")
    save_ddf(ddf, affine, tmp_path / "field.nii.gz")
    pipeline = Compose([LoadImaged("image", ensure_channel_first=True), ApplyDDFd("image", tmp_path / "field.nii.gz")])
    ours = pipeline({"image": tmp_path / "image.nii"})["image"]
    field = SimpleITK.ReadImage(str(tmp_path / "field.nii.gz"), SimpleITK.sitkVectorFloat64)
    moving = SimpleITK.ReadImage(str(tmp_path / "image.nii"))
    theirs = SimpleITK.Resample(moving, moving, SimpleITK.DisplacementFieldTransform(field), SimpleITK.sitkLinear, 0.0)
    inner = (slice(2, -2),) * 3
    np.testing.assert_allclose(ours[0].numpy()[inner], SimpleITK.GetArrayFromImage(theirs).T[inner], atol=1e-3)


def test_slice_of_a_volume(tmp_path):
    """A slice anywhere in the world, loaded, deformed by a field saved on its grid in each format that takes it."""
    affine = np.diag([-1.5, 2.0, 4.0, 1.0])
    affine[:3, 3] = (1, 2, 33)
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((20, 18, 1), np.float32), affine), tmp_path / "slice.nii")
    image = load_image(tmp_path / "slice.nii").data
    ddf = smooth_field((20, 18))
    expected = pulled_back(image.double(), ddf, 1)
    for suffix, convention in FORMATS.values():
        path = tmp_path / f"field{suffix}"
        try:
            save_ddf(ddf, image.affine.numpy(), path, convention=convention)
        except ValueError:
            continue  # says what to do instead
        out = ApplyDDFd("image", path)({"image": image})
        np.testing.assert_allclose(out["image"].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("change", ["shift", "spacing", "shape", "flip"])
@pytest.mark.parametrize("by_key", [False, True], ids=["ddf", "ddf_key"])
def test_field_file_of_another_grid(tmp_path, scan, change, by_key):
    shape, affine = (16, 14, 12), AFFINE.copy()
    sample = {"image": MetaTensor(scan(shape)["image"], affine=torch.from_numpy(AFFINE))}
    if change == "shift":
        affine[0, 3] += 0.5
    elif change == "spacing":
        affine[1, 1] *= 1.1
    elif change == "flip":
        affine[:, 0] *= -1
    else:
        shape = (16, 14, 13)
    save_ddf(smooth_field(shape), affine, tmp_path / "field.mha")
    sample["field"] = tmp_path / "field.mha"
    options = {"ddf_key": "field"} if by_key else {"ddf": tmp_path / "field.mha"}
    with pytest.raises(ValueError, match="'image' and the field must have one"):
        ApplyDDFd("image", **options)(sample)


def test_field_file_whose_affine_is_the_identity(tmp_path, scan):
    """A file always says where its field lies; an image elsewhere is another grid."""
    save_ddf(smooth_field((16, 14, 12)), np.eye(4), tmp_path / "field.nii")
    sample = {"image": MetaTensor(scan((16, 14, 12))["image"], affine=torch.from_numpy(AFFINE))}
    with pytest.raises(ValueError, match="'image' and the field must have one affine"):
        ApplyDDFd("image", tmp_path / "field.nii")(sample)


def test_field_file_on_an_image_without_an_affine(tmp_path, scan):
    save_ddf(smooth_field((16, 14, 12)), AFFINE, tmp_path / "field.nii")
    sample = scan((16, 14, 12))
    out = ApplyDDFd("image", tmp_path / "field.nii")(sample)
    expected = pulled_back(sample["image"].double(), smooth_field((16, 14, 12)), 1)
    np.testing.assert_allclose(out["image"].numpy(), expected, atol=1e-4)


def test_images_that_do_not_agree(scan):
    sample = scan((16, 14))
    sample["label"] = sample["label"][:, :-1]
    with pytest.raises(ValueError, match="'image' and 'label' must have one spatial shape"):
        ApplyDDFd(("image", "label"), torch.zeros(2, 16, 14))(sample)
    moved = torch.eye(4)
    moved[0, 3] = 3
    sample = {"image": MetaTensor(torch.rand(1, 8, 8, 8)), "label": MetaTensor(torch.rand(1, 8, 8, 8), affine=moved)}
    with pytest.raises(ValueError, match="'image' and 'label' must have one affine"):
        ApplyDDFd(("image", "label"), torch.zeros(3, 8, 8, 8))(sample)


def test_neither_or_both():
    for options in ({}, {"ddf": torch.zeros(2, 4, 4), "ddf_key": "field"}, {"ddf": None, "ddf_key": None}):
        with pytest.raises(ValueError, match=r"give either ddf= .* or ddf_key="):
            ApplyDDFd("image", **options)


@pytest.mark.parametrize("by_key", [False, True], ids=["ddf", "ddf_key"])
@pytest.mark.parametrize(
    ("field", "error", "match"),
    [
        (torch.full((2, 8, 8), float("nan")), ValueError, "field must be finite"),
        (np.full((2, 8, 8), np.inf), ValueError, "field must be finite"),
        (torch.zeros(2, 8, 8, dtype=torch.int64), TypeError, "field must be a floating tensor"),
        (np.zeros((2, 8, 8), np.int16), TypeError, "field must be a floating tensor"),
        (np.zeros((2, 8, 8), bool), TypeError, "field must be a floating tensor"),
        (torch.zeros(2, 8, 8, dtype=torch.complex64), TypeError, "field must be a floating tensor"),
        (torch.zeros(2, 8, 9), ValueError, r"\(2, 8, 8\)"),
        (torch.zeros(3, 8, 8), ValueError, r"\(2, 8, 8\)"),
        (torch.zeros(1, 2, 8, 8), ValueError, r"\(2, 8, 8\)"),
        (torch.zeros(3, 8, 8, 8), ValueError, r"\(2, 8, 8\)"),
        ([[1.0]], TypeError, "must be a tensor .*, an array or a path, got list"),
        (3.5, TypeError, "must be a tensor .*, an array or a path, got float"),
        ("field.txt", ValueError, "the file must end in"),
        ("none.nii", FileNotFoundError, "no file"),
    ],
)
def test_wrong_fields(field, error, match, by_key):
    sample = {"image": torch.rand(1, 8, 8), "field": field}
    with pytest.raises(error, match=match):
        (ApplyDDFd("image", ddf_key="field") if by_key else ApplyDDFd("image", field))(sample)


def test_field_that_the_sample_lacks():
    sample = {"image": torch.rand(1, 8, 8), "field": None}
    with pytest.raises(TypeError, match="'field' must be a tensor"):
        ApplyDDFd("image", ddf_key="field")(sample)
    for allow in (False, True):
        with pytest.raises(KeyError, match="ddf_key 'other' is missing"):
            ApplyDDFd("image", ddf_key="other", allow_missing_keys=allow)(sample)


def test_missing_keys(scan):
    sample, ddf = {"image": scan((16, 14))["image"]}, smooth_field((16, 14))
    with pytest.raises(KeyError, match="label"):
        ApplyDDFd(("image", "label"), ddf)(sample)
    for keys in (("image", "label"), ("label", "image")):
        out = ApplyDDFd(keys, ddf, mode=("bilinear",) * 2, allow_missing_keys=True)(sample)
        assert set(out) == {"image"}
        np.testing.assert_allclose(out["image"].numpy(), pulled_back(sample["image"].double(), ddf, 1), atol=1e-4)
    with pytest.raises(KeyError, match="none of the keys"):
        ApplyDDFd(("a", "b"), ddf, allow_missing_keys=True)(sample)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "linear"},
        {"padding_mode": "wrap"},
        {"mode": ("bilinear", "nearest", "nearest")},
        {"padding_mode": ("border",)},
    ],
)
def test_wrong_modes(options):
    with pytest.raises(ValueError, match="mode"):
        ApplyDDFd(("image", "label"), torch.zeros(2, 4, 4), **options)


def test_input_is_left_alone(scan):
    for wrap in (torch.clone, lambda t: t.numpy().copy(), lambda t: MetaTensor(t.clone(), meta={"who": "me"})):
        sample = {key: wrap(value) for key, value in scan((16, 14)).items()}
        sample["id"] = "p1"
        before, ddf = copy.deepcopy(sample), smooth_field((16, 14))
        kept = ddf.clone()
        out = ApplyDDFd(("image", "label"), ddf, mode=("bilinear", "nearest"))(sample)
        assert out is not sample
        assert out["id"] == "p1"
        exact(ddf, kept)
        for key in ("image", "label"):
            exact(sample[key], torch.as_tensor(before[key]).as_subclass(torch.Tensor))
            assert isinstance(out[key], MetaTensor)
        if isinstance(sample["image"], MetaTensor):
            assert out["image"].meta["who"] == "me"
            assert sample["image"].applied_operations == []


@each_shape
def test_inverse(scan, shape):
    x = identity_grid(shape, dtype=torch.float64)
    window = torch.stack([torch.sin(np.pi * x[d] / (n - 1)) for d, n in enumerate(shape)]).prod(dim=0)
    ddf = smooth_field(shape, 2.5, dtype=torch.float64) * window
    image = torch.stack([torch.sin(0.2 * x[0] + 0.1 * x[-1]), x[0] / 10]).float()
    sample = {"image": image, "label": scan(shape)["label"], "field": ddf}
    for transform in (
        ApplyDDFd(("image", "label"), ddf, mode=("bilinear", "nearest")),
        ApplyDDFd(("image", "label"), ddf_key="field", mode=("bilinear", "nearest")),
    ):
        out = transform(sample)
        out["image"].meta["seen"] = True
        back = transform.inverse(out)
        inner = (slice(None), *(slice(1, -1),) * len(shape))
        assert float((out["image"] - image).abs().max()) > 0.1
        torch.testing.assert_close(back["image"].as_tensor()[inner], image[inner], rtol=0, atol=0.03)
        assert (back["label"] != sample["label"]).float().mean() < 0.12
        assert back["image"].applied_operations == []
        assert back["image"].meta["seen"]
        assert len(out["image"].applied_operations) == 1  # of the input of inverse
        with pytest.raises(ValueError, match="no record of this transform"):
            transform.inverse(back)


def test_inverse_within_compose(scan):
    chain = Compose([
        EnsureTyped(("image", "label")),
        ApplyDDFd(("image", "label"), smooth_field((32, 28)), mode=("bilinear", "nearest")),
        ApplyDDFd(("image", "label"), smooth_field((32, 28), 0.7), mode=("bilinear", "nearest")),
        RandFlipd(("image", "label"), prob=1.0, spatial_axis=0),
    ])  # fmt: skip
    sample = scan((32, 28))
    out = chain(sample)
    assert [one["class"] for one in out["label"].applied_operations][-3:] == ["ApplyDDFd", "ApplyDDFd", "RandFlipd"]
    back = chain.inverse(out)
    assert not any(one["class"] == "ApplyDDFd" for one in back["label"].applied_operations)
    inner = (0, slice(3, -3), slice(3, -3))
    for key, worst in (("image", 0.02), ("label", 0.04)):
        flipped = torch.flip(out[key].as_tensor(), (1,))
        changed, restored = (
            (one.float() - sample[key].float())[inner].abs().mean() for one in (flipped, back[key].as_tensor())
        )
        assert restored < changed / 3
        assert restored < worst


def test_inverse_is_its_own():
    """Two transforms of one class take back their own record, whatever lies on top."""
    a, b = (ApplyDDFd("image", torch.full((2, 12, 12), shift)) for shift in (1.0, 2.0))
    image = torch.arange(144.0).reshape(1, 12, 12)
    out = a({"image": image})
    with pytest.raises(ValueError, match="no record of this transform"):
        b.inverse(out)
    both = b(out)
    left = b.inverse(both)["image"].as_tensor()
    torch.testing.assert_close(left[:, 3:-3, 3:-3], out["image"].as_tensor()[:, 3:-3, 3:-3], rtol=0, atol=1e-2)


def test_not_invertible(scan):
    transform = ApplyDDFd("image", smooth_field((16, 14)), invertible=False)
    out = transform(scan((16, 14)))
    assert out["image"].applied_operations == []
    with pytest.raises(ValueError, match="no record"):
        transform.inverse(out)


def test_statistics(scan):
    affine = torch.from_numpy(AFFINE)
    transform = ApplyDDFd("image", torch.tensor([2.0, -1.0, 0.5]).view(3, 1, 1, 1).expand(3, 16, 14, 12))
    assert transform.last is None
    transform({"image": MetaTensor(scan((16, 14, 12))["image"], affine=affine)})
    numbers = transform.last.statistics
    vox, mm = np.sqrt(4 + 1 + 0.25), np.sqrt((2 * 1.5) ** 2 + 0.8**2 + (0.5 * 2.5) ** 2)
    assert numbers.mean_displacement_vox == pytest.approx(vox, abs=1e-4)
    assert numbers.max_displacement_vox == pytest.approx(vox, abs=1e-4)
    assert numbers.mean_displacement_mm == pytest.approx(mm, abs=1e-4)
    assert numbers.max_displacement_mm == pytest.approx(mm, abs=1e-4)
    assert numbers.fold_fraction == 0
    assert numbers.log_jacobian_mean == pytest.approx(0, abs=1e-5)
    assert (numbers.scale, numbers.fold_action, numbers.draws, numbers.notes) == (1.0, "none", 0, ())
    assert transform.last.params is None
    assert transform.last.inverse_residual_vox < 1e-3
    torch.testing.assert_close(transform.last.inverse_ddf, -transform.last.ddf, rtol=0, atol=1e-3)


def test_folds_are_counted_not_changed(scan):
    ddf = torch.zeros(2, 16, 14)
    ddf[0, 8:] = -3
    transform = ApplyDDFd("image", ddf)
    transform(scan((16, 14)))
    assert transform.last.statistics.fold_fraction > 0.03
    exact(transform.last.ddf, ddf)


def test_pickle_and_copy(scan):
    sample, ddf = scan((28, 24)), smooth_field((28, 24))
    by_key = ApplyDDFd("image", ddf_key="field")
    out = by_key({**sample, "field": torch.zeros(2, 28, 24).double()})
    assert len(pickle.dumps(by_key)) < 20_000  # without the latest field
    by_tensor = ApplyDDFd("image", ddf)
    out = by_tensor(sample)
    for other in (pickle.loads(pickle.dumps(by_tensor)), copy.deepcopy(by_tensor)):
        assert other.last is None
        exact(other(sample)["image"], out["image"].as_tensor())
        exact(other.inverse(out)["image"], by_tensor.inverse(out)["image"].as_tensor())
    assert by_tensor.last is not None


def test_pickle_of_a_path(tmp_path, scan):
    save_ddf(smooth_field((28, 24)), np.eye(4), tmp_path / "f.nii")
    transform = ApplyDDFd("image", tmp_path / "f.nii")
    expected = transform(scan((28, 24)))["image"].as_tensor()
    exact(pickle.loads(pickle.dumps(transform))(scan((28, 24)))["image"], expected)


def pipeline(ddf):
    return Compose([
        EnsureTyped(("image", "label")),
        ApplyDDFd(("image", "label"), ddf, mode=("bilinear", "nearest"), point_keys="p", box_keys="b"),
        ScaleIntensityd("image", minv=None, maxv=None, factor=0.0),
        RandFlipd(("image", "label"), prob=0.0),
    ])  # fmt: skip


def with_geometry(sample):
    return {**sample, "p": np.array([[[5.0, 6.0], [7.0, 9.0]]]), "b": np.array([[3.0, 3.0, 9.0, 8.0]])}


def test_cached_part_of_a_cache_dataset(scan):
    sample, ddf = with_geometry(scan((16, 14))), smooth_field((16, 14))
    dataset = CacheDataset([sample] * 2, pipeline(ddf), progress=False, num_workers=1)
    expected = pulled_back(sample["image"].double(), ddf, 1)
    np.testing.assert_allclose(dataset._cache[0]["image"].numpy(), expected, atol=1e-4)  # it is in the cache
    for _ in range(2):
        item = dataset[1]
        np.testing.assert_allclose(item["image"].numpy(), expected, atol=1e-4)
        assert item["p_valid"].all()
        back = dataset.transform.transforms[1].inverse(item)
        np.testing.assert_allclose(back["p"].numpy(), sample["p"], atol=2e-3)
        np.testing.assert_allclose(back["b"].numpy(), sample["b"], atol=1e-6)


def test_persistent_dataset(tmp_path, scan):
    sample, ddf = with_geometry(scan((16, 14))), smooth_field((16, 14))
    expected, chain = pulled_back(sample["image"].double(), ddf, 1), pipeline(ddf)
    for _ in range(2):  # the second reads what the first wrote
        item = PersistentDataset([sample], chain, cache_dir=tmp_path / "cache", track_meta=True)[0]
        np.testing.assert_allclose(item["image"].numpy(), expected, atol=1e-4)
        back = chain.transforms[1].inverse(item)
        np.testing.assert_allclose(back["p"].numpy(), sample["p"], atol=2e-3)
        np.testing.assert_allclose(back["b"].numpy(), sample["b"], atol=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_one_field_per_sample(scan):
    """In a dataset each sample brings its own field; the transform keeps nothing from one to the next."""
    transform = ApplyDDFd("image", ddf_key="field")
    first, second = scan((16, 14)), scan((20, 12))
    for sample in (first, second, first):
        ddf = smooth_field(sample["image"].shape[1:])
        out = transform({**sample, "field": ddf})
        np.testing.assert_allclose(out["image"].numpy(), pulled_back(sample["image"].double(), ddf, 1), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_fields(scan, dtype):
    sample, ddf = scan((16, 14)), smooth_field((16, 14)).to(dtype)
    out = ApplyDDFd("image", ddf)(sample)
    np.testing.assert_allclose(out["image"].numpy(), pulled_back(sample["image"].double(), ddf.double(), 1), atol=1e-4)
    assert out["image"].dtype == torch.float32


def test_big_endian_field(scan):
    sample, ddf = scan((16, 14)), smooth_field((16, 14))
    out = ApplyDDFd("image", ddf.numpy().astype(">f4"))(sample)
    np.testing.assert_allclose(out["image"].numpy(), pulled_back(sample["image"].double(), ddf, 1), atol=1e-4)


def test_array_that_changes_later(scan):
    """What ``.last`` and the inverse say is what was applied, also if the caller reuses the array."""
    ddf = smooth_field((16, 14)).numpy().copy()
    transform = ApplyDDFd("image", ddf_key="field")
    out = transform({**scan((16, 14)), "field": ddf})
    before = transform.inverse(out)["image"].as_tensor().clone()
    ddf[:] = 0
    exact(transform.inverse(out)["image"], before)
