import os

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation

from monai_drdm.io import IMAGE_SUFFIXES, load_image

INTEGERS = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32]
NUMBERS = [*INTEGERS, np.float32, np.float64]
ITK_NUMBERS = [*NUMBERS, np.int64, np.uint64]


def oblique():
    out = np.eye(4)
    out[:3, :3] = Rotation.from_euler("xyz", (20, -15, 35), degrees=True).as_matrix() @ np.diag([-1.5, 0.8, 2.5])
    out[:3, 3] = (-8, 40, 11)
    return out


def numbers(shape, dtype, seed=0):
    random = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        return random.normal(0, 100, shape).astype(dtype)
    limits = np.iinfo(dtype)
    values = random.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    values.flat[:2] = limits.min, limits.max
    return values


def write_nifti(path, values, affine=None, kind=nib.Nifti1Image, **header):
    image = kind(values, oblique() if affine is None else affine, dtype=values.dtype)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def write_itk(path, values, spacing=None, origin=None, direction=None, vector=False):
    image = SimpleITK.GetImageFromArray(values, isVector=vector)
    dims = image.GetDimension()
    image.SetSpacing((0.7, 1.2, 3.0)[:dims] if spacing is None else spacing)
    image.SetOrigin((-5.0, 20.0, 7.0)[:dims] if origin is None else origin)
    turn = Rotation.from_euler("z", 30, degrees=True).as_matrix()[:dims, :dims]
    image.SetDirection(turn.ravel().tolist() if direction is None else direction)
    SimpleITK.WriteImage(image, str(path))
    return path


def rewrite(path, data=None, **options):
    """Save what a file holds, or something else, like the file."""
    file = load_image(path, **options)
    out = path.with_name(f"again{file.suffix}")
    file.save_like(file.data if data is None else data, out)
    return file, out


def stored(path):
    """Numbers of a NIfTI file as they lie in it."""
    return np.asarray(nib.load(path, mmap=False).dataobj.get_unscaled())


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_nifti_comes_back(tmp_path, suffix, dtype):
    values = numbers((6, 5, 4), dtype)
    file, out = rewrite(write_nifti(tmp_path / f"a{suffix}", values))
    assert isinstance(file.data, MetaTensor)
    assert np.array_equal(file.data.numpy()[0], values)
    assert file.data.numpy().dtype == dtype
    np.testing.assert_allclose(file.data.affine.numpy(), oblique(), atol=1e-5)
    first, second = nib.load(tmp_path / f"a{suffix}"), nib.load(out)
    assert second.get_data_dtype() == dtype
    assert np.array_equal(np.asarray(second.dataobj), values)
    assert np.array_equal(first.affine, second.affine)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(("slope", "inter"), [(2.0, 0.0), (1.0, -1024.0), (0.037, 11.5), (-0.5, 3.0)])
def test_nifti_scaling_comes_back(tmp_path, dtype, slope, inter):
    values, path = numbers((6, 5, 4), dtype), tmp_path / "a.nii"
    image = nib.Nifti1Image(values, oblique(), dtype=dtype)
    image.header.set_slope_inter(slope, inter)
    # nibabel takes the data as scaled; write what is stored afterwards
    nib.save(image, path)
    with open(path, "r+b") as raw:
        raw.seek(int(image.header.single_vox_offset))
        raw.write(values.tobytes(order="F"))
    file, out = rewrite(path)
    again = nib.load(out)
    scaled = values.astype(np.float64) * np.float32(slope).astype(float) + inter
    np.testing.assert_allclose(file.data.numpy()[0], scaled, rtol=1e-5, atol=1e-5 * np.abs(scaled).max())
    assert again.get_data_dtype() == dtype
    assert (again.dataobj.slope, again.dataobj.inter) == pytest.approx((slope, inter))
    if np.issubdtype(dtype, np.integer):
        assert np.array_equal(stored(out), values)
    else:
        np.testing.assert_allclose(stored(out), values, rtol=1e-4, atol=1e-3 * max(1, abs(inter)) / abs(slope))


def test_nifti_scaled_is_quantised_and_clipped(tmp_path):
    path, slope, inter = tmp_path / "a.nii", 0.5, -10.0
    image = nib.Nifti1Image(np.zeros((4, 3, 2)), np.eye(4), dtype=np.uint8)
    image.header.set_slope_inter(slope, inter)
    nib.save(image, path)
    wanted = torch.linspace(-30, 150, 24).reshape(1, 4, 3, 2)
    _, out = rewrite(path, wanted)
    expected = np.clip(np.round((wanted[0].numpy().astype(float) - inter) / slope), 0, 255)
    assert np.array_equal(stored(out), expected)
    np.testing.assert_allclose(nib.load(out).get_fdata(), expected * slope + inter)


@pytest.mark.parametrize(
    ("shape", "keep_slice", "loaded"),
    [
        ((6, 5), False, (1, 6, 5)),
        ((6, 5), True, (1, 6, 5)),
        ((6, 5, 1), False, (1, 6, 5)),
        ((6, 5, 1), True, (1, 6, 5, 1)),
        ((6, 5, 4), False, (1, 6, 5, 4)),
        ((6, 1, 4), False, (1, 6, 1, 4)),
        ((6, 5, 4, 3), False, (3, 6, 5, 4)),
        ((6, 5, 1, 3), False, (3, 6, 5)),
        ((6, 5, 1, 3), True, (3, 6, 5, 1)),
        ((6, 5, 4, 1), False, (1, 6, 5, 4)),
        ((6, 5, 4, 1, 3), False, (3, 6, 5, 4)),
        ((6, 5, 4, 2, 3), False, (6, 6, 5, 4)),
        ((6, 5, 1, 2, 3), False, (6, 6, 5)),
    ],
)
def test_nifti_axes(tmp_path, shape, keep_slice, loaded):
    values = numbers(shape, np.int16)
    file, out = rewrite(write_nifti(tmp_path / "a.nii.gz", values), keep_slice=keep_slice)
    assert tuple(file.data.shape) == loaded
    spatial = values.reshape(*loaded[1:], -1) if len(shape) < 5 else values.reshape(*loaded[1:], -1, order="F")
    for channel in range(loaded[0]):
        assert np.array_equal(file.data.numpy()[channel], spatial[..., channel])
    assert nib.load(out).shape == shape
    assert np.array_equal(np.asarray(nib.load(out).dataobj), values)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(("qcode", "scode"), [(1, 0), (0, 2), (1, 4), (2, 1), (0, 0)])
def test_nifti_header_is_kept(tmp_path, kind, qcode, scode):
    image = kind(numbers((6, 5, 4), np.int16), oblique())
    image.set_qform(oblique(), qcode)
    image.set_sform(oblique() if scode else None, scode)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"a scan"
    image.header["cal_max"] = 99
    image.header["toffset"] = 3
    image.header.set_intent("label", name="tissue")
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"keep me"))
    nib.save(image, tmp_path / "a.nii")
    _, out = rewrite(tmp_path / "a.nii")
    first, second = nib.load(tmp_path / "a.nii"), nib.load(out)
    assert type(second) is kind
    assert np.array_equal(first.affine, second.affine)
    for name in first.header:
        if name not in ("scl_slope", "scl_inter"):
            assert np.array_equal(first.header[name], second.header[name]), name
    assert (int(second.header["qform_code"]), int(second.header["sform_code"])) == (qcode, scode)
    assert [extension.get_content() for extension in second.header.extensions] == [b"keep me"]


def test_nifti_big_endian(tmp_path):
    values = numbers((6, 5, 4), np.int16)
    nib.save(nib.Nifti1Image(values.astype(">i2"), oblique(), nib.Nifti1Header(endianness=">")), tmp_path / "a.nii")
    file, out = rewrite(tmp_path / "a.nii")
    assert np.array_equal(file.data.numpy()[0], values)
    assert np.array_equal(np.asarray(nib.load(out).dataobj), values)


def test_nifti_gzip_does_not_depend_on_the_time_or_name(tmp_path):
    """The header of a gzip file (RFC 1952) has room for both: flags, time, extra flags, system; then a name if any."""
    file = load_image(write_nifti(tmp_path / "a.nii.gz", numbers((6, 5, 4), np.int16)))
    for name in ("one", "two"):
        file.save_like(file.data, tmp_path / f"{name}.nii.gz")
    first, second = ((tmp_path / f"{name}.nii.gz").read_bytes() for name in ("one", "two"))
    assert first == second
    flags, time = first[3], int.from_bytes(first[4:8], "little")
    assert (flags, time) == (0, 0)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("as_type", [torch.int32, torch.int64, torch.float64])
def test_large_labels_are_exact(tmp_path, suffix, as_type):
    values = np.array([0, 2**24 + 1, -(2**24) - 3, 2**31 - 1, -(2**31), 7], dtype=np.int32).reshape(1, 2, 3)
    path = tmp_path / f"a{suffix}"
    if suffix.startswith(".nii"):
        write_nifti(path, values.T)
    else:
        write_itk(path, values)
    file = load_image(path, keep_slice=True)
    assert file.data.dtype == torch.int32
    assert np.array_equal(file.data.numpy()[0], values.T)
    _, out = rewrite(path, file.data.to(as_type), keep_slice=True)
    assert np.array_equal(load_image(out, keep_slice=True).data.numpy()[0], values.T)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
@pytest.mark.parametrize("as_type", [torch.float32, torch.float64])
def test_floats_are_rounded_and_clipped(tmp_path, suffix, as_type):
    path, values = tmp_path / f"a{suffix}", np.zeros((4, 3), np.uint8)
    if suffix.startswith(".nii"):
        write_nifti(path, values)
    else:
        write_itk(path, values.T)
    wanted = torch.tensor([-300.0, -0.6, -0.4, 0.4, 0.6, 1.2, 99.51, 254.4, 254.6, 255.4, 256.0, 1e20])
    _, out = rewrite(path, wanted.reshape(1, 4, 3).to(as_type))
    expected = torch.tensor([0, 0, 0, 0, 1, 1, 100, 254, 255, 255, 255, 255], dtype=torch.uint8)
    again = load_image(out).data
    assert again.dtype == torch.uint8
    assert again.flatten().tolist() == expected.tolist()


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
@pytest.mark.parametrize("as_type", [torch.int16, torch.int64])
def test_wider_integers_are_clipped(tmp_path, suffix, as_type):
    """A label map of another type must not wrap around: 256 is not background."""
    path, values = tmp_path / f"a{suffix}", np.zeros((2, 2), np.uint8)
    if suffix.startswith(".nii"):
        write_nifti(path, values)
    else:
        write_itk(path, values.T)
    wanted = torch.tensor([[[256, 300], [-1, 7]]], dtype=as_type)
    try:
        _, out = rewrite(path, wanted)
    except ValueError:
        return
    assert load_image(out).data.flatten().tolist() == [255, 255, 0, 7]


def test_bool_and_half_and_gradient(tmp_path):
    path = write_nifti(tmp_path / "a.nii", np.zeros((2, 2), np.int16))
    for data in (
        torch.tensor([[[True, False], [False, True]]]),
        torch.tensor([[[1.0, 0.0], [0.2, 0.8]]], dtype=torch.float16),
        torch.tensor([[[1.0, 0.0], [0.2, 0.8]]], requires_grad=True),
        MetaTensor(torch.tensor([[[1.0, 0.0], [0.2, 0.8]]])),
        torch.tensor([[[1.0, 0.0], [0.2, 0.8]]], dtype=torch.bfloat16),
    ):
        _, out = rewrite(path, data)
        assert load_image(out).data.flatten().tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("dtype", ITK_NUMBERS)
def test_itk_comes_back(tmp_path, suffix, dtype):
    values = numbers((4, 5, 6), dtype)
    path = write_itk(tmp_path / f"a{suffix}", values)
    file, out = rewrite(path)
    assert file.data.numpy().dtype == dtype
    assert np.array_equal(file.data.numpy()[0], values.T)
    first, second = (SimpleITK.ReadImage(str(p)) for p in (path, out))
    assert first.GetPixelID() == second.GetPixelID()
    assert np.array_equal(SimpleITK.GetArrayFromImage(second), values)
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(second, name)(), getattr(first, name)(), atol=1e-9)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_itk_affine_is_that_of_nifti(tmp_path, suffix):
    """One image as NIfTI and as an ITK file: the same array and affine."""
    path = write_nifti(tmp_path / "a.nii", numbers((6, 5, 4), np.float32))
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(path)), str(tmp_path / f"a{suffix}"))
    nifti, itk = load_image(path).data, load_image(tmp_path / f"a{suffix}").data
    np.testing.assert_allclose(itk.affine.numpy(), nifti.affine.numpy(), atol=1e-4)
    assert torch.equal(nifti.as_tensor(), itk.as_tensor())


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize(
    ("shape", "vector", "keep_slice", "loaded"),
    [
        ((5, 6), False, False, (1, 6, 5)),
        ((5, 6), False, True, (1, 6, 5)),
        ((5, 6, 3), True, False, (3, 6, 5)),
        ((1, 5, 6), False, False, (1, 6, 5)),
        ((1, 5, 6), False, True, (1, 6, 5, 1)),
        ((4, 1, 6), False, False, (1, 6, 1, 4)),
        ((1, 5, 6, 3), True, False, (3, 6, 5)),
        ((1, 5, 6, 3), True, True, (3, 6, 5, 1)),
        ((4, 5, 6, 2), True, False, (2, 6, 5, 4)),
    ],
)
def test_itk_axes(tmp_path, suffix, shape, vector, keep_slice, loaded):
    values = numbers(shape, np.int16)
    path = write_itk(tmp_path / f"a{suffix}", values, vector=vector)
    file, out = rewrite(path, keep_slice=keep_slice)
    assert tuple(file.data.shape) == loaded
    for channel in range(loaded[0]):
        plain = values[..., channel] if vector else values
        assert np.array_equal(file.data.numpy()[channel], plain.T.reshape(loaded[1:]))
    first, second = (SimpleITK.ReadImage(str(p)) for p in (path, out))
    assert first.GetSize() == second.GetSize()
    assert np.array_equal(SimpleITK.GetArrayFromImage(second), values)
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(second, name)(), getattr(first, name)(), atol=1e-9)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png(tmp_path, channels, dtype):
    values = numbers((5, 6) if channels == 1 else (5, 6, channels), dtype)
    path = write_itk(
        tmp_path / "a.png", values, spacing=(1, 1), origin=(0, 0), direction=(1, 0, 0, 1), vector=channels > 1
    )
    file, out = rewrite(path)
    assert tuple(file.data.shape) == (channels, 6, 5)
    assert np.array_equal(file.data.numpy(), values.reshape(5, 6, channels).transpose(2, 1, 0))
    read = SimpleITK.ReadImage(str(out))
    assert read.GetPixelID() == SimpleITK.ReadImage(str(path)).GetPixelID()
    assert np.array_equal(SimpleITK.GetArrayFromImage(read), values)


def test_itk_metadata_is_kept(tmp_path):
    image = SimpleITK.GetImageFromArray(numbers((4, 5, 6), np.int16))
    image.SetMetaData("Modality", "MR")
    SimpleITK.WriteImage(image, str(tmp_path / "a.nrrd"))
    _, out = rewrite(tmp_path / "a.nrrd")
    assert SimpleITK.ReadImage(str(out)).GetMetaData("Modality") == "MR"


def test_nrrd_content_is_kept(tmp_path):
    image = SimpleITK.GetImageFromArray(np.ones((4, 5, 6), np.float32))
    SimpleITK.WriteImage(image, str(tmp_path / "plain.nrrd"))
    data = (tmp_path / "plain.nrrd").read_bytes()
    (tmp_path / "a.nrrd").write_bytes(data.replace(b"\ntype:", b"\ncontent: CT scan\ntype:", 1))
    file = load_image(tmp_path / "a.nrrd")
    file.save_like(file.data, tmp_path / "b.nrrd")
    assert b"content: CT scan" in (tmp_path / "b.nrrd").read_bytes()


def test_surface_data_is_no_image(tmp_path):
    """CIFTI files end in .nii as well."""
    axes = (nib.cifti2.ScalarAxis(["a"]), nib.cifti2.BrainModelAxis.from_mask(np.ones((2, 2, 2)), affine=np.eye(4)))
    nib.save(nib.Cifti2Image(np.ones((1, 8), np.float32), axes), tmp_path / "c.dscalar.nii")
    with pytest.raises(ValueError, match="cannot be read as NIfTI: it is a Cifti2Image"):
        load_image(tmp_path / "c.dscalar.nii")


def test_source_may_be_gone_or_be_the_target(tmp_path):
    """Augmenting in place, and writing after the source was removed."""
    for name in ("a.nii", "a.nii.gz"):
        values = numbers((6, 5, 4), np.int16)
        path = write_nifti(tmp_path / name, values)
        file = load_image(path)
        file.save_like(file.data + 0, path)
        assert np.array_equal(np.asarray(nib.load(path, mmap=False).dataobj), values)
        file = load_image(path)
        path.unlink()
        file.save_like(file.data, path)
        assert np.array_equal(np.asarray(nib.load(path, mmap=False).dataobj), values)


def test_loaded_data_may_be_changed(tmp_path):
    path = write_nifti(tmp_path / "a.nii", numbers((6, 5, 4), np.int16))
    before = path.read_bytes()
    data = load_image(path).data
    data.zero_()
    assert path.read_bytes() == before
    assert load_image(path).data.any()


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_missing_and_damaged_files(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(FileNotFoundError, match="no file"):
        load_image(path)
    values = numbers((60, 50), np.uint8)
    if suffix.startswith(".nii"):
        write_nifti(path, values)
    else:
        write_itk(path, values)
    content = path.read_bytes()
    for damaged in (b"", b"something else" * 50, content[: len(content) // 2], content[:40]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read"):
            load_image(path)


def test_damaged_gzip(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", numbers((30, 30, 30), np.uint8))
    content = bytearray(path.read_bytes())
    content[5000:5200] = bytes([255]) * 200
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        load_image(path)


def test_damaged_header(tmp_path):
    path = write_nifti(tmp_path / "a.nii", numbers((6, 5, 4), np.uint8))
    content = bytearray(path.read_bytes())
    content[70:72] = (999).to_bytes(2, "little")  # no such data type
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        load_image(path)


def test_no_real_numbers(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.complex64), np.eye(4)), tmp_path / "complex.nii")
    rgb = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), tmp_path / "rgb.nii")
    SimpleITK.WriteImage(SimpleITK.Image((4, 5), SimpleITK.sitkComplexFloat32), str(tmp_path / "complex.nrrd"))
    for name in ("complex.nii", "rgb.nii", "complex.nrrd"):
        with pytest.raises(ValueError, match="real numbers"):
            load_image(tmp_path / name)


def test_wrong_number_of_axes(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((4,), np.uint8), np.eye(4)), tmp_path / "one.nii")
    nib.save(nib.Nifti1Image(np.zeros((4, 3, 2, 2, 2, 2), np.uint8), np.eye(4)), tmp_path / "six.nii")
    SimpleITK.WriteImage(SimpleITK.Image((4, 5, 3, 2), SimpleITK.sitkUInt8), str(tmp_path / "four.mha"))
    for name in ("one.nii", "six.nii", "four.mha"):
        with pytest.raises(ValueError, match="must"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a", "a.jpg", "a.img", "a.nii.bz2", ".nii"])
def test_unknown_suffix(tmp_path, name):
    with pytest.raises(ValueError, match="load_image: the file must end in one of"):
        load_image(tmp_path / name)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_upper_case_suffix(tmp_path, suffix):
    values = numbers((4, 5), np.uint8)
    lower = tmp_path / f"a{suffix}"
    if suffix.startswith(".nii"):
        write_nifti(lower, values.T)
    else:
        write_itk(lower, values)
    path = lower.rename(tmp_path / f"A{suffix.upper()}")
    file = load_image(path)
    file.save_like(file.data, tmp_path / f"B{suffix.upper()}")
    assert np.array_equal(load_image(tmp_path / f"B{suffix.upper()}").data.numpy()[0], values.T)


def test_save_like_refuses(tmp_path):
    file = load_image(write_nifti(tmp_path / "a.nii", numbers((6, 5, 4), np.int16)))
    for shape in ((6, 5, 4), (2, 6, 5, 4), (1, 6, 5, 3), (1, 4, 5, 6)):
        with pytest.raises(ValueError, match="data must have shape"):
            file.save_like(torch.zeros(shape), tmp_path / "b.nii")
    for name in ("b.nii.gz", "b.mha", "b"):
        with pytest.raises(ValueError, match="save_like: the file must end in one of"):
            file.save_like(file.data, tmp_path / name)
    with pytest.raises(OSError, match="cannot be written"):
        file.save_like(file.data, tmp_path / "none" / "b.nii")
    assert os.listdir(tmp_path) == ["a.nii"]


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".png"])
def test_itk_folder_that_is_missing(tmp_path, suffix):
    file = load_image(write_itk(tmp_path / f"a{suffix}", numbers((5, 6), np.uint8)))
    with pytest.raises(OSError, match="cannot be written"):
        file.save_like(file.data, tmp_path / "none" / f"b{suffix}")


def test_not_a_number_in_an_integer_image(tmp_path, recwarn):
    path = write_nifti(tmp_path / "a.nii", np.ones((2, 2), np.int16))
    try:
        rewrite(path, torch.tensor([[[float("nan"), 1.0], [2.0, 3.0]]]))
    except ValueError:
        return
    assert [str(warning.message) for warning in recwarn] == []  # numpy casts NaN to an undefined value


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_another_data_type_and_no_scaling(tmp_path, suffix):
    """Values that the file's own type and scaling could not hold."""
    path, values = tmp_path / f"file{suffix}", np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    if suffix == ".mha":
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values.T), str(path))
    else:
        scaled = nib.Nifti1Image(values, np.eye(4))
        scaled.header.set_slope_inter(0.5, 3)
        nib.save(scaled, path)
    wanted = torch.linspace(-1e6, 1e6, 24).reshape(1, 2, 3, 4) + 0.125
    load_image(path).save_like(wanted, tmp_path / f"new{suffix}", np.dtype(np.float32))
    again = load_image(tmp_path / f"new{suffix}").data
    assert again.dtype == torch.float32
    assert torch.equal(again.as_tensor(), wanted)
