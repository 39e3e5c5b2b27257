import numpy as np
import pytest
import SimpleITK
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from monai.networks.blocks import Warp
from scipy import ndimage

from monai_drdm.fields import identity_grid, sample, warp, warp_points

SCIPY_MODES = {"border": "nearest", "zeros": "grid-constant", "reflection": "mirror"}
EXACT_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


@pytest.fixture
def image(shape, dtype, rng):
    return torch.from_numpy(rng.standard_normal((1, 2, *shape))).to(dtype)


@pytest.fixture
def ddf(shape, dtype, smooth_ddf):
    """Reaches several voxels beyond the grid."""
    return smooth_ddf(shape, 5.0, dtype=dtype, seed=3)


def resample_with_simpleitk(image, field, interpolator, extrapolate=False):
    moving = SimpleITK.GetImageFromArray(image)
    filter_ = SimpleITK.ResampleImageFilter()
    filter_.SetReferenceImage(moving)
    filter_.SetTransform(SimpleITK.DisplacementFieldTransform(field))
    filter_.SetInterpolator(interpolator)
    filter_.SetUseNearestNeighborExtrapolator(extrapolate)
    return SimpleITK.GetArrayFromImage(filter_.Execute(moving))


def inside_buffer(ddf, voxel_grid, slack=1e-3):
    """Voxels whose sampling point SimpleITK counts as inside: half a voxel beyond the outermost centres."""
    shape = ddf.shape[1:]
    position = voxel_grid(shape) + ddf.numpy()
    upper = np.array(shape).reshape(-1, *(1,) * len(shape)) - 0.5 - slack
    return ((position >= -0.5 + slack) & (position <= upper)).all(axis=0)


# against other tools


@pytest.mark.parametrize("types", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_the_wider_type_of_image_and_field_is_computed_in(shape, rng, types):
    """SciPy computes in float64; a float32 result has that one rounding only."""
    image = torch.from_numpy(rng.standard_normal((1, 1, *shape))).to(types[0])
    field = torch.from_numpy(rng.uniform(-2, 2, (1, len(shape), *shape))).to(types[1])
    position = np.indices(shape) + field[0].double().numpy()
    expected = ndimage.map_coordinates(image[0, 0].double().numpy(), position, order=1, mode="nearest")
    warped = warp(image, field)
    assert warped.dtype == types[0]
    np.testing.assert_allclose(
        warped[0, 0].numpy(), expected, rtol=1e-7, atol=1e-12 if types[0].itemsize == 8 else 1e-8
    )


def test_linear_equals_simpleitk_wherever_it_samples_inside(image, ddf, sitk_field, voxel_grid):
    warped = warp(image, ddf)[0, 0].numpy()
    expected = resample_with_simpleitk(image[0, 0].numpy(), sitk_field(ddf[0]), SimpleITK.sitkLinear)
    inside = inside_buffer(ddf[0], voxel_grid)
    assert 0.6 < inside.mean() < 1.0
    np.testing.assert_allclose(warped[inside], expected[inside], atol=2e-4)


def test_nearest_equals_simpleitk_everywhere(shape, ddf, sitk_field, rng):
    labels = rng.integers(-1000, 1000, shape, dtype=np.int16)
    warped = warp(torch.from_numpy(labels)[None, None], ddf, "nearest")[0, 0]
    expected = resample_with_simpleitk(labels, sitk_field(ddf[0]), SimpleITK.sitkNearestNeighbor, extrapolate=True)
    np.testing.assert_array_equal(warped.numpy(), expected)


@pytest.mark.filterwarnings("ignore:.*native grid_sample")
@pytest.mark.parametrize("padding_mode", ["border", "zeros", "reflection"])
def test_linear_equals_monai_warp(image, ddf, padding_mode):
    expected = Warp("bilinear", padding_mode)(image, ddf)
    torch.testing.assert_close(warp(image, ddf, "bilinear", padding_mode), expected, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*native grid_sample")
@pytest.mark.parametrize("padding_mode", ["border", "zeros", "reflection"])
def test_nearest_equals_monai_warp(shape, ddf, padding_mode):
    image = torch.arange(float(np.prod(shape)), dtype=ddf.dtype).view(1, 1, *shape)
    expected = Warp("nearest", padding_mode)(image, ddf)
    agree = (warp(image, ddf, "nearest", padding_mode) == expected).double().mean()
    assert agree >= (1.0 if ddf.dtype == torch.float64 else 0.999)  # MONAI's float32 rounding near half voxels


@pytest.mark.parametrize("padding_mode", SCIPY_MODES)
def test_linear_equals_scipy(shape, image, ddf, voxel_grid, padding_mode):
    position = voxel_grid(shape) + ddf[0].numpy()
    expected = [ndimage.map_coordinates(c, position, order=1, mode=SCIPY_MODES[padding_mode]) for c in image[0].numpy()]
    np.testing.assert_allclose(warp(image, ddf, "bilinear", padding_mode)[0].numpy(), expected, atol=2e-4)


def cubic_by_hand(image, position):
    """Cubic convolution with a = -0.75, the border value continued."""

    def kernel(t):
        t, a = np.abs(t), -0.75
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        return np.where(t <= 1, near, np.where(t < 2, far, 0.0))

    base = np.floor(position).astype(int)
    total = np.zeros(position.shape[1:])
    for i in range(-1, 3):
        for j in range(-1, 3):
            row, column = base[0] + i, base[1] + j
            value = image[row.clip(0, image.shape[0] - 1), column.clip(0, image.shape[1] - 1)]
            total += value * kernel(position[0] - row) * kernel(position[1] - column)
    return total


def test_bicubic_equals_cubic_convolution_by_hand(rng, smooth_ddf, voxel_grid):
    image, ddf = rng.standard_normal((25, 34)), smooth_ddf((25, 34), 5.0, dtype=torch.float64)
    warped = warp(torch.from_numpy(image)[None, None], ddf, "bicubic")[0, 0].numpy()
    np.testing.assert_allclose(warped, cubic_by_hand(image, voxel_grid((25, 34)) + ddf[0].numpy()), atol=1e-10)


@pytest.mark.parametrize("padding_mode", ["border", "zeros", "reflection"])
def test_bicubic_equals_grid_sample(rng, smooth_ddf, padding_mode):
    image = torch.from_numpy(rng.standard_normal((2, 3, 12, 19)))
    ddf = smooth_ddf((12, 19), 4.0, batch=2, dtype=torch.float64)
    row = (torch.arange(12.0)[:, None] + ddf[:, 0]) * 2 / 11 - 1
    column = (torch.arange(19.0) + ddf[:, 1]) * 2 / 18 - 1
    expected = F.grid_sample(image, torch.stack((column, row), -1), "bicubic", padding_mode, align_corners=True)
    torch.testing.assert_close(warp(image, ddf, "bicubic", padding_mode), expected)


# analytic cases


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "label"])
@pytest.mark.parametrize("padding_mode", ["border", "zeros", "reflection"])
def test_the_zero_field_changes_nothing(shape, dtype, mode, padding_mode):
    image = torch.arange(2.0 * np.prod(shape), dtype=dtype).view(1, 2, *shape)
    warped = warp(image, torch.zeros(1, len(shape), *shape, dtype=dtype), mode, padding_mode)
    torch.testing.assert_close(warped, image, atol=0, rtol=1e-5)


def test_warping_pulls_back_along_array_axes():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    ddf = torch.zeros(1, 2, 3, 4)
    ddf[:, 0] = 1.0
    assert warp(image, ddf)[0, 0].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11], [8, 9, 10, 11]]


@given(data=st.data(), shape=st.lists(st.integers(1, 9), min_size=2, max_size=3))
def test_whole_voxel_shifts_are_array_shifts(data, shape):
    shift = [data.draw(st.integers(-12, 12)) for _ in shape]
    image = np.arange(np.prod(shape), dtype=np.int64).reshape(shape) + 2**40
    index = np.ix_(*((np.arange(n) + s).clip(0, n - 1) for n, s in zip(shape, shift)))
    ddf = torch.tensor(shift, dtype=torch.float32).view(1, -1, *(1,) * len(shape)).expand(1, -1, *shape)
    tensor = torch.from_numpy(image)[None, None]
    for mode in ("nearest", "label"):
        np.testing.assert_array_equal(warp(tensor, ddf, mode)[0, 0].numpy(), image[index])
    linear = warp(tensor - 2**40, ddf)[0, 0].numpy()
    np.testing.assert_allclose(linear, image[index] - 2**40, atol=1e-2)


@pytest.mark.parametrize(("size", "moved"), [((1, 9), 0), ((9, 1), 1), ((1, 6, 7), 0), ((6, 7, 1), 2), ((1, 1, 5), 1)])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "label"])
@pytest.mark.parametrize("padding_mode", ["border", "zeros", "reflection"])
def test_an_axis_of_length_1_holds_its_value_everywhere(size, moved, mode, padding_mode):
    image = torch.arange(float(np.prod(size))).view(1, 1, *size)
    ddf = torch.zeros(1, len(size), *size)
    ddf[:, moved] = 3.7
    torch.testing.assert_close(warp(image, ddf, mode, padding_mode), image)


def test_bicubic_works_on_an_axis_of_length_1():
    image = torch.arange(9.0).view(1, 1, 1, 9)
    torch.testing.assert_close(warp(image, torch.zeros(1, 2, 1, 9), "bicubic"), image)


# dtypes


@pytest.mark.parametrize("padding_mode", ["border", "zeros"])
@pytest.mark.parametrize("image_dtype", EXACT_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_nearest_keeps_every_dtype_exactly(shape, smooth_ddf, voxel_grid, rng, image_dtype, padding_mode):
    ddf = smooth_ddf(shape, 4.0, dtype=torch.float64)
    bits = rng.integers(0, 2, shape) if image_dtype == torch.bool else rng.integers(0, 120, shape)
    image = torch.from_numpy(bits).to(image_dtype)
    index = np.rint(voxel_grid(shape) + ddf[0].numpy()).astype(int)
    clipped = [i.clip(0, n - 1) for i, n in zip(index, shape)]
    expected = bits[tuple(clipped)]
    if padding_mode == "zeros":
        expected = np.where((np.stack(clipped) == index).all(axis=0), expected, 0)
    warped = warp(image[None, None], ddf, "nearest", padding_mode)
    assert warped.dtype == image_dtype
    np.testing.assert_array_equal(warped[0, 0].to(torch.int64).numpy(), expected)


@pytest.mark.parametrize(
    ("image_dtype", "largest"),
    [
        (torch.int64, 2**63 - 1),
        (torch.int64, 2**24 + 1),
        (torch.int32, 2**31 - 1),
        (torch.uint16, 2**16 - 1),
        (torch.uint32, 2**32 - 1),
        (torch.uint64, 2**64 - 1),
    ],
)
@pytest.mark.parametrize("mode", ["nearest", "label"])
def test_ids_beyond_float32_survive(mode, image_dtype, largest):
    values = np.array([largest, largest - 1, largest - 2, 0] * 4, dtype=str(image_dtype).removeprefix("torch."))
    image = torch.from_numpy(values.reshape(1, 1, 4, 4))
    ddf = torch.zeros(1, 2, 4, 4)
    ddf[:, 1] = 1.2
    warped = warp(image, ddf, mode)
    assert warped.dtype == image_dtype
    assert warped[0, 0].numpy().tolist() == [[largest - 1, largest - 2, 0, 0]] * 4


@pytest.mark.parametrize("image_dtype", [torch.bool, torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("ddf_dtype", [torch.float16, torch.float32, torch.float64])
def test_linear_turns_integers_into_the_fields_float(image_dtype, ddf_dtype):
    image = torch.tensor([0, 1, 0, 1]).to(image_dtype).expand(1, 1, 3, 4)
    warped = warp(image, torch.full((1, 2, 3, 4), 0.25, dtype=ddf_dtype))
    assert warped.dtype == (torch.float64 if ddf_dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(warped[0, 0, 0], torch.tensor([0.25, 0.75, 0.25, 1.0], dtype=warped.dtype))


@pytest.mark.parametrize("image_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("ddf_dtype", [torch.float16, torch.float32, torch.float64])
def test_linear_keeps_floating_dtypes(image_dtype, ddf_dtype):
    image = torch.tensor([0.0, 1.0, 0.0, 1.0]).to(image_dtype).expand(1, 1, 3, 4)
    warped = warp(image, torch.full((1, 2, 3, 4), 0.25, dtype=ddf_dtype))
    assert warped.dtype == image_dtype
    assert warped[0, 0, 0].tolist() == pytest.approx([0.25, 0.75, 0.25, 1.0], abs=1e-2)


def test_coordinates_of_a_half_precision_field_are_not_rounded():
    image = torch.arange(3000.0).view(1, 1, 1, 3000)  # float16 cannot hold 2049
    warped = warp(image, torch.full((1, 2, 1, 3000), 0.5, dtype=torch.float16))
    torch.testing.assert_close(warped[0, 0, 0, 2048:2100], torch.arange(2048.5, 2100.5), atol=1e-3, rtol=0)


# batches and side effects


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "label"])
@pytest.mark.parametrize(("images", "fields"), [(3, 1), (1, 3), (3, 3)])
def test_a_batch_equals_its_samples_alone(shape, smooth_ddf, rng, mode, images, fields):
    image = torch.from_numpy(rng.integers(0, 9, (images, 2, *shape))).float()
    ddf = smooth_ddf(shape, 3.0, batch=fields)
    together = warp(image, ddf, mode)
    assert together.shape == (3, 2, *shape)
    for b in range(3):
        alone = warp(image[min(b, images - 1)][None], ddf[min(b, fields - 1)][None], mode)
        torch.testing.assert_close(together[b], alone[0], atol=0, rtol=0)


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "label"])
@pytest.mark.parametrize("padding_mode", ["border", "zeros", "reflection"])
def test_inputs_are_not_modified(image, ddf, mode, padding_mode):
    before = image.clone(), ddf.clone()
    warp(image, ddf, mode, padding_mode).zero_()
    assert torch.equal(image, before[0])
    assert torch.equal(ddf, before[1])


def test_strided_inputs_give_the_same_result(rng):
    image = torch.from_numpy(rng.standard_normal((1, 2, 9, 8))).transpose(2, 3)
    ddf = torch.from_numpy(rng.uniform(-2, 2, (1, 8, 9, 2))).movedim(-1, 1)
    for mode in ("bilinear", "nearest", "label"):
        assert torch.equal(warp(image, ddf, mode), warp(image.contiguous(), ddf.contiguous(), mode))


def test_gradients_reach_image_and_field(rng):
    image = torch.from_numpy(rng.standard_normal((1, 1, 4, 5))).requires_grad_()
    ddf = torch.from_numpy(rng.uniform(0.2, 0.8, (1, 2, 4, 5))).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, d: warp(i, d, "bilinear", "zeros"), (image, ddf))


# sampling at arbitrary places


def test_sample_takes_a_grid_of_another_shape(rng):
    image = rng.standard_normal((3, 9, 11))
    position = rng.uniform(-2, 12, (2, 4, 6))
    actual = sample(torch.from_numpy(image)[None], torch.from_numpy(position)[None])
    expected = [ndimage.map_coordinates(c, position, order=1, mode="nearest") for c in image]
    np.testing.assert_allclose(actual[0].numpy(), expected, atol=1e-12)


# errors


@pytest.mark.parametrize(
    ("error", "match", "image", "ddf", "options"),
    [
        (ValueError, "warp: image must have shape", torch.zeros(1, 4, 4), torch.zeros(1, 2, 4, 4), {}),
        (ValueError, "warp: image must have shape.*ndarray", np.zeros((1, 1, 4, 4)), torch.zeros(1, 2, 4, 4), {}),
        (ValueError, "warp: image must have shape", torch.zeros(1, 1, 4, 4), torch.zeros(1, 3, 4, 4, 4), {}),
        (ValueError, "warp: ddf must have shape", torch.zeros(1, 1, 4, 4), torch.zeros(2, 4, 4), {}),
        (ValueError, "warp: ddf must have shape", torch.zeros(1, 1, 4, 4), torch.zeros(1, 3, 4, 4), {}),
        (TypeError, "warp: ddf must be a floating", torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4).long(), {}),
        (TypeError, "warp: ddf must be a floating", torch.zeros(1, 1, 4, 4), np.zeros((1, 2, 4, 4)), {}),
        (ValueError, "image and ddf must share one grid", torch.zeros(1, 1, 4, 5), torch.zeros(1, 2, 4, 4), {}),
        (ValueError, "batch sizes of image and ddf", torch.zeros(2, 1, 4, 4), torch.zeros(3, 2, 4, 4), {}),
        (ValueError, "warp: mode must be", torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4), {"mode": "cubic"}),
        (
            ValueError,
            "padding_mode must be",
            torch.zeros(1, 1, 4, 4),
            torch.zeros(1, 2, 4, 4),
            {"padding_mode": "wrap"},
        ),
        (ValueError, "'bicubic'.*2D", torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4), {"mode": "bicubic"}),
    ],
)
def test_errors_name_function_and_argument(error, match, image, ddf, options):
    with pytest.raises(error, match=match):
        warp(image, ddf, **options)


# landmarks


def test_points_under_a_shift_move_against_it(shape):
    shift = torch.tensor([1.5, -2.0, 0.75])[: len(shape)]
    ddf = shift.view(1, -1, *(1,) * len(shape)).expand(1, -1, *shape)
    points = torch.tensor([[5.0, 6.0, 7.0], [8.25, 9.0, 3.0]])[None, :, : len(shape)]
    torch.testing.assert_close(warp_points(points, ddf), points - shift, atol=1e-3, rtol=0)


def test_points_under_a_rotation_equal_the_inverse_matrix(shape, dtype, affine_ddf, rotation, rng):
    dims, centre = len(shape), (np.array(shape) - 1) / 2
    matrix = rotation(20, dims)
    matrix[0] *= 1.1
    points = centre + rng.uniform(-3, 3, (9, dims))
    expected = centre + (points - centre) @ np.linalg.inv(matrix).T
    actual = warp_points(torch.from_numpy(points)[None].to(dtype), affine_ddf(matrix, np.zeros(dims), shape, dtype))
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual[0].numpy(), expected, atol=3e-3)


def test_points_solve_their_equation_on_a_sinusoid():
    x = torch.arange(64.0, dtype=torch.float64)
    ddf = torch.zeros(1, 2, 64, 40, dtype=torch.float64)
    ddf[0, 0] = (3 * torch.sin(2 * np.pi * x / 32))[:, None]
    points = torch.tensor([[[10.3, 5.0], [31.0, 20.2], [45.7, 39.0]]], dtype=torch.float64)
    moved = warp_points(points, ddf, tolerance=1e-6)[0].numpy()
    there = moved[:, 0] + 3 * np.sin(2 * np.pi * moved[:, 0] / 32)  # the analytic field, not its samples
    np.testing.assert_allclose(there, points[0, :, 0].numpy(), atol=0.03)
    np.testing.assert_allclose(moved[:, 1], points[0, :, 1].numpy(), atol=1e-6)


def test_points_follow_the_centre_of_a_warped_blob(shape, affine_ddf, rotation, voxel_grid):
    shape = tuple(2 * n for n in shape)
    dims, centre = len(shape), (np.array(shape) - 1) / 2
    ddf = affine_ddf(rotation(15, dims), np.linspace(1.5, -2.0, dims), shape, torch.float32)
    point = centre + np.linspace(3, -4, dims)
    distance = voxel_grid(shape) - point.reshape(-1, *(1,) * dims)
    blob = torch.from_numpy(np.exp(-0.5 * (distance**2).sum(axis=0) / 2.5**2))[None, None].float()
    found = ndimage.center_of_mass(warp(blob, ddf)[0, 0].numpy())
    moved = warp_points(torch.from_numpy(point)[None, None], ddf)
    np.testing.assert_allclose(moved[0, 0].numpy(), found, atol=0.02)


@pytest.mark.parametrize(("points", "fields"), [(3, 1), (1, 3), (3, 3)])
def test_points_and_fields_broadcast_over_the_batch(shape, smooth_ddf, rng, points, fields):
    ddf = smooth_ddf(shape, 2.0, batch=fields, dtype=torch.float64)
    landmarks = torch.from_numpy(rng.uniform(4, 9, (points, 5, len(shape))))
    together = warp_points(landmarks, ddf, tolerance=1e-8)
    assert together.shape == (3, 5, len(shape))
    for b in range(3):
        field = ddf[min(b, fields - 1)].numpy()
        moved = together[b].numpy()
        there = moved + np.stack([ndimage.map_coordinates(c, moved.T, order=1, mode="nearest") for c in field], 1)
        np.testing.assert_allclose(there, landmarks[min(b, points - 1)].numpy(), atol=1e-6)


def test_integer_points_come_back_floating():
    moved = warp_points(torch.tensor([[[3, 4]]]), torch.full((1, 2, 9, 9), 0.5))
    assert moved.dtype == torch.float32
    assert moved[0, 0].tolist() == pytest.approx([2.5, 3.5], abs=1e-3)


def test_points_are_not_modified(smooth_ddf):
    points, ddf = torch.full((1, 2, 2), 5.0), smooth_ddf((12, 13), 1.0)
    before = ddf.clone()
    warp_points(points, ddf)
    assert torch.equal(points, torch.full((1, 2, 2), 5.0))
    assert torch.equal(ddf, before)


@pytest.mark.parametrize("size", [(4, 2), (1, 4, 3), (1, 2, 4, 2)], ids=str)
def test_points_of_the_wrong_shape_are_refused(size):
    with pytest.raises(ValueError, match=r"warp_points: points must have shape \(B, N, 2\)"):
        warp_points(torch.zeros(size), torch.zeros(1, 2, 5, 5))


def test_points_want_a_floating_field():
    with pytest.raises(TypeError, match="warp_points: ddf"):
        warp_points(torch.zeros(1, 4, 2), torch.zeros(1, 2, 5, 5).long())


def test_warp_agrees_with_sample_on_the_identity_grid(image, ddf, shape):
    coordinates = identity_grid(shape, dtype=ddf.dtype)[None] + ddf
    torch.testing.assert_close(warp(image, ddf), sample(image, coordinates), atol=1e-4, rtol=0)


def test_sample_calls_itself_by_its_name_in_errors():
    image, at = torch.zeros(1, 1, 5, 6, 7), torch.zeros(1, 3, 2, 2, 2)
    for arguments in ({"mode": "bicubic"}, {"mode": "wrong"}, {"padding_mode": "wrong"}):
        with pytest.raises(ValueError, match=r"^sample: "):
            sample(image, at, **arguments)
    with pytest.raises(TypeError, match=r"^sample: image must be real"):
        sample(image.to(torch.complex64), at)
    with pytest.raises(TypeError, match=r"^warp: image must be real"):
        warp(image.to(torch.complex64), torch.zeros(1, 3, 5, 6, 7))
