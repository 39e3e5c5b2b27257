from __future__ import annotations

import numpy as np
import pytest
import SimpleITK
import torch
from monai.apps.detection.transforms.box_ops import convert_box_to_mask, convert_mask_to_box
from monai.data import MetaTensor
from monai.data.box_utils import convert_box_mode
from monai.transforms import Compose
from scipy.ndimage import center_of_mass, map_coordinates
from scipy.spatial.transform import Rotation
from torch.utils._python_dispatch import TorchDispatchMode

from monai_drdm import ApplyDDFd, RandDRDMDeformd
from monai_drdm.fields import exp_svf, identity_grid
from monai_drdm.transforms.points import Motion, move_boxes

SHAPES = {"2d": (48, 40), "3d": (26, 24, 22)}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
MODES = {2: ["xyxy", "xxyy"], 3: ["xyzxyz", "xxyyzz", "xyxyzz"]}


def apply(ddf, sample, **options):
    return ApplyDDFd("image", ddf, **options)(sample)


def moved(ddf, points, affine=None, **options):
    """Landmarks after a field, and their validity."""
    shape = ddf.shape[1:]
    image = torch.zeros(1, *shape) if affine is None else MetaTensor(torch.zeros(1, *shape), affine=affine)
    out = apply(ddf, {"image": image, "p": points}, point_keys="p", **options)
    return torch.as_tensor(out["p"]).as_subclass(torch.Tensor), torch.as_tensor(out["p_valid"])


def moved_boxes(ddf, boxes, box_mode="standard"):
    out = apply(ddf, {"image": torch.zeros(1, *ddf.shape[1:]), "b": boxes}, box_keys="b", box_mode=box_mode)
    return out["b"].as_tensor()


def constant(shift, shape):
    return torch.tensor(shift).view(-1, *(1,) * len(shape)).expand(-1, *shape).clone()


def linear(matrix, shift, shape, dtype=torch.float32):
    """The field with ``x + ddf(x) = matrix (x - centre) + centre + shift``."""
    x = identity_grid(shape, dtype=torch.float64)
    centre = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64).view(-1, *(1,) * len(shape))
    change = torch.as_tensor(matrix, dtype=torch.float64) - torch.eye(len(shape), dtype=torch.float64)
    offset = torch.tensor(shift, dtype=torch.float64).view(-1, *(1,) * len(shape))
    return (torch.tensordot(change, x - centre, dims=1) + offset).to(dtype)


def velocity(x, shape):
    """An analytic velocity at points ``(…, D)`` of several voxels that vanishes on the border."""
    size = np.asarray(shape, dtype=float) - 1
    window = np.prod(np.sin(np.pi * np.clip(x / size, 0, 1)) ** 2, axis=-1)
    parts = [np.cos(2 * np.pi * x[..., d - 1] / size[d - 1] + d) + 0.3 * d for d in range(len(shape))]
    return 3.5 * window[..., None] * np.stack(parts, axis=-1)


def svf(shape):
    return torch.from_numpy(
        np.moveaxis(velocity(np.moveaxis(identity_grid(shape).double().numpy(), 0, -1), shape), -1, 0)
    )


def flow_of(shape, strength=1.0):
    """A diffeomorphic field of several voxels."""
    return exp_svf(strength * svf(shape)[None])[0]


def trace(points, shape, sign, steps=400):
    """Runge-Kutta of order 4 along ``sign · velocity`` for unit time."""
    x, h = np.asarray(points, dtype=float).copy(), sign / steps
    for _ in range(steps):
        a = velocity(x, shape)
        b = velocity(x + h / 2 * a, shape)
        c = velocity(x + h / 2 * b, shape)
        d = velocity(x + h * c, shape)
        x += h / 6 * (a + 2 * b + 2 * c + d)
    return x


def random_points(shape, count, margin=3.0, channels=1, seed=0):
    size = np.asarray(shape, dtype=float)
    return np.random.default_rng(seed).uniform(margin, size - 1 - margin, (channels, count, len(shape)))


def random_affine(dims):
    """Oblique, anisotropic and mirrored."""
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", (20, -35, 50) if dims == 3 else (0, 0, 50), degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.diag([-0.7, 1.3, 2.5 if dims == 3 else 1.0])
    affine[:3, 3] = (-40, 75, 12 if dims == 3 else 0)
    return torch.from_numpy(affine)


# ---------------------------------------------------------------------------------------------------------- landmarks


@each_shape
def test_translation(shape):
    shift = [2.25, -1.5, 3.0][: len(shape)]
    points = random_points(shape, 20, margin=4)
    out, valid = moved(constant(shift, shape), points)
    np.testing.assert_allclose(out.numpy(), points - shift, atol=1e-9)
    assert valid.all()
    assert valid.shape == (1, 20)


@each_shape
def test_affine_field(shape):
    dims = len(shape)
    matrix = np.eye(dims) + 0.15 * np.random.default_rng(1).standard_normal((dims, dims))
    shift = np.array([1.0, -2.0, 0.5][:dims])
    points, centre = random_points(shape, 30, margin=8), (np.array(shape) - 1) / 2
    out, valid = moved(linear(matrix, shift, shape), points)
    expected = (points - centre - shift) @ np.linalg.inv(matrix).T + centre
    inside = ((expected > 0) & (expected < np.array(shape) - 1)).all(axis=-1)
    assert inside.mean() > 0.8
    np.testing.assert_allclose(out.numpy()[inside], expected[inside], atol=2e-3)
    assert valid.numpy()[inside].all()


@pytest.mark.parametrize("shape", [(64, 56), (52, 48, 44)], ids=["2d", "3d"])
def test_path_of_the_flow(shape):
    """The image moves by ``exp(v)`` pulled back, so a landmark follows ``dx/dt = -v(x)``."""
    ddf, points = flow_of(shape), random_points(shape, 200)
    assert float(ddf.abs().max()) > 3
    out, valid = moved(ddf, points)
    expected = trace(points, shape, -1)
    assert np.linalg.norm(expected - points, axis=-1).max() > 3
    assert np.linalg.norm(out.numpy() - expected, axis=-1).max() < 0.1
    assert valid.all()
    assert np.linalg.norm(out.numpy() - trace(points, shape, 1), axis=-1).max() > 3  # the other direction is wrong


@each_shape
def test_simpleitk_inverse(shape):
    dims, spacing = len(shape), [0.8, 1.5, 2.2][: len(shape)]
    ddf, points = flow_of(shape), random_points(shape, 40)
    components = [SimpleITK.GetImageFromArray((ddf[d].numpy() * spacing[d]).T.copy()) for d in range(dims)]
    field = SimpleITK.Compose(components)
    field.SetSpacing(spacing)
    inverse = SimpleITK.InvertDisplacementField(
        field, maximumNumberOfIterations=200, maxErrorToleranceThreshold=1e-3, meanErrorToleranceThreshold=1e-5
    )
    transform = SimpleITK.DisplacementFieldTransform(inverse)
    out, _ = moved(ddf, points)
    expected = [np.array(transform.TransformPoint((point * spacing).tolist())) / spacing for point in points[0]]
    assert np.linalg.norm(out[0].numpy() - expected, axis=-1).max() < 0.1


@each_shape
def test_blob_is_where_the_landmark_is(shape):
    ddf = flow_of(shape, 0.7 if len(shape) == 2 else 0.5)
    centres = random_points(shape, 8, margin=7)
    x = identity_grid(shape).double()
    blobs = [torch.exp(-((x - torch.from_numpy(c).view(-1, *(1,) * len(shape))) ** 2).sum(0) / 2) for c in centres[0]]
    sample = {"image": torch.stack(blobs), "p": centres}
    for transform in (
        ApplyDDFd("image", ddf, point_keys="p"),
        lambda s: RandDRDMDeformd("image", point_keys="p")(s, field=ddf),
    ):
        out = transform(sample)
        seen = np.array([center_of_mass(blob) for blob in out["image"].numpy()])
        assert np.linalg.norm(seen - centres[0], axis=-1).max() > 1
        assert np.linalg.norm(seen - out["p"].numpy()[0], axis=-1).max() < 0.35


@each_shape
def test_random_field(small_network, scan, shape):
    """Where the transform draws its own field, the landmark satisfies ``q + ddf(q) = p``."""
    transform = RandDRDMDeformd("image", network=small_network(len(shape), working_size=16), prob=1.0, point_keys="p")
    points = np.round(random_points(shape, 30))
    out = transform.set_random_state(3)({**scan(shape), "p": points})
    ddf = transform.last.ddf.double().numpy()
    q = out["p"].numpy()[0]
    there = np.stack([map_coordinates(component, q.T, order=1, mode="nearest") for component in ddf], axis=-1)
    good = out["p_valid"].numpy()[0]
    assert good.mean() > 0.5
    np.testing.assert_allclose((q + there)[good], points[0][good], atol=5e-3)


@each_shape
def test_voxel_and_world_agree(shape):
    dims, ddf, points = len(shape), flow_of(shape), random_points(shape, 30, channels=2)
    affine = random_affine(dims)
    matrix, origin = affine[:dims, :dims].numpy(), affine[:dims, 3].numpy()
    voxels, valid = moved(ddf, points, affine)
    world, world_valid = moved(ddf, points @ matrix.T + origin, affine, point_space="world")
    np.testing.assert_allclose(world.numpy(), voxels.numpy() @ matrix.T + origin, atol=1e-6)
    assert torch.equal(valid, world_valid)
    assert np.abs(voxels.numpy() - points).max() > 1


@pytest.mark.parametrize("fires", [True, False])
def test_world_mask(small_network, fires):
    shape = (20, 20)
    image = MetaTensor(torch.rand(1, *shape), affine=random_affine(2))
    matrix, origin = image.affine[:2, :2].numpy(), image.affine[:2, 3].numpy()
    voxels = np.array([[[5.0, 5.0], [-3.0, 5.0], [5.0, 23.0], [np.nan, 3.0]]])
    sample = {"image": image, "p": voxels @ matrix.T + origin}
    if fires:
        out = ApplyDDFd("image", torch.zeros(2, *shape), point_keys="p", point_space="world")(sample)
    else:
        network = small_network(2)
        out = RandDRDMDeformd("image", network=network, prob=0.0, point_keys="p", point_space="world")(sample)
    assert out["p_valid"].tolist() == [[True, False, False, False]]
    np.testing.assert_allclose(out["p"].numpy(), sample["p"], atol=1e-9)


def test_mask_of_points_that_leave_and_enter():
    ddf = constant([4.0, 0.0], (20, 20))  # everything moves by -4 along the first axis
    points = torch.tensor([[[10.0, 5.0], [2.0, 5.0], [3.6, 5.0], [21.0, 5.0], [-8.0, 5.0], [10.0, 19.4], [10.0, 19.6]]])
    out, valid = moved(ddf, points)
    torch.testing.assert_close(out, points - torch.tensor([4.0, 0.0]))
    assert valid.dtype == torch.bool
    assert valid.tolist() == [[True, False, True, False, False, True, False]]


def test_mask_of_points_without_a_place():
    """Where the field folds everything away, no point of the warped image shows the landmark."""
    row = identity_grid((21, 21))[0]
    none = torch.zeros(21, 21)
    torn = torch.stack([torch.where(row < 10, -3.0, 3.0), none])  # what was at 7 to 13 is squeezed between two rows
    hidden = torch.stack([torch.where(row > 8, 0.0, -row), none])  # rows 0 to 8 all show row 0
    for field in (torn, hidden):
        points = torch.stack(torch.meshgrid(torch.arange(1.0, 20), torch.arange(1.0, 20), indexing="ij"), -1).view(
            1, -1, 2
        )
        out, valid = moved(field, points)
        lower = out[0, :, 0].floor().clamp(0, 19).long()
        part = out[0, :, 0].clamp(0, 20) - lower
        profile = field[0, :, 0]
        shown = out[0, :, 0] + profile[lower] * (1 - part) + profile[lower + 1] * part
        assert valid.any()
        assert ((shown - points[0, :, 0]).abs()[valid[0]] < 0.02).all()


@each_shape
@pytest.mark.parametrize("space", ["voxel", "world"])
def test_nan_rows(shape, space):
    points = random_points(shape, 6)
    points[0, 1] = np.nan
    points[0, 4, 0] = np.nan
    ddf = flow_of(shape)
    out, valid = moved(ddf, points, random_affine(len(shape)) if space == "world" else None, point_space=space)
    assert torch.isnan(out[0, 1]).all()
    assert torch.isnan(out[0, 4]).any()
    assert not valid[0, [1, 4]].any()
    assert torch.isfinite(out[0, [0, 2, 3, 5]]).all()
    if space == "voxel":
        others, _ = moved(ddf, points[:, [0, 2, 3, 5]])
        torch.testing.assert_close(out[:, [0, 2, 3, 5]], others, rtol=0, atol=1e-6)


def test_mask_where_the_transform_does_not_fire(small_network):
    points = torch.tensor([[[3.0, 3.0], [-2.0, 3.0], [3.0, float("nan")], [19.4, 19.4], [19.6, 3.0]]])
    sample = {"image": torch.rand(1, 20, 20), "p": points}
    out = RandDRDMDeformd("image", network=small_network(2), prob=0.0, point_keys="p")(sample)
    torch.testing.assert_close(out["p"].as_tensor(), points, equal_nan=True, rtol=0, atol=0)
    assert out["p_valid"].tolist() == [[True, False, False, True, False]]
    assert out["p_valid"].dtype == torch.bool


def test_chained_transforms_and_the_mask():
    there, back = constant([4.0, 0.0], (20, 20)), constant([-4.0, 0.0], (20, 20))
    points = torch.tensor([[[10.0, 5.0], [2.0, 5.0], [18.0, 5.0]]])
    sample = {"image": torch.zeros(1, 20, 20), "p": points}
    chain = Compose([ApplyDDFd("image", there, point_keys="p"), ApplyDDFd("image", back, point_keys="p")])
    out = chain(sample)
    torch.testing.assert_close(out["p"].as_tensor(), points)
    assert out["p_valid"].tolist() == [[True, False, True]]  # the second was outside in between
    for mask in (np.array([[True, True, False]]), torch.tensor([[True, True, False]])):
        assert apply(there, {**sample, "p_valid": mask}, point_keys="p")["p_valid"].tolist() == [[True, False, False]]


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 4, dtype=torch.bool),
        torch.ones(3, dtype=torch.bool),
        torch.ones(1, 3),
        torch.ones(1, 3, dtype=torch.int64),
        np.ones((3, 1), dtype=bool),
    ],
)
def test_something_else_where_the_mask_goes(small_network, mask):
    sample = {"image": torch.rand(1, 20, 20), "p": torch.ones(1, 3, 2), "p_valid": mask}
    with pytest.raises(ValueError, match="'p_valid' is where the validity of points goes"):
        apply(torch.zeros(2, 20, 20), sample, point_keys="p")
    with pytest.raises(ValueError, match="'p_valid' is where the validity of points goes"):
        RandDRDMDeformd("image", network=small_network(2), prob=0.0, point_keys="p")(sample)


@each_shape
def test_channels_and_no_points(shape):
    ddf, points = flow_of(shape), random_points(shape, 7, channels=3)
    out, valid = moved(ddf, points)
    assert out.shape == points.shape
    assert valid.shape == (3, 7)
    for channel in range(3):
        alone, _ = moved(ddf, points[channel : channel + 1])
        torch.testing.assert_close(out[channel], alone[0], rtol=0, atol=2e-3)
    for none in ((2, 0), (1, 0), (0, 5)):
        out, valid = moved(ddf, torch.zeros(*none, len(shape)))
        assert out.shape == (*none, len(shape))
        assert valid.shape == none


@pytest.mark.parametrize("fires", [True, False])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.uint8, torch.float32),
        (torch.int16, torch.float32),
        (torch.int64, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_types(small_network, dtype, expected, fires):
    points, ddf = torch.tensor([[[5, 6], [9, 3]]]).to(dtype), constant([1.5, -0.25], (20, 20))
    transform = RandDRDMDeformd("image", network=small_network(2), prob=0.0, point_keys="p")
    for given in (points, points.numpy(), MetaTensor(points.clone())):
        sample = {"image": torch.zeros(1, 20, 20), "p": given}
        out = transform(sample, field=ddf) if fires else transform(sample)
        assert out["p"].dtype == expected
        shift = torch.tensor([1.5, -0.25]) if fires else torch.zeros(2)
        torch.testing.assert_close(out["p"].as_tensor(), points.to(expected) - shift.to(expected))


@pytest.mark.parametrize("kind", ["numpy", "tensor", "metatensor", "big endian", "strided"])
@pytest.mark.parametrize("fires", [True, False])
def test_inputs_are_left_alone(small_network, kind, fires):
    values = random_points((20, 20), 5, channels=2)
    points = {
        "numpy": values.copy(),
        "tensor": torch.from_numpy(values.copy()),
        "metatensor": MetaTensor(torch.from_numpy(values.copy()), meta={"who": "me"}),
        "big endian": values.astype(">f8"),
        "strided": values.copy()[:, ::-1],
    }[kind]
    boxes = np.array([[2.0, 3.0, 8.0, 9.0]])
    before = np.asarray(points).copy()
    sample = {"image": torch.rand(1, 20, 20), "p": points, "b": boxes}
    transform = RandDRDMDeformd("image", network=small_network(2), prob=0.0, point_keys="p", box_keys="b")
    out = transform(sample, field=flow_of((20, 20))) if fires else transform(sample)
    assert set(sample) == {"image", "p", "b"}
    assert sample["p"] is points
    assert np.array_equal(np.asarray(points), before)
    assert boxes.tolist() == [[2.0, 3.0, 8.0, 9.0]]
    if fires:  # else they share memory, as in MONAI
        out["p"] += 1
        out["b"] += 1
    assert np.array_equal(np.asarray(points), before)
    assert boxes.tolist() == [[2.0, 3.0, 8.0, 9.0]]
    if kind == "metatensor":
        assert out["p"].meta["who"] == "me"
        assert points.applied_operations == []


@each_shape
@pytest.mark.parametrize("space", ["voxel", "world"])
def test_inverse_of_landmarks(shape, space):
    points = random_points(shape, 50, channels=2)
    points[0, 3] = np.nan
    image = MetaTensor(torch.rand(1, *shape), affine=random_affine(len(shape)))
    if space == "world":
        points = points @ image.affine[: len(shape), : len(shape)].numpy().T + image.affine[: len(shape), -1].numpy()
    transform = ApplyDDFd("image", flow_of(shape), point_keys="p", point_space=space)
    for given in (points, points.astype(np.float32)):
        out = transform({"image": image, "p": given})
        back = transform.inverse(out)
        known = np.isfinite(points)
        assert np.nanmax(np.abs(out["p"].numpy() - points)) > 1
        np.testing.assert_allclose(back["p"].numpy()[known], points[known], atol=3e-3 if space == "world" else 1e-3)
        assert np.isnan(back["p"].numpy()[0, 3]).all()
        assert back["p"].dtype == out["p"].dtype
        assert torch.equal(back["p_valid"], out["p_valid"])
        assert back["p"].applied_operations == []


def test_inverse_of_random_deformation(small_network, scan):
    shape = (32, 28)
    transform = RandDRDMDeformd("image", network=small_network(2), prob=1.0, point_keys="p").set_random_state(4)
    points = random_points(shape, 40)
    out = transform({**scan(shape), "p": points})
    good = out["p_valid"].numpy()
    assert good.mean() > 0.5
    back = transform.inverse(out)["p"].numpy()
    # those without a place are only as good as the solution; a record keeps the field to 1e-3 voxel
    np.testing.assert_allclose(back[good], points[good], atol=0.012)


def test_world_needs_an_affine(small_network):
    sample = {"image": torch.rand(1, 20, 20), "p": torch.ones(1, 3, 2)}
    with pytest.raises(ValueError, match="point_space='world' needs the affine of 'image'"):
        apply(torch.zeros(2, 20, 20), sample, point_keys="p", point_space="world")
    for prob in (0.0, 1.0):
        transform = RandDRDMDeformd("image", network=small_network(2), prob=prob, point_keys="p", point_space="world")
        with pytest.raises(ValueError, match="point_space='world' needs the affine of 'image'"):
            transform(sample)


def test_world_needs_no_affine_without_landmarks():
    out = apply(
        constant([1.0, 0.0], (20, 20)),
        {"image": torch.rand(1, 20, 20)},
        point_keys="p",
        point_space="world",
        allow_missing_keys=True,
    )
    assert set(out) == {"image"}


def test_singular_affine():
    affine = torch.eye(4, dtype=torch.float64)
    affine[:, 1] = affine[:, 0]
    with pytest.raises(ValueError, match="cannot be inverted"):
        moved(torch.zeros(3, 8, 8, 8), torch.ones(1, 2, 3), affine, point_space="world")


@pytest.mark.parametrize("fires", [True, False])
@pytest.mark.parametrize(
    ("points", "error", "match"),
    [
        (torch.zeros(5, 2), ValueError, r"'p' must hold points \(C, N, 2\)"),
        (torch.zeros(1, 5, 3), ValueError, r"'p' must hold points \(C, N, 2\)"),
        (torch.zeros(1, 1, 5, 2), ValueError, r"'p' must hold points \(C, N, 2\)"),
        (torch.zeros(1, 5, 2, dtype=torch.complex64), TypeError, "real numeric"),
        (np.zeros((1, 5, 2), dtype=complex), TypeError, "real numeric"),
        (np.array([[["a", "b"]]]), TypeError, "'p'"),
        (np.array([[[1.0, None]]], dtype=object), TypeError, "'p'"),
        ([[[1.0, 2.0]]], TypeError, "'p' must be a numpy array or tensor, got list"),
        (None, TypeError, "'p' must be a numpy array or tensor, got NoneType"),
    ],
)
def test_wrong_landmarks(small_network, fires, points, error, match):
    transform = RandDRDMDeformd("image", network=small_network(2), prob=0.0, point_keys="p")
    sample = {"image": torch.rand(1, 20, 20), "p": points}
    with pytest.raises(error, match=match):
        transform(sample, field=torch.zeros(2, 20, 20)) if fires else transform(sample)


@pytest.mark.parametrize("kind", ["point_keys", "box_keys"])
def test_missing_keys(small_network, kind):
    sample = {"image": torch.rand(1, 20, 20)}
    options = {"network": small_network(2), "prob": 0.0, kind: "p"}
    with pytest.raises(KeyError, match="`p` of transform `RandDRDMDeformd` was missing"):
        RandDRDMDeformd("image", **options)(sample)
    with pytest.raises(KeyError, match="`p` of transform `ApplyDDFd` was missing"):
        apply(torch.zeros(2, 20, 20), sample, **{kind: "p"})
    assert set(RandDRDMDeformd("image", **options, allow_missing_keys=True)(sample)) == {"image"}
    assert set(apply(torch.zeros(2, 20, 20), sample, **{kind: "p"}, allow_missing_keys=True)) == {"image"}


@pytest.mark.parametrize(
    "options",
    [
        {"point_keys": "image"},
        {"box_keys": "image"},
        {"point_keys": "p", "box_keys": "p"},
        {"point_keys": ("p", "p")},
        {"box_keys": ("b", "b")},
    ],
)
def test_overlapping_keys(options):
    with pytest.raises(ValueError, match="must name each entry once"):
        RandDRDMDeformd("image", **options)
    with pytest.raises(ValueError, match="must name each entry once"):
        ApplyDDFd("image", torch.zeros(2, 4, 4), **options)


def test_unknown_space():
    for make in (lambda **o: RandDRDMDeformd("image", **o), lambda **o: ApplyDDFd("image", torch.zeros(2, 4, 4), **o)):
        with pytest.raises(ValueError, match="point_space must be one of"):
            make(point_keys="p", point_space="mm")


# -------------------------------------------------------------------------------------------------------------- boxes


def random_boxes(shape, count, low, high, margin, seed=0):
    """Boxes with edges at whole numbers: lower corner, upper corner."""
    random = np.random.default_rng(seed)
    sides = random.integers(low, high, (count, len(shape)))
    start = random.integers(margin, np.array(shape) - margin - sides + 1)
    return torch.from_numpy(np.concatenate([start, start + sides], axis=1)).double()


@each_shape
def test_boxes_translation(shape):
    shift = torch.tensor([2.25, -1.5, 3.0][: len(shape)], dtype=torch.float64)
    boxes = random_boxes(shape, 6, 1, 7, 4)
    out = moved_boxes(constant(shift.tolist(), shape), boxes)
    torch.testing.assert_close(out, boxes - shift.repeat(2), rtol=0, atol=1e-6)


def test_boxes_flat_or_large():
    ddf = constant([2.0, -1.0], (400, 30))
    boxes = torch.tensor([[0.0, 0.0, 400.0, 30.0], [5.0, 5.0, 5.0, 9.0], [7.0, 7.0, 7.0, 7.0]])
    torch.testing.assert_close(moved_boxes(ddf, boxes), boxes + torch.tensor([-2.0, 1.0, -2.0, 1.0]))


@each_shape
def test_boxes_stretched(shape):
    """An anisotropic magnification about the centre takes boxes to boxes."""
    factors = np.array([0.8, 1.25, 0.9][: len(shape)])  # x + ddf(x) = factors (x - c) + c
    centre = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64).repeat(2)
    boxes = random_boxes(shape, 6, 2, 7, 7)
    out = moved_boxes(linear(np.diag(factors), [0.0] * len(shape), shape), boxes)
    expected = (boxes - 0.5 - centre) / torch.from_numpy(factors).repeat(2) + centre + 0.5
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-3)


@each_shape
def test_box_of_the_deformed_mask(shape):
    ddf, boxes = flow_of(shape), random_boxes(shape, 6, 6, 10, 4)
    masks = convert_box_to_mask(boxes.long(), torch.ones(len(boxes), dtype=torch.long), shape, bg_label=0)
    out = apply(ddf, {"image": masks, "b": boxes}, box_keys="b", mode="nearest")
    expected, labels = convert_mask_to_box(out["image"].as_tensor(), bg_label=0)
    assert len(labels) == len(boxes)
    assert float((expected - boxes).abs().max()) > 2
    assert float((out["b"].as_tensor() - expected).abs().max()) < 1.1


@each_shape
def test_boxes_contain_what_they_contained(shape):
    ddf, boxes = flow_of(shape), random_boxes(shape, 5, 5, 10, 3)
    dims, random = len(shape), np.random.default_rng(0)
    out = moved_boxes(ddf, boxes).numpy()
    for before, after in zip(boxes.numpy(), out):
        points = random.uniform(before[:dims], before[dims:], (1, 2000, dims)) - 0.5  # edges to voxel centres
        followed = trace(points[0], shape, -1, steps=60) + 0.5
        assert (followed >= after[:dims] - 0.1).all()
        assert (followed <= after[dims:] + 0.1).all()
        # and it is tight: the moved points come close to every face
        assert np.abs(followed.min(axis=0) - after[:dims]).max() < 1
        assert np.abs(followed.max(axis=0) - after[dims:]).max() < 1


@each_shape
def test_corner_modes_agree(shape):
    dims, ddf = len(shape), flow_of(shape)
    standard = MODES[dims][0]
    boxes = random_boxes(shape, 5, 3, 9, 4)
    expected = moved_boxes(ddf, boxes, standard)
    torch.testing.assert_close(moved_boxes(ddf, boxes, "standard"), expected, rtol=0, atol=0)
    for mode in MODES[dims]:
        out = moved_boxes(ddf, convert_box_mode(boxes, standard, mode), mode)
        torch.testing.assert_close(convert_box_mode(out, mode, standard), expected, rtol=0, atol=1e-6)


@each_shape
@pytest.mark.parametrize("count", [0, 3])
def test_boxes_come_back_exactly(shape, count):
    transform = ApplyDDFd("image", flow_of(shape), box_keys="b")
    boxes = random_boxes(shape, 3, 4, 9, 4)[:count]
    for dtype in (torch.float32, torch.float64):
        out = transform({"image": torch.rand(1, *shape), "b": boxes.to(dtype)})
        assert out["b"].shape == boxes.shape
        assert out["b"].dtype == dtype
        back = transform.inverse(out)["b"]
        torch.testing.assert_close(back.as_tensor(), boxes.to(dtype), rtol=0, atol=0)
        assert back.applied_operations == []


@each_shape
def test_inverse_of_filtered_and_other_boxes(shape):
    """Boxes of a detector on the warped image return as those that enclose what they hold."""
    dims, transform = len(shape), ApplyDDFd("image", flow_of(shape), box_keys="b")
    boxes = random_boxes(shape, 4, 4, 9, 4)
    out = transform({"image": torch.rand(1, *shape), "b": boxes})
    other = random_boxes(shape, 1, 4, 9, 4, seed=5)
    kept = out["b"][[2, 0]]
    changed = MetaTensor(
        torch.cat([kept.as_tensor(), other]), meta=kept.meta, applied_operations=kept.applied_operations
    )
    back = transform.inverse({**out, "b": changed})["b"].as_tensor()
    torch.testing.assert_close(back[:2], boxes[[2, 0]], rtol=0, atol=0)
    inner = np.random.default_rng(1).uniform(other[0, :dims], other[0, dims:], (2000, dims)) - 0.5
    held = trace(inner, shape, 1, steps=60) + 0.5
    assert (held >= back[2, :dims].numpy() - 0.1).all()
    assert (held <= back[2, dims:].numpy() + 0.1).all()
    assert np.abs(held.min(axis=0) - back[2, :dims].numpy()).max() < 1


def test_boxes_that_the_transform_leaves_alone(small_network):
    boxes = torch.tensor([[2, 3, 8, 9], [-4, 0, 30, 5]])
    transform = RandDRDMDeformd("image", network=small_network(2), prob=0.0, box_keys="b")
    out = transform({"image": torch.rand(1, 20, 20), "b": boxes})
    assert out["b"].dtype == torch.float32  # as when it fires
    assert out["b"].tolist() == boxes.tolist()
    assert transform.inverse(out)["b"].tolist() == boxes.tolist()


def test_boxes_and_landmarks_in_one_call():
    """Points at the edges of a box, as voxel centres, stay on the box under a translation."""
    ddf = constant([1.5, -2.0], (30, 30))
    box, points = torch.tensor([[4.0, 5.0, 9.0, 12.0]]), torch.tensor([[[3.5, 4.5], [8.5, 11.5]]])
    out = apply(ddf, {"image": torch.zeros(1, 30, 30), "b": box, "p": points}, box_keys="b", point_keys="p")
    torch.testing.assert_close(out["b"].as_tensor(), out["p"].as_tensor().reshape(1, 4) + 0.5)


@pytest.mark.parametrize("mode", ["xywh", "ccwh", "xyzwhd", "corner", "", "XYXY"])
def test_unknown_box_mode(mode):
    with pytest.raises(ValueError, match="box_mode must be 'standard' or one of MONAI's corner modes"):
        RandDRDMDeformd("image", box_keys="b", box_mode=mode)
    with pytest.raises(ValueError, match="box_mode must be 'standard' or one of MONAI's corner modes"):
        ApplyDDFd("image", torch.zeros(2, 4, 4), box_keys="b", box_mode=mode)


@pytest.mark.parametrize(("shape", "mode"), [((20, 20), "xyzxyz"), ((8, 8, 8), "xyxy"), ((8, 8, 8), "xxyy")])
def test_box_mode_of_another_dimension(shape, mode):
    with pytest.raises(ValueError, match=f"box_mode must be one of .* for {len(shape)}D images"):
        moved_boxes(torch.zeros(len(shape), *shape), torch.zeros(1, 2 * len(shape)), mode)


@pytest.mark.parametrize("fires", [True, False])
@pytest.mark.parametrize(
    ("boxes", "match"),
    [
        (torch.tensor([[8.0, 3.0, 2.0, 9.0]]), "upper corners not below"),
        (torch.tensor([[2.0, 3.0, 8.0, float("nan")]]), "finite boxes"),
        (torch.tensor([[2.0, 3.0, float("inf"), 9.0]]), "finite boxes"),
        (torch.zeros(4), r"boxes \(N, 4\)"),
        (torch.zeros(1, 6), r"boxes \(N, 4\)"),
        (torch.zeros(1, 1, 4), r"boxes \(N, 4\)"),
    ],
)
def test_wrong_boxes(small_network, fires, boxes, match):
    transform = RandDRDMDeformd("image", network=small_network(2), prob=0.0, box_keys="b")
    sample = {"image": torch.rand(1, 20, 20), "b": boxes}
    with pytest.raises(ValueError, match=match):
        transform(sample, field=torch.zeros(2, 20, 20)) if fires else transform(sample)


def test_wrong_type_of_boxes():
    for boxes in ([[1.0, 2.0, 3.0, 4.0]], torch.zeros(1, 4, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="'b' must be"):
            moved_boxes(torch.zeros(2, 20, 20), boxes)


class Conversions(TorchDispatchMode):
    """Counts how often a tensor of some size or more is converted to another type."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].numel() >= self.numel:
            self.count += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("back", [False, True])
def test_a_field_is_converted_once_for_all_boxes(back):
    ddf = torch.full((3, 20, 22, 24), 1.5)
    low = torch.arange(8.0)[:, None].expand(-1, 3)
    counts = []
    for number in (1, 8):
        with Conversions(ddf.numel()) as counted:
            moved = move_boxes(torch.cat([low, low + 5], dim=1)[:number], Motion(ddf), "xyzxyz", back=back)
        counts.append(counted.count)
        assert torch.allclose(moved[:, :3], low[:number].double() + (1.5 if back else -1.5), atol=1e-4)
    assert counts == [1, 1]
