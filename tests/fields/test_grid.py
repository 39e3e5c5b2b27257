import numpy as np
import pytest
import torch

from monai_drdm.fields import identity_grid
from monai_drdm.fields.grid import check_ddf, check_same_grid, field_dtype, sampling_grid, to_grid_sample


def test_identity_grid_holds_the_array_indices(shape, dtype):
    grid = identity_grid(shape, dtype=dtype)
    assert grid.dtype == dtype
    np.testing.assert_array_equal(grid.numpy(), np.indices(shape))


def test_identity_grid_is_float32_by_default():
    assert identity_grid((3, 4)).dtype == torch.float32


def test_to_grid_sample_equals_torch_affine_grid(shape):
    dims = len(shape)
    theta = torch.eye(dims, dims + 1, dtype=torch.float64)[None]
    expected = torch.nn.functional.affine_grid(theta, [1, 1, *shape], align_corners=True)
    actual = to_grid_sample(identity_grid(shape, dtype=torch.float64)[None], shape)
    torch.testing.assert_close(actual, expected)


def test_to_grid_sample_puts_the_last_array_axis_first():
    grid = to_grid_sample(torch.tensor([[0.0, 6.0]]).view(1, 2, 1, 1), (5, 7))  # first row, last column
    assert grid.flatten().tolist() == [1.0, -1.0]


def test_to_grid_sample_ignores_coordinates_along_an_axis_of_length_1():
    grid = to_grid_sample(torch.tensor([[2.5, 0.0]]).view(1, 2, 1, 1), (1, 7))
    assert grid.flatten().tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_sampling_grid_of_an_affine_field_equals_torch_affine_grid(shape, affine_ddf, requires_grad):
    dims = len(shape)
    matrix = np.eye(dims) + np.linspace(-0.2, 0.3, dims * dims).reshape(dims, dims)
    ddf = affine_ddf(matrix, np.zeros(dims), shape).requires_grad_(requires_grad)
    half = (np.array(shape)[::-1] - 1) / 2  # voxels that 1 stands for, last axis first
    theta = torch.from_numpy(np.column_stack([matrix[::-1, ::-1] * half / half[:, None], np.zeros(dims)]))[None]
    expected = torch.nn.functional.affine_grid(theta, [1, 1, *shape], align_corners=True)
    torch.testing.assert_close(sampling_grid(ddf), expected)


def test_sampling_grid_ignores_displacement_along_an_axis_of_length_1():
    assert torch.equal(sampling_grid(torch.full((1, 2, 1, 3), 5.0))[..., 1], torch.zeros(1, 1, 3))


def test_sampling_grid_passes_gradients_to_the_field():
    ddf = torch.zeros(1, 2, 5, 7, requires_grad=True)
    sampling_grid(ddf).sum().backward()
    assert torch.equal(ddf.grad[0, 0], torch.full((5, 7), 2 / 4))
    torch.testing.assert_close(ddf.grad[0, 1], torch.full((5, 7), 2 / 6))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float32, torch.float16], torch.float32),
        ([torch.float16], torch.float32),
        ([torch.bfloat16, torch.uint8], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([torch.int64], torch.float32),
    ],
)
def test_field_dtype_is_never_below_float32(dtypes, expected):
    assert field_dtype(*(torch.zeros(1, dtype=d) for d in dtypes)) == expected


@pytest.mark.parametrize("dims", [2, 3])
def test_check_ddf_returns_the_dimensions(dims):
    assert check_ddf(torch.zeros(1, dims, *(4,) * dims), "f") == dims


@pytest.mark.parametrize(
    "size",
    [(2, 4, 4), (1, 3, 4, 4), (1, 2, 4, 4, 4), (1, 1, 4), (1, 4, 2, 2, 2, 2), (1, 2, 0, 4), (0, 2, 4, 4)],
    ids=str,
)
def test_check_ddf_names_what_has_the_wrong_shape(size):
    with pytest.raises(ValueError, match=r"stir: spoon must have shape \(B, D, \*S\)") as error:
        check_ddf(torch.zeros(size), "stir", "spoon")
    assert str(tuple(size)) in str(error.value)


@pytest.mark.parametrize(
    ("value", "got"),
    [(torch.zeros(1, 2, 4, 4, dtype=torch.int64), "torch.int64"), (np.zeros((1, 2, 4, 4)), "ndarray"), (None, "None")],
    ids=["int64", "numpy", "none"],
)
def test_check_ddf_wants_a_floating_tensor(value, got):
    with pytest.raises(TypeError, match=f"stir: spoon must be a floating tensor.*{got}"):
        check_ddf(value, "stir", "spoon")


@pytest.mark.parametrize(("first", "second"), [(1, 1), (3, 3), (1, 3), (3, 1)])
def test_check_same_grid_accepts_equal_and_single_batches(first, second):
    check_same_grid(torch.zeros(first, 2, 4, 5), torch.zeros(second, 7, 4, 5), "f", ("a", "b"))


def test_check_same_grid_names_both_arguments():
    with pytest.raises(ValueError, match=r"stir: cup and pot must share one grid.*\(4, 5\) and \(5, 4\)"):
        check_same_grid(torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 5, 4), "stir", ("cup", "pot"))
    with pytest.raises(ValueError, match="stir: batch sizes of cup and pot must be equal or 1, got 2 and 3"):
        check_same_grid(torch.zeros(2, 2, 4, 5), torch.zeros(3, 2, 4, 5), "stir", ("cup", "pot"))
