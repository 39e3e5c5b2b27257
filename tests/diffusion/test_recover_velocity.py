import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_drdm import RandDRDMDeform, RandDRDMDeformd
from monai_drdm.diffusion import diffuse, DRDM, SAMPLERS
from monai_drdm.diffusion.recover import RecoveryStep
from monai_drdm.diffusion.recover_velocity import flatness, recover_velocity, recovery_step
from monai_drdm.diffusion.schedule import integration_time
from monai_drdm.fields import fold_fraction, identity_grid, isotropic_velocity, mend_folds, resize_ddf
from monai_drdm.networks import load_network, save_network, VelocityUNet
from monai_drdm.networks.velocity_unet import half_shape

SHAPES = [(49, 33), (33, 25, 29)]
PERFECT_VOX = 0.05
STRENGTH = 0.25


def flow(shape, time, strength=STRENGTH):
    """``exp(time · v)`` of ``v_d = strength · sin(π x_d / L)``, in closed form: ``tan(k y / 2) = tan(k x / 2) e^akt``.

    ``v`` ends at the borders and depends, component by component, on that axis alone.
    """
    grid, moved = identity_grid(shape), []
    for d, size in enumerate(shape):
        k = math.pi / max(size - 1, 1)
        half = k * grid[d] / 2
        grown = math.exp(strength * k * time)
        moved.append(2 / k * torch.atan2(half.sin() * grown, half.cos()) - grid[d])
    return torch.stack(moved)[None]


def velocity(shape, strength=STRENGTH):
    grid = identity_grid(shape)
    return torch.stack([strength * torch.sin(grid[d] * math.pi / max(n - 1, 1)) for d, n in enumerate(shape)])[None]


class Oracle(VelocityUNet):
    """Predicts a known velocity of deformed images, another one of the original, and keeps what it was given."""

    def __init__(self, predicted, of_originals=None):
        super().__init__(predicted.shape[1], channels=(2, 2))
        self.predicted = predicted
        self.of_originals = torch.zeros_like(predicted) if of_originals is None else of_originals
        self.original = None
        self.levels = []
        self.images = []
        self.asked = []

    def forward(self, x, level):
        if self.original is None or torch.equal(x, self.original):  # the sampler asks of the original first
            self.original = x
            self.asked.append(level)
            predicted = self.of_originals
        else:
            self.levels.append(level)
            self.images.append(x)
            predicted = self.predicted
        return predicted.expand(x.shape[0], *predicted.shape[1:])


def structure(batch, *shape):
    """Images whose every voxel shows something: fields on them are left as they are between steps."""
    return 1e3 * torch.rand(batch, 1, *shape, generator=torch.Generator().manual_seed(0))


class Start:
    """A deformed image whose way back is known."""

    def __init__(self, shape, levels, strength=STRENGTH):
        half = half_shape(shape)
        self.levels = levels
        self.image = structure(len(levels), *shape)
        self.times = [integration_time(level, len(shape)) for level in levels]
        self.ddf = torch.cat([flow(half, time, strength) for time in self.times])
        self.oracle = Oracle(-velocity(half, strength))

    def recover(self, **options):
        return recover_velocity(self.oracle, self.image, self.ddf, self.levels, **options)


def mean_displacement(ddf):
    return float(ddf.norm(dim=1).mean())


def images(batch, *shape):
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij")
    return torch.stack([sum(torch.sin(a / (4 + d + b) + b) for d, a in enumerate(axes)) for b in range(batch)])[:, None]


@pytest.fixture(scope="module")
def network():
    """Factory of small networks that predict something irregular, as strong as ``scale`` says."""

    def make(dims, working_size=33, scale=0.02, **entries):
        torch.manual_seed(dims)
        made = VelocityUNet(dims, channels=(16, 16)).eval().requires_grad_(False)
        made.out.weight.normal_(std=scale)
        made.card = replace(made.card, name="nudged", working_size=working_size, steps=2, **entries)
        return made

    return make


# the sampler with a network that knows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("level", [0.1, 0.25, 0.4])
def test_a_perfect_network_recovers_the_identity(shape, steps, level):
    start = Start(shape, [level])
    assert float(start.ddf.abs().max()) > 3 * PERFECT_VOX
    recovered = start.recover(steps=steps, over_relaxation=1.0)
    assert recovered.shape == start.ddf.shape
    assert float(recovered.abs().max()) < PERFECT_VOX


@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_goes_as_far_as_its_level_says(shape):
    start, seen = Start(shape, [0.3]), []
    start.recover(steps=3, over_relaxation=1.0, callback=seen.append)
    assert all(isinstance(step, RecoveryStep) for step in seen)
    assert [(step.index, step.time) for step in seen] == [(0, 2), (1, 1), (2, 0)]
    for step, left in zip(seen, (0.2, 0.1, None)):
        time = 0.0 if left is None else integration_time(left, len(shape))
        torch.testing.assert_close(step.ddf, flow(half_shape(shape), time), rtol=0, atol=PERFECT_VOX)


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_levels_given_to_the_network(steps):
    start = Start((17, 13), [0.3, 0.8])
    start.recover(steps=steps)
    assert len(start.oracle.levels) == steps
    for k, levels in enumerate(start.oracle.levels):
        expected = torch.tensor([0.3 * (1 - k / steps), 0.8 * (1 - k / steps)])
        torch.testing.assert_close(levels, expected, rtol=0, atol=1e-6)


def test_the_network_sees_the_original_image_warped_by_the_field_so_far():
    """A ramp shows its own coordinates: ``x + u(x)``, on the full grid in its own voxels."""
    shape = (33, 25)
    start, seen = Start(shape, [0.3]), []
    for axis in range(2):
        start.oracle.images.clear()
        start.oracle.original = None
        seen.clear()
        start.image = 100 * identity_grid(shape)[axis][None, None]
        start.recover(steps=2, over_relaxation=1.0, callback=seen.append)
        for shown, time in zip(start.oracle.images, (start.times[0], integration_time(0.15, 2))):
            expected = identity_grid(half_shape(shape))[axis] + flow(half_shape(shape), time)[0, axis]
            torch.testing.assert_close(shown[0, 0, ::2, ::2] / 100, 2 * expected, rtol=0, atol=2 * PERFECT_VOX)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_over_relaxation_scales_every_step(shape, factor):
    start = Start(shape, [0.25])
    for steps in (1, 3):
        recovered = start.recover(steps=steps, over_relaxation=factor)
        expected = flow(half_shape(shape), (1 - factor) * start.times[0])
        torch.testing.assert_close(recovered, expected, rtol=0, atol=PERFECT_VOX)


def test_steps_are_composed_within_the_field_so_far():
    """``u(x + c) + c`` for ``u(x) = A x`` and a constant step ``c``; the other order would give ``A x + c``."""
    matrix = torch.tensor([[0.2, -0.1], [0.15, 0.1]])
    grid = identity_grid((25, 25))
    predicted = torch.tensor([0.5, -0.8]).view(1, 2, 1, 1).expand(-1, -1, 25, 25)
    step = integration_time(0.2, 2) * predicted[0]
    linear = torch.einsum("ij,j...->i...", matrix, grid - 12)[None]
    recovered = recover_velocity(Oracle(predicted), structure(1, 49, 49), linear, [0.2], steps=1, over_relaxation=1.0)
    expected = (torch.einsum("ij,j...->i...", matrix, grid - 12 + step) + step)[None]
    inside = (..., slice(4, -4), slice(4, -4))
    torch.testing.assert_close(recovered[inside], expected[inside], rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_an_image_does_not_show_becomes_smooth(shape):
    """Without any structure every step smooths the field; SciPy's Gaussian is the oracle."""
    half = half_shape(shape)
    start = diffuse([torch.Generator().manual_seed(0)], half, 0.3)
    silent = Oracle(torch.zeros(1, len(shape), *half))
    recovered = recover_velocity(silent, torch.full((1, 1, *shape), 0.5), start, [0.3], steps=1)
    sigma = 3 / 80 * max(half)
    for d in range(len(shape)):
        expected = ndimage.gaussian_filter(start[0, d].numpy(), sigma, mode="nearest", radius=math.ceil(3 * sigma))
        torch.testing.assert_close(recovered[0, d], torch.from_numpy(expected), rtol=0, atol=1e-3)


def test_what_an_image_shows_stays_as_it_is():
    """Structure in one half, nothing in the other: the field keeps its detail in one and loses it in the other."""
    image = structure(1, 97, 97)
    image[..., 49:] = 0.0
    start = diffuse([torch.Generator().manual_seed(0)], (49, 49), 0.1)
    recovered = recover_velocity(Oracle(torch.zeros(1, 2, 49, 49)), image, start, [0.1], steps=4, symmetry=0.0)
    torch.testing.assert_close(recovered[..., :16], start[..., :16], rtol=0, atol=0.01)
    before, after = (field[..., 36:].diff(n=2, dim=2).square().mean() for field in (start, recovered))
    assert after < 0.1 * before


@pytest.mark.parametrize("slope", [0.01, 0.07, 0.2])
def test_flatness_of_a_ramp(slope):
    ramp = slope * identity_grid((65, 49))[:1, None]
    expected = 1 / (1 + (slope / 0.07) ** 2)
    inside = (..., slice(10, -10), slice(10, -10))
    found = flatness(ramp, (33, 25))[inside]
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-4, atol=0)


def at(values, position):
    """Values ``(*S)`` at positions ``(D, *T)``, linearly, the border continued."""
    return ndimage.map_coordinates(values, position, order=1, mode="nearest")


def blurred(values, sigma):
    """Gaussian smoothing cut off at three standard deviations, one or one per axis."""
    sigmas = np.broadcast_to(sigma, values.ndim)
    return ndimage.gaussian_filter(values, sigmas, mode="nearest", radius=[math.ceil(3 * s) for s in sigmas])


@pytest.mark.parametrize(("shape", "strength"), [((33, 25), 1.0), ((17, 13, 21), 1.0), ((49, 49), 12.0)])
def test_a_step_by_hand(shape, strength):
    """In SciPy: smoothed where nothing is seen, a prediction for the warped image less the carried anchor, its flow.

    The strongest step moves by more than 8 voxels: its flow begins with 1/64 of it, which is longer than 1/8 voxel.
    """
    half, dims = half_shape(shape), len(shape)
    draw = np.random.default_rng(3)

    def field(sigma, largest):
        values = np.stack([blurred(draw.standard_normal(half), sigma) for _ in half])
        return values * largest / np.abs(values).max()

    ddf, velocity, anchor = field(2.0, 2.0), field(4.0, strength), field(4.0, 0.5)
    image, unseen = draw.uniform(size=shape), draw.uniform(size=half)
    seen = []

    def predict(images, level):
        seen.append((images, level))
        return torch.from_numpy(velocity)[None]

    level, time = torch.tensor([0.3]), torch.tensor([1.7], dtype=torch.float64)
    tensors = [torch.from_numpy(one)[None] for one in (image[None], unseen[None], ddf, anchor)]
    result = recovery_step(predict, *tensors[:3], level, time, tensors[3])

    grid = np.indices(half)
    hidden = at(unseen, grid + ddf)
    ddf = np.stack([c + hidden * (blurred(c, 3 / 80 * max(half)) - c) for c in ddf])
    step = 1.7 * (velocity - [at(c, grid + ddf) for c in anchor])
    squarings = min(6, max(0, math.ceil(math.log2(np.abs(step).max() / 0.125))))
    assert (squarings == 6) == (strength == 12.0)
    flow_of_step = step / 2**squarings
    for _ in range(squarings):
        flow_of_step = flow_of_step + [at(c, grid + flow_of_step) for c in flow_of_step]
    expected = flow_of_step + [at(c, grid + flow_of_step) for c in ddf]
    np.testing.assert_allclose(result[0].numpy(), expected, atol=1e-9)
    full = 2 * np.stack([at(c, np.indices(shape) / 2) for c in ddf])
    ((images_seen, level_seen),) = seen
    np.testing.assert_allclose(images_seen[0, 0].numpy(), at(image, np.indices(shape) + full), atol=1e-9)
    assert torch.equal(level_seen, level)
    assert dims == len(half)


@pytest.mark.parametrize(("shape", "target"), [((65, 49), (33, 25)), ((21, 1), (11, 1)), ((17, 21, 13), (9, 11, 7))])
def test_flatness_by_hand(shape, target):
    """In SciPy: forward differences of the smoothed image, squared, brought to the half grid, smoothed."""
    image = np.random.default_rng(0).uniform(size=(2, *shape)) * 0.3
    moving = [float(n > 1) for n in shape]
    slope = np.zeros(shape)
    for channel in image:
        smooth = blurred(channel, [1.0 * m for m in moving])
        for axis in range(len(shape)):
            slope += np.diff(smooth, axis=axis, append=np.take(smooth, [-1], axis)) ** 2
    shrink = blurred(slope, [(n / t - 1) / 2 * m for n, t, m in zip(shape, target, moving)])
    scale = np.array([(n - 1) / max(t - 1, 1) for n, t in zip(shape, target)]).reshape(-1, *(1,) * len(shape))
    expected = 1 / (1 + blurred(at(shrink, np.indices(target) * scale), [2.0 * m for m in moving]) / 0.07**2)
    np.testing.assert_allclose(flatness(torch.from_numpy(image)[None], target)[0, 0].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("dims", [2, 3])
def test_an_undeformed_image_stays_as_it_is(network, dims):
    """Whatever a network finds to mend in it."""
    shape = (33, 25, 29)[:dims]
    made, image, still = network(dims), images(2, *shape), torch.zeros(2, dims, *half_shape(shape))
    assert float(made(image, torch.tensor([0.4])).abs().max()) > 0.01
    torch.testing.assert_close(recover_velocity(made, image, still, [0.4, 0.7], steps=1), still, rtol=0, atol=1e-4)


def test_what_is_said_of_the_original_is_carried_along():
    """A shift by 3 voxels, and a ramp said of the original: the step is minus the ramp, shifted."""
    grid = identity_grid((25, 25))
    shift = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1).expand(-1, -1, 25, 25)
    ramp = torch.stack((0.01 * grid[0], 0.02 * grid[0]))[None]
    oracle, image = Oracle(torch.zeros(1, 2, 25, 25), ramp), structure(1, 49, 49)
    level = 0.01
    recovered = recover_velocity(oracle, image, shift, [level], steps=1, over_relaxation=1.0)
    expected = shift - integration_time(level, 2) * torch.stack((0.01 * (grid[0] + 3), 0.02 * (grid[0] + 3)))[None]
    inside = (..., slice(0, 20), slice(None))
    torch.testing.assert_close(recovered[inside], expected[inside], rtol=0, atol=1e-3)
    assert torch.equal(oracle.original, image)


@pytest.mark.parametrize(("steps", "asked"), [(1, [0.6]), (4, [0.6]), (5, [0.6, 0.12]), (12, [0.6, 0.4, 0.2])])
def test_the_network_is_asked_of_the_original_every_fourth_step(steps, asked):
    start = Start((33, 25), [0.6])
    start.recover(steps=steps)
    torch.testing.assert_close(torch.cat(start.oracle.asked), torch.tensor(asked), rtol=0, atol=1e-6)
    assert len(start.oracle.levels) == steps


def test_over_relaxed_unless_told_otherwise():
    start = Start((33, 25), [0.3])
    found = start.recover(steps=2)
    assert torch.equal(found, start.recover(steps=2, over_relaxation=1.25))
    expected = flow((17, 13), (1 - 1.25) * start.times[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=PERFECT_VOX)


@pytest.mark.parametrize("shape", SHAPES)
def test_levels_of_each_sample(shape):
    levels = [0.1, 0.4, 0.25]
    together = Start(shape, levels)
    recovered = together.recover(steps=3, over_relaxation=0.7)
    for b, level in enumerate(levels):
        expected = flow(half_shape(shape), 0.3 * together.times[b])
        torch.testing.assert_close(recovered[b : b + 1], expected, rtol=0, atol=PERFECT_VOX)
        alone = Start(shape, [level]).recover(steps=3, over_relaxation=0.7)
        torch.testing.assert_close(recovered[b : b + 1], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_sample_does_not_know_its_batch_when_the_network_looks(network):
    made, levels = network(2), [0.1, 0.3, 0.2]
    image = images(3, 33, 25)
    ddf = diffuse([torch.Generator().manual_seed(s) for s in range(3)], (17, 13), levels)
    together = recover_velocity(made, image, ddf, levels, steps=3)
    for b in range(3):
        one = slice(b, b + 1)
        alone = recover_velocity(made, image[one], ddf[one], levels[one], steps=3)
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-3)
    swapped = recover_velocity(made, image.flip(0), ddf, levels, steps=3)
    assert not torch.allclose(swapped[0], together[0], atol=1e-3)  # it does look


def test_no_folds_are_left():
    """A narrow push folds a field; the sampler mends it although the network says nothing."""
    grid = identity_grid((25, 25))
    push = 3 * torch.exp(-((grid[0] - 12) ** 2 + (grid[1] - 12) ** 2) / 6)
    ddf = torch.stack((-push * (grid[0] - 12), push * 0))[None]
    assert float(fold_fraction(ddf)) > 0
    recovered = recover_velocity(Oracle(torch.zeros(1, 2, 25, 25)), structure(1, 49, 49), ddf, [0.3], steps=2)
    assert float(fold_fraction(recovered)) == 0
    torch.testing.assert_close(recovered[..., :3, :], ddf[..., :3, :], rtol=0, atol=0.05)  # far from the fold


def test_a_fold_made_on_the_way_is_mended():
    grid = identity_grid((17, 17))
    wild = torch.stack([4 * torch.sin(2 * grid[d] + grid[1 - d]) for d in (0, 1)])[None]
    recovered = recover_velocity(Oracle(wild), structure(1, 33, 33), torch.zeros(1, 2, 17, 17), [0.3], steps=1)
    assert bool(torch.isfinite(recovered).all())
    assert float(fold_fraction(recovered)) == 0


def test_fields_without_folds_are_not_mended():
    start, seen = Start((33, 25), [0.3]), []
    recovered = start.recover(steps=2, over_relaxation=0.5, callback=seen.append)
    assert float(fold_fraction(seen[-1].ddf)) == 0
    assert torch.equal(recovered, seen[-1].ddf)


@pytest.mark.parametrize("steps", [0, -1])
def test_too_few_steps(steps):
    with pytest.raises(ValueError, match=f"steps must be 1 or more, got {steps}"):
        Start((17, 13), [0.3]).recover(steps=steps)


@pytest.mark.parametrize("level", [-0.3, 0.0, 1.01, 2.0])
def test_levels_outside_their_range(level):
    start = Start((17, 13), [0.3])
    start.levels = [level]
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\]"):
        start.recover(steps=2)


def test_a_whole_level():
    start = Start((65, 49), [1.0], strength=0.1)
    assert float(start.ddf.abs().max()) > 2
    assert float(start.recover(steps=4, over_relaxation=1.0).abs().max()) < PERFECT_VOX


def test_inputs_are_not_modified():
    start = Start((33, 25), [0.3])
    copies = start.image.clone(), start.ddf.clone()
    start.recover(steps=2)
    assert torch.equal(start.image, copies[0])
    assert torch.equal(start.ddf, copies[1])


def test_no_gradients_and_a_progress_bar(capsys, network):
    made = network(2).requires_grad_(True)
    ddf = flow((17, 13), 1.0)
    plain, shown = (recover_velocity(made, images(1, 33, 25), ddf, [0.2], steps=2, progress=p) for p in (False, True))
    assert plain.grad_fn is None
    assert torch.equal(plain, shown)
    assert "recover" in capsys.readouterr().err


# the model


def test_sampler_is_the_cards(network):
    made = network(2)
    assert SAMPLERS["velocity_unet"] == ("velocity",)
    for sampler in ("auto", "velocity"):
        assert DRDM(made, sampler).sampler == "velocity"
        assert DRDM(made, sampler).steps == 2
    assert DRDM(made, steps=100).steps == 100


@pytest.mark.parametrize("sampler", ["fast", "reference", "Velocity", ""])
def test_samplers_of_other_networks_are_refused(network, sampler):
    with pytest.raises(ValueError, match="sampler must be 'auto' or one of"):
        DRDM(network(2), sampler)
    if sampler:
        with pytest.raises(ValueError, match="card of 'nudged': sampler must be"):
            DRDM(network(2, sampler=sampler))


def test_published_networks_do_not_know_velocities(filled_network):
    with pytest.raises(ValueError, match="sampler must be 'auto' or one of"):
        DRDM(filled_network(2), "velocity")


@pytest.mark.parametrize("steps", [0, -2, 1001, 10**14])
def test_model_refuses_too_few_and_too_many_steps(network, steps):
    with pytest.raises(ValueError, match=f"steps must be from 1 to 1000, got {steps}"):
        DRDM(network(2), steps=steps)


MODEL_SHAPES = [
    ((33, 33), None),
    ((37, 52), None),
    ((1, 64), None),
    ((64, 1), (1.0, 5.0)),
    ((2, 30), None),
    ((5, 7), None),
    ((1, 1), None),
    ((60, 20), (1.0, 3.0)),
    ((90, 30), (0.5, 0.7)),
    ((17, 12, 9), None),
    ((20, 16, 5), (1.0, 1.0, 4.0)),
    ((1, 20, 3), None),
    ((14, 1, 20), (2.0, 1.0, 0.5)),
    ((1, 1, 1), None),
]


@pytest.mark.parametrize(("shape", "spacing"), MODEL_SHAPES)
def test_any_shape_and_spacing(network, shape, spacing):
    dims = len(shape)
    model = DRDM(network(dims, 33 if dims == 2 else 17))
    ddf = model.sample(images(2, *shape), [0.2, 0.3], [1, 2], spacing)
    assert ddf.shape == (2, dims, *shape)
    assert ddf.dtype == torch.float32
    assert bool(torch.isfinite(ddf).all())
    assert float(fold_fraction(ddf).max()) == 0
    for d, size in enumerate(shape):
        assert bool((ddf[:, d] == 0).all()) == (size == 1)  # along one voxel nothing can move
    compact = model.sample(images(2, *shape), [0.2, 0.3], [1, 2], spacing, compact=True)
    assert all(c <= min(n, 17) for c, n in zip(compact.shape[2:], shape))


@pytest.mark.parametrize(("dims", "shape"), [(2, (37, 53)), (3, (18, 13, 10))])
def test_reproducible_whatever_the_batch(network, dims, shape):
    model, batch, levels = DRDM(network(dims, 33 if dims == 2 else 17)), images(3, *shape), [0.1, 0.3, 0.2]
    together = model.sample(batch, levels, [1, 2, 3])
    assert torch.equal(together, model.sample(batch, levels, [1, 2, 3]))
    for b in range(3):
        alone = model.sample(batch[b : b + 1], levels[b], [b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-3)
    assert not torch.allclose(together[:1], model.sample(batch[:1], levels[0], [9]), atol=0.1)


def test_caller_state_does_not_matter(network):
    model, image = DRDM(network(2)), images(1, 37, 30)
    plain = model.sample(image, 0.3, [3])
    torch.manual_seed(99)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model.sample(image, 0.3, [3])
    assert torch.equal(plain, inside)


def test_recovery_by_hand(network):
    """The model is: diffusion on the half grid, recovery there, the field brought to the image."""
    made, image, level = network(2), images(1, 33, 33), 0.2
    low, high = image.quantile(0.005), image.quantile(0.995)
    unit = ((image - low) / (high - low)).clamp(0, 1)  # the working grid is the image's own
    start = diffuse([torch.Generator().manual_seed(5)], (17, 17), level)
    recovered = recover_velocity(made, unit, start, [level], steps=3)
    by_hand = mend_folds(resize_ddf(recovered, (33, 33)))
    torch.testing.assert_close(DRDM(made, steps=3).sample(image, level, [5]), by_hand, rtol=0, atol=1e-2)


def test_a_perfect_network_undoes_the_diffusion_of_the_model():
    """Its own level schedule and the fields it starts from belong together."""
    model = DRDM(Oracle(torch.zeros(1, 2, 17, 17)), steps=4)
    model.network.card = replace(model.network.card, working_size=33)
    starts = model.diffuse((33, 33), 0.2, [0])
    untouched = model.sample(structure(1, 33, 33), 0.2, [0])
    assert mean_displacement(untouched - starts) < 0.2 * mean_displacement(starts)  # noise in [0, 1] is not all edge
    model.network.predicted = (
        -isotropic_velocity([torch.Generator().manual_seed(0)], (17, 17)) / 1.25
    )  # over-relaxation
    recovered = model.sample(structure(1, 33, 33), 0.2, [0])
    assert mean_displacement(recovered) < 0.15 * mean_displacement(starts)


@pytest.mark.parametrize("level", [0.1, 0.3])
@pytest.mark.parametrize(
    ("shape", "spacing", "size"), [((64, 48), None, 65), ((60, 40), (1.0, 2.0), 65), ((24, 20, 16), None, 33)]
)
def test_diffusion_is_as_strong_as_that_of_the_published_networks(network, filled_network, shape, spacing, size, level):
    dims, seeds = len(shape), range(8)
    published = filled_network(dims)
    published.card = replace(published.card, working_size=size)
    expected = mean_displacement(DRDM(published, "fast").diffuse(shape, level, seeds, spacing))
    found = mean_displacement(DRDM(network(dims, size)).diffuse(shape, level, seeds, spacing))
    assert found == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((70, 45), None), ((60, 20), (1.0, 3.0)), ((9, 80), None), ((1, 50), None), ((24, 18, 5), (1.0, 1.0, 4.0))],
)
def test_compact_holds_all_there_is_to_know(network, shape, spacing):
    model, image = DRDM(network(len(shape), 33 if len(shape) == 2 else 17)), images(1, *shape)
    last = []
    full = model.sample(image, 0.2, [4], spacing, callback=lambda step: last.append(step.ddf))
    compact = model.sample(image, 0.2, [4], spacing, compact=True)
    assert len(last) == 2
    assert float(fold_fraction(last[-1])) == 0  # nothing was mended
    assert compact.shape[2:] == tuple(min(n, m) for n, m in zip(last[-1].shape[2:], shape))
    torch.testing.assert_close(resize_ddf(compact, shape), full, rtol=0, atol=0.05)


@pytest.mark.parametrize("change", ["channels", "axes", "seeds", "levels", "nan"])
def test_model_refuses(network, change):
    image, seeds, level = images(2, 20, 20), [1, 2], 0.2
    image = {"channels": image.expand(-1, 2, -1, -1), "axes": image[..., None]}.get(change, image).clone()
    if change == "nan":
        image[0, 0, 0, 0] = torch.nan
    seeds = [1] if change == "seeds" else seeds
    level = [0.1, 0.2, 0.3] if change == "levels" else level
    with pytest.raises(
        ValueError, match={"nan": "finite", "seeds": "one seed", "levels": "level"}.get(change, "shape")
    ):
        DRDM(network(2)).sample(image, level, seeds)


# the transforms


def scan(*shape):
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = torch.stack(axes).norm(dim=0)
    return {"image": (torch.exp(-3 * radius**2))[None], "label": (radius < 0.6).to(torch.uint8)[None]}


@pytest.mark.parametrize("shape", [(64, 56), (24, 28, 20)])
def test_transform_there_and_back(network, shape):
    made = network(len(shape), 33 if len(shape) == 2 else 17, scale=0.005)
    sample = scan(*shape)
    transform = RandDRDMDeformd(
        ("image", "label"), network=made, prob=1.0, mode=("bilinear", "nearest"), deformation_level=0.2
    ).set_random_state(1)
    out = transform(sample)
    assert transform.last.params.sampler == "velocity"
    assert transform.last.params.steps == 2
    assert transform.last.statistics.fold_fraction <= 1e-4
    back = transform.inverse(out)
    inside = (slice(None), *(slice(4, -4),) * len(shape))
    moved = (out["image"] - sample["image"])[inside].abs().mean()
    missed = (back["image"] - sample["image"])[inside].abs().mean()
    assert float(moved) > 0.005
    assert float(missed) < min(0.004, 0.25 * float(moved))  # two linear interpolations
    assert float((back["label"] == sample["label"]).float().mean()) > 0.98
    again = pickle.loads(pickle.dumps(transform))
    torch.testing.assert_close(again.inverse(out)["image"].as_tensor(), back["image"].as_tensor(), rtol=0, atol=0)
    replay = transform(sample)["image"].as_tensor()  # both go on from the same random state
    assert torch.equal(again(sample)["image"].as_tensor(), replay)
    assert not torch.equal(replay, out["image"].as_tensor())


def test_transform_with_a_saved_file(network, tmp_path):
    made = network(2)
    path = tmp_path / "mine.safetensors"
    digest = save_network(made, path)
    image = scan(40, 33)["image"]
    options = {"prob": 1.0, "deformation_level": (0.1, 0.3)}
    loaded = RandDRDMDeform(path, **options, sampler="velocity").set_random_state(2)
    in_memory = RandDRDMDeform(made, **options).set_random_state(2)
    assert torch.equal(loaded(image).as_tensor(), in_memory(image).as_tensor())
    assert loaded.last.params == in_memory.last.params
    assert loaded.last.params.network_sha256 == digest
    assert 0.1 <= loaded.last.params.deformation_level <= 0.3
    assert torch.equal(DRDM(load_network(path)).diffuse((40, 33), 0.2, [1]), DRDM(made).diffuse((40, 33), 0.2, [1]))


def test_transform_refuses_samplers_when_made(network):
    with pytest.raises(ValueError, match="sampler must be"):
        RandDRDMDeform(network(2), sampler="fast")
    with pytest.raises(ValueError, match="sampler must be"):
        RandDRDMDeform("auto", sampler="velocities")


def test_transform_of_a_stack(network):
    image = scan(30, 6, 24)["image"]
    transform = RandDRDMDeform(network(2), prob=1.0, deformation_level=0.2, slice_axis=1).set_random_state(0)
    assert transform(image).shape == image.shape
    ddf = transform.last.ddf
    assert ddf.shape == (3, 30, 6, 24)
    assert bool((ddf[1] == 0).all())
    assert float(ddf[0].abs().max()) > 0.1
    assert torch.equal(ddf, ddf[:, :, :1].expand_as(ddf))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_host_waits_for_nothing_within_a_step(shape):
    network, dims = VelocityUNet(len(shape)).to("meta"), len(shape)  # tensors without values: to read one is an error
    image = torch.empty(2, 1, *shape, device="meta")
    unseen, ddf, anchor = (torch.empty(2, c, *half_shape(shape), device="meta") for c in (1, dims, dims))
    level, time = torch.empty(2, device="meta"), torch.empty(2, device="meta")
    assert recovery_step(network, image, unseen, ddf, level, time, anchor).shape == ddf.shape


def test_a_network_that_predicts_nan_is_refused():
    network = VelocityUNet(2)
    with torch.no_grad():
        network.out.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        DRDM(network).sample(torch.rand(1, 1, 33, 33), 0.5, [1])
