from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, set_track_meta
from monai.networks.blocks import Warp

from monai_drdm import RandDRDMDeform
from monai_drdm.fields import fold_fraction
from monai_drdm.networks import load_network
from monai_drdm.transforms import DeformationParams

SHAPES_2D = [(40, 40), (33, 57), (7, 50), (1, 64), (64, 1), (1, 1), (5, 3)]
SHAPES_3D = [(20, 24, 18), (32, 32, 8), (1, 20, 30), (5, 1, 9)]


def deform(network, **options):
    return RandDRDMDeform(network, prob=1.0, **options)


@pytest.mark.parametrize("shape", SHAPES_2D + SHAPES_3D)
def test_any_shape_comes_back_at_its_size_and_finite(small_network, scan, shape):
    image = scan(shape)["image"]
    transform = deform(small_network(len(shape))).set_random_state(1)
    out = transform(image)
    assert out.shape == image.shape
    assert torch.isfinite(out).all()
    assert transform.last.ddf.shape == (len(shape), *shape)
    assert transform.last.statistics.fold_fraction <= 1e-4


def test_result_is_monai_warp_of_the_reported_field(small_network, scan):
    image = scan((48, 40))["image"]
    transform = deform(small_network(2), deformation_level=0.3).set_random_state(3)
    out = transform(image).as_tensor()
    expected = Warp(mode="bilinear", padding_mode="border")(image[None], transform.last.ddf[None])[0]
    # MONAI's Warp may use its own border handling; the interior is common ground
    torch.testing.assert_close(out[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-4, rtol=0)
    assert transform.last.ddf.abs().max() > 0.5


def test_field_moves_the_image(small_network, scan):
    image = scan((48, 48))["image"]
    assert not torch.allclose(deform(small_network(2)).set_random_state(0)(image).as_tensor(), image, atol=1e-2)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("kind", ["numpy", "tensor", "meta"])
def test_container_types(small_network, scan, kind, track):
    image = scan((24, 30))["image"]
    affine = torch.diag(torch.tensor([2.0, 1.5, 1.0, 1.0], dtype=torch.float64))
    data = {"numpy": image.numpy(), "tensor": image, "meta": MetaTensor(image, affine=affine, meta={"who": "me"})}[kind]
    before = torch.as_tensor(data).as_subclass(torch.Tensor).numpy().copy()
    set_track_meta(track)
    try:
        out = deform(small_network(2)).set_random_state(5)(data)
        idle = RandDRDMDeform(small_network(2), prob=0.0)(data)
    finally:
        set_track_meta(True)
    assert isinstance(out, MetaTensor) == track
    assert type(out) is type(idle)
    for one in (data, idle):  # the input is never modified, and not firing leaves the data alone
        np.testing.assert_array_equal(torch.as_tensor(one).as_subclass(torch.Tensor).numpy(), before)
    if track and kind == "meta":
        assert out.meta["who"] == "me"
        torch.testing.assert_close(out.affine, affine)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool])
def test_integers_become_float32_under_bilinear_and_stay_under_nearest(small_network, scan, dtype):
    image = (scan((30, 30))["image"] * 100).clamp(0, 120).to(dtype)
    assert deform(small_network(2)).set_random_state(1)(image).dtype == torch.float32
    out = deform(small_network(2), mode="nearest").set_random_state(1)(image)
    assert out.dtype == dtype
    assert set(out.unique().tolist()) <= set(image.unique().tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floating_types_are_kept(small_network, scan, dtype):
    out = deform(small_network(2)).set_random_state(1)(scan((30, 30))["image"].to(dtype))
    assert out.dtype == dtype


def test_same_seed_same_result_and_replay(small_network, scan):
    image = scan((40, 30))["image"]
    first, second = (deform(small_network(2)).set_random_state(7) for _ in range(2))
    out = first(image)
    torch.testing.assert_close(out, second(image), rtol=0, atol=0)
    torch.testing.assert_close(out, first(image, randomize=False), rtol=0, atol=0)
    record = DeformationParams.from_json(first.last.params.to_json())
    other = deform(small_network(2), deformation_level=0.9).set_random_state(1)
    torch.testing.assert_close(out, other(image, params=record), rtol=0, atol=0)
    assert other.last.params == record
    assert not torch.equal(out.as_tensor(), other(image).as_tensor())


def test_one_integer_is_drawn_whether_or_not_it_fires(small_network, scan):
    image = scan((20, 20))["image"]
    states = []
    for prob in (0.0, 1.0):
        transform = RandDRDMDeform(small_network(2), prob=prob).set_random_state(11)
        transform(image)
        states.append(transform.R.get_state()[2])
    assert states[0] == states[1]


def test_level_range_and_strength(small_network, scan):
    image = scan((64, 64))["image"]
    transform = deform(small_network(2), deformation_level=(0.2, 0.9), on_fold="keep").set_random_state(0)
    levels = []
    for _ in range(12):
        transform(image)
        levels.append(transform.last.params.deformation_level)
    assert all(0.2 <= level <= 0.9 for level in levels)
    assert max(levels) - min(levels) > 0.2
    means = []
    for level in (0.1, 0.8):
        weak = deform(small_network(2), deformation_level=level, on_fold="keep").set_random_state(0)
        weak(image)
        means.append(weak.last.statistics.mean_displacement_vox)
    assert means[1] > 3 * means[0]


def test_max_displacement_is_kept_in_millimetres(small_network, scan):
    image = MetaTensor(scan((40, 60))["image"], affine=torch.diag(torch.tensor([3.0, 0.5, 1.0, 1.0])))
    transform = deform(small_network(2), max_displacement_mm=2.5).set_random_state(2)
    transform(image)
    ddf = transform.last.ddf
    length = (ddf * torch.tensor([3.0, 0.5]).view(2, 1, 1)).norm(dim=0)
    assert length.max() == pytest.approx(2.5, rel=1e-4)
    assert transform.last.statistics.max_displacement_mm == pytest.approx(2.5, rel=1e-4)
    assert transform.last.statistics.scale < 1


def test_pixdim_stands_in_for_a_missing_affine(small_network, scan):
    image = scan((40, 60))["image"]
    with_pixdim = deform(small_network(2), pixdim=(3.0, 0.5)).set_random_state(2)
    with_affine = deform(small_network(2)).set_random_state(2)
    set_track_meta(False)
    try:
        plain = with_pixdim(image)
    finally:
        set_track_meta(True)
    meta = with_affine(MetaTensor(image, affine=torch.diag(torch.tensor([3.0, 0.5, 1.0, 1.0]))))
    torch.testing.assert_close(plain, meta.as_tensor(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(40, 30), (20, 24, 22)])
def test_another_default_dtype_changes_nothing(small_network, scan, shape):
    """In float64 as in float32, but for what rounding to the 16 bits of a drawn field may do."""
    image = scan(shape)["image"]
    usual = deform("auto", deformation_level=0.4).set_random_state(4)(image)
    torch.set_default_dtype(torch.float64)
    try:
        transform = deform(load_network(f"anatomy-{len(shape)}d"), deformation_level=0.4).set_random_state(4)
        other = transform(image)
    finally:
        torch.set_default_dtype(torch.float32)
    assert other.dtype == transform.last.ddf.dtype == torch.float32
    torch.testing.assert_close(other, usual, rtol=0, atol=2e-3)


def test_anisotropic_volume_moves_alike_in_millimetres(small_network):
    image = torch.rand(1, 32, 32, 8, generator=torch.Generator().manual_seed(0))
    transform = deform(small_network(3, working_size=16), pixdim=(1.0, 1.0, 4.0), on_fold="keep", deformation_level=0.5)
    rms = []
    for seed in range(4):
        transform.set_random_state(seed)(image)
        rms.append((transform.last.ddf * torch.tensor([1.0, 1.0, 4.0]).view(3, 1, 1, 1)).square().mean(dim=(1, 2, 3)))
    along = torch.stack(rms).mean(dim=0).sqrt()
    assert along.max() / along.min() < 1.6


@pytest.mark.parametrize("policy", ["rescale", "resample", "skip", "keep", "raise"])
def test_fold_policies(small_network, scan, policy):
    image = scan((40, 40))["image"]
    # a fold-free fast field still folds once a limit of zero meets a rough network
    network = small_network(2, working_size=16, scale=300.0)
    transform = deform(network, on_fold=policy, max_fold_fraction=0.0, deformation_level=1.0, sampler="reference")
    transform.set_random_state(4)
    if policy == "raise":
        with pytest.raises(ValueError, match="max_fold_fraction"):
            transform(image)
        return
    out = transform(image)
    folds = float(fold_fraction(transform.last.ddf[None])[0])
    statistics = transform.last.statistics
    assert statistics.fold_fraction == pytest.approx(folds)
    if policy == "keep":
        assert folds > 0
        assert statistics.fold_action == "keep"
        assert statistics.scale == 1
    elif policy == "skip":
        assert statistics.fold_action == "skip"
        torch.testing.assert_close(out.as_tensor(), image, rtol=0, atol=0)
        assert out.dtype == image.dtype
    else:
        assert folds == 0
        assert statistics.fold_action in {"rescale": ("rescale",), "resample": ("resample", "resample+rescale")}[policy]
        assert statistics.draws == (1 if policy == "rescale" else statistics.draws)
        record = transform.last.params
        torch.testing.assert_close(transform(image, params=record), out, rtol=0, atol=0)


def test_inverse_ddf_and_its_residual(small_network, scan):
    image = scan((48, 40))["image"]
    transform = deform(small_network(2), deformation_level=0.4).set_random_state(3)
    transform(image)
    assert transform.last.inverse_residual_vox <= 1e-3
    there = Warp(mode="bilinear", padding_mode="border")(transform.last.ddf[None], transform.last.inverse_ddf[None])[0]
    round_trip = there + transform.last.inverse_ddf
    assert round_trip[:, 4:-4, 4:-4].abs().max() < 2e-3


@pytest.mark.parametrize("value", [0.0, 7.5, -3.0])
def test_constant_image_gives_a_finite_field_and_a_note(small_network, value):
    transform = deform(small_network(2)).set_random_state(0)
    out = transform(torch.full((1, 30, 30), value))
    assert torch.isfinite(transform.last.ddf).all()
    assert transform.last.statistics.notes == ("constant image",)
    torch.testing.assert_close(out.as_tensor(), torch.full((1, 30, 30), value))


@pytest.mark.parametrize("scale_shift", [(1.0, 0.0), (2000.0, -1000.0), (1e-4, 3.0)])
def test_intensity_range_does_not_matter(small_network, scan, scale_shift):
    image = scan((40, 40))["image"]
    scale, shift = scale_shift
    fields = []
    for data in (image, image * scale + shift):
        transform = deform(small_network(2)).set_random_state(9)
        transform(data)
        fields.append(transform.last.ddf)
    torch.testing.assert_close(fields[0], fields[1], atol=2e-2, rtol=0)


def test_image_channel(small_network, scan):
    image = scan((40, 40))["image"]
    stack = torch.cat([image, torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(1))])
    alone, first, mean = (deform(small_network(2), image_channel=c).set_random_state(2) for c in (None, 0, None))
    alone(image)
    first(stack)
    mean(stack)
    torch.testing.assert_close(alone.last.ddf, first.last.ddf, rtol=0, atol=0)
    assert not torch.equal(first.last.ddf, mean.last.ddf)


def test_given_field_is_applied_as_it_is(small_network, scan):
    image = scan((20, 25))["image"]
    field = torch.zeros(2, 20, 25)
    field[1] = 3.0
    transform = RandDRDMDeform(small_network(2), prob=0.0)
    out = transform(image, field=field).as_tensor()
    torch.testing.assert_close(out[..., :-3], image[..., 3:])
    assert transform.last.params is None


def test_global_random_state_and_grad_mode_are_left_alone(small_network, scan):
    image = scan((24, 24))["image"].requires_grad_(True)
    transform = deform(small_network(2)).set_random_state(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[2]
    out = transform(image)
    assert torch.equal(before, torch.get_rng_state())
    assert np.random.get_state()[2] == numpy_before
    assert torch.is_grad_enabled()
    assert not out.is_inference()
    out.sum().backward()  # gradients flow through the warp to the image
    assert image.grad is not None


def test_multi_channel_output(small_network):
    image = torch.rand(5, 30, 20)
    assert deform(small_network(2)).set_random_state(0)(image).shape == (5, 30, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deformation_level": 0.0}, "deformation_level"),
        ({"deformation_level": 1.2}, "deformation_level"),
        ({"deformation_level": (0.8, 0.3)}, "deformation_level"),
        ({"deformation_level": (0.1, 0.2, 0.3)}, "deformation_level"),
        ({"prob": 1.5}, "prob"),
        ({"mode": "cubic"}, "mode"),
        ({"padding_mode": "wrap"}, "padding_mode"),
        ({"on_fold": "ignore"}, "on_fold"),
        ({"max_fold_fraction": -0.1}, "max_fold_fraction"),
        ({"max_displacement_mm": 0.0}, "max_displacement_mm"),
        ({"sampler": "velocity"}, "sampler"),
        ({"sampler": "reference", "steps": 20}, "steps"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_arguments_are_refused_at_construction(small_network, options, message):
    with pytest.raises(ValueError, match=message):
        RandDRDMDeform(small_network(2), **options)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("text", TypeError, "img"),
        (torch.zeros(8, 8), ValueError, r"\(C, \*S\)"),
        (torch.zeros(1, 0, 8), ValueError, "non-empty"),
        (torch.full((1, 8, 8), float("nan")), ValueError, "NaN"),
        (torch.full((1, 8, 8), float("inf")), ValueError, "infinity"),
        (torch.zeros(1, 8, 8, dtype=torch.complex64), TypeError, "real"),
        (np.array([[["a"]]]), TypeError, "real"),
        (torch.zeros(1, 8, 8, 8), ValueError, "3 spatial dimensions"),
    ],
)
def test_bad_images_are_refused(small_network, image, error, message):
    with pytest.raises(error, match=message):
        deform(small_network(2))(image)


def test_unknown_network_lists_the_known():
    with pytest.raises(ValueError, match="zheng2026-cmr-2d"):
        deform("no-such-network")(torch.zeros(1, 8, 8))
    with pytest.raises(TypeError, match="network"):
        RandDRDMDeform(3)


def test_a_record_replays_whatever_the_limits_of_the_transform(small_network, scan):
    image = scan((40, 40))["image"]
    limited = deform(small_network(2), max_displacement_mm=1.0, image_channel=0).set_random_state(1)
    out = limited(image)
    record = DeformationParams.from_json(limited.last.params.to_json())
    free = deform(small_network(2), on_fold="raise", max_fold_fraction=0.0)
    torch.testing.assert_close(free(image, params=record), out, rtol=0, atol=1e-6)
    assert free.last.statistics.max_displacement_mm == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("shape", [(64, 64, 8), (64, 64, 4), (64, 64, 2), (20, 64, 30)])
def test_recovery_is_isotropic_in_millimetres_on_thin_axes(small_network, shape):
    """A network that predicts the same displacement everywhere moves as far along every axis, in millimetres."""
    network = small_network(3)
    network.conv_out.weight.zero_()
    network.conv_out.bias.fill_(0.002)
    spacing = (1.0, 1.0, 8.0) if shape[2] < 10 else (3.0, 1.0, 2.0)
    from monai_drdm.diffusion import recover_fast, WorkingGrid

    grid = WorkingGrid.of(shape, spacing, 32)
    start = torch.zeros(1, 3, *grid.shape)
    moved = grid.ddf_to_full(recover_fast(network, torch.rand(1, 1, *grid.shape), start, steps=2))
    millimetres = moved[0].mean(dim=(1, 2, 3)) * torch.tensor(spacing)
    assert millimetres.max() / millimetres.min() < 1.1


def test_pixdim_also_counts_where_monai_made_up_an_identity_affine(small_network, scan):
    image = scan((40, 60))["image"]
    transform = deform(small_network(2), pixdim=(5.0, 1.0)).set_random_state(2)
    transform(MetaTensor(image))
    assert transform.last.spacing == (5.0, 1.0)
    transform(MetaTensor(image, affine=torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0]))))
    assert transform.last.spacing == (2.0, 3.0)


def test_pending_operations_are_flushed(small_network, scan):
    from monai.transforms import Spacing

    image = MetaTensor(scan((40, 30))["image"])
    pending = Spacing(pixdim=(2.0, 2.0), lazy=True)(image)
    assert pending.has_pending_operations
    out = deform(small_network(2)).set_random_state(0)(pending)
    assert not out.has_pending_operations
    assert out.shape == Spacing(pixdim=(2.0, 2.0))(image).shape


def test_integer_images_collate_whichever_sample_fires(small_network, scan):
    image = (scan((20, 20))["image"] * 100).to(torch.int16)
    fired = deform(small_network(2)).set_random_state(0)(image)
    idle = RandDRDMDeform(small_network(2), prob=0.0)(image)
    assert fired.dtype == idle.dtype == torch.float32
    assert RandDRDMDeform(small_network(2), prob=0.0, mode="nearest")(image).dtype == torch.int16


def test_editing_the_output_leaves_the_input_alone(small_network, scan):
    image = MetaTensor(scan((20, 20))["image"], meta={"list": [1]})
    out = deform(small_network(2)).set_random_state(0)(image)
    out.affine[0, 0] = 9
    out.meta["list"].append(2)
    assert image.affine[0, 0] == 1
    assert image.meta["list"] == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "no-such-network"}, "zheng2026-cmr-2d"),
        ({"sampler": "bogus"}, "sampler"),
        ({"steps": -3}, "steps"),
        ({"steps": 10**14}, "steps"),
        ({"pixdim": (0.0, 1.0)}, "pixdim"),
        ({"prob": "0.5"}, "prob"),
    ],
)
def test_bad_arguments_of_a_named_network_are_refused_before_it_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        RandDRDMDeform(**options)


def test_numpy_levels_and_wrong_types(small_network):
    assert RandDRDMDeform(small_network(2), deformation_level=np.float32(0.5)).drawer.levels == (0.5, 0.5)
    with pytest.raises(TypeError, match="deformation_level"):
        RandDRDMDeform(small_network(2), deformation_level=None)


def test_image_without_channel_axis_is_explained(small_network):
    with pytest.raises(ValueError, match="EnsureChannelFirst"):
        RandDRDMDeform(small_network(2), pixdim=(1.0, 1.0))(torch.zeros(8, 8))


def test_bad_replays_are_refused(small_network, scan):
    image = scan((20, 20))["image"]
    transform = deform(small_network(2))
    with pytest.raises(ValueError, match="randomize=False"):
        transform(image, randomize=False)
    transform(image)
    record = transform.last.params
    with pytest.raises(ValueError, match="not both"):
        transform(image, params=record, field=torch.zeros(2, 20, 20))
    with pytest.raises(ValueError, match="recorded with network"):
        deform(small_network(2, scale=0.3))(image, params=record)
    with pytest.raises(ValueError, match="field must have shape"):
        transform(image, field=torch.zeros(2, 20, 21))
    with pytest.raises(ValueError, match="cannot be read as a record"):
        DeformationParams.from_json('{"seed": 1}')


def test_pickle_is_small_and_replays(small_network, scan):
    import pickle

    image = scan((64, 64))["image"]
    named = RandDRDMDeform("auto", prob=1.0)
    named.last = deform(small_network(2)).last
    assert len(pickle.dumps(named)) < 200_000
    transform = deform(small_network(2)).set_random_state(1)
    out = transform(image)
    assert pickle.loads(pickle.dumps(transform)).last is None
    again = pickle.loads(pickle.dumps(transform))(image, randomize=False)
    torch.testing.assert_close(out, again, rtol=0, atol=0)


def test_recovery_is_recorded_and_replayed(scan):
    """A record replays its own recovery, whatever that of the transform that replays it."""
    image = scan((65, 65))["image"]
    partial = RandDRDMDeform(prob=1.0, deformation_level=0.4, recovery=0.3).set_random_state(1)
    partial(image)
    record = DeformationParams.from_json(partial.last.params.to_json())
    assert record.recovery == 0.3
    whole = RandDRDMDeform(prob=1.0, deformation_level=0.4).set_random_state(1)
    whole(image)
    assert (whole.last.ddf - partial.last.ddf).abs().max() > 0.5
    whole(image, params=record)
    torch.testing.assert_close(whole.last.ddf, partial.last.ddf, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="recovery must be a number"):
        RandDRDMDeform(recovery=2)
