import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from monai_drdm.diffusion import diffuse, diffuse_published, DRDM, recover, SAMPLERS
from monai_drdm.fields import crop, fold_fraction, fractions_to_voxels
from monai_drdm.networks import load_network


def images(batch, *shape):
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij")
    return torch.stack([sum(torch.sin(a / (4 + d + b) + b) for d, a in enumerate(axes)) for b in range(batch)])[:, None]


@pytest.fixture
def small(filled_network):
    """Factory of a cheap model: a small working grid, and steps of about a hundredth of the image."""

    def make(dims=2, sampler="auto", steps=None, scale=0.01, in_channels=1):
        network = filled_network(dims, in_channels)
        network.conv_out.weight *= scale
        network.conv_out.bias *= scale
        network.card = replace(network.card, working_size=32 if dims == 2 else 16, steps=4)
        return DRDM(network, sampler, steps)

    return make


@pytest.fixture
def few_time_steps(monkeypatch):
    """The reference sampler in 4 time steps instead of 80, where their number does not matter."""
    monkeypatch.setattr(recover, "TIME_STEPS", 4)


@pytest.fixture
def cardiac(published_weights):
    """The published cardiac network on a small working grid."""
    network = load_network("zheng2026-cmr-2d")
    network.card = replace(network.card, working_size=32)
    return network


@pytest.mark.parametrize("sampler", SAMPLERS["recresacnet"])
def test_same_seed_same_field(small, sampler, few_time_steps):
    model, image = small(sampler=sampler), images(1, 30, 41)
    first, second = (model.sample(image, 0.6, [7]) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(model.sample(image, 0.6, [8]), first)


@pytest.mark.parametrize(("dims", "shape"), [(2, (37, 53)), (3, (18, 13, 10))])
def test_a_sample_does_not_know_its_batch(small, dims, shape):
    model, batch, levels = small(dims), images(3, *shape), [0.3, 0.6, 1.0]
    together = model.sample(batch, levels, [1, 2, 3])
    for b in range(3):
        alone = model.sample(batch[b : b + 1], levels[b], [b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_a_sample_of_the_published_network_does_not_know_its_batch(cardiac, seed):
    model, batch = DRDM(cardiac), images(4, 37, 53)
    alone = model.sample(batch[1:2], 0.6, [seed])
    together = model.sample(batch, 0.6, [11, seed, 12, 13])
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-3)


SHAPES = [
    ((32, 32), None),
    ((37, 53), None),
    ((1, 512), None),
    ((5, 7), None),
    ((1, 1), None),
    ((60, 20), (1.0, 3.0)),
    ((200, 30), (0.5, 0.7)),
    ((17, 12, 9), None),
    ((20, 16, 5), (1.0, 1.0, 4.0)),
    ((1, 20, 3), None),
]


@pytest.mark.parametrize(("shape", "spacing"), SHAPES)
def test_any_shape_and_spacing(small, shape, spacing):
    ddf = small(len(shape), steps=2).sample(images(2, *shape), 0.7, [1, 2], spacing)
    assert ddf.shape == (2, len(shape), *shape)
    assert ddf.dtype == torch.float32
    assert bool(torch.isfinite(ddf).all())


@pytest.mark.parametrize(("dims", "shape"), [(2, (24, 40)), (2, (1, 50)), (3, (16, 9, 12))])
def test_reference_sampler_on_any_shape(small, dims, shape, few_time_steps):
    ddf = small(dims, "reference").sample(images(1, *shape), 0.1, [1])
    assert ddf.shape == (1, dims, *shape)
    assert bool(torch.isfinite(ddf).all())


def test_only_ratios_of_spacing_matter(small):
    model, image = small(), images(1, 40, 24)
    one, ten = (model.sample(image, 0.6, [3], (s, 2 * s)) for s in (1.0, 10.0))
    torch.testing.assert_close(one, ten, rtol=0, atol=1e-3)
    assert not torch.allclose(one, model.sample(image, 0.6, [3]), atol=0.1)


def test_intensity_scale_does_not_matter(small):
    model, image = small(), images(1, 40, 24)
    torch.testing.assert_close(
        model.sample(image, 0.6, [3]), model.sample(1000 * image - 500, 0.6, [3]), rtol=0, atol=1e-2
    )


def test_integer_images(small):
    image = (1000 * images(1, 40, 24)).round()
    model = small()
    assert torch.equal(model.sample(image.to(torch.int16), 0.6, [3]), model.sample(image, 0.6, [3]))


@pytest.mark.parametrize("value", [0.0, -1000.0, 3.0])
@pytest.mark.parametrize("dims", [2, 3])
def test_constant_image_is_finite(small, dims, value):
    ddf = small(dims, steps=2).sample(torch.full((1, 1, *(20, 14, 9)[:dims]), value), 0.6, [1])
    assert bool(torch.isfinite(ddf).all())


def test_constant_image_with_the_published_network(cardiac):
    ddf = DRDM(cardiac).sample(torch.zeros(1, 1, 40, 30), 0.8, [1])
    assert bool(torch.isfinite(ddf).all())
    assert float(fold_fraction(ddf)) <= 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS["recresacnet"])
def test_autocast_around_it_changes_nothing(small, sampler, few_time_steps):
    model, image = small(sampler=sampler), images(1, 37, 30)
    plain = model.sample(image, 0.6, [3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        inside = model.sample(image, 0.6, [3])
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(plain, inside)
    assert inside.dtype == torch.float32


@pytest.mark.parametrize("enabled", [True, False])
def test_no_gradients_and_grad_mode_as_before(small, enabled):
    model, image = small(), images(1, 20, 20)
    model.network.requires_grad_(True)
    seen = []
    with torch.set_grad_enabled(enabled):
        ddf = model.sample(image.requires_grad_(enabled), 0.6, [3], callback=seen.append)
        assert torch.is_grad_enabled() is enabled
        with pytest.raises(ValueError, match="finite"):
            model.sample(image * float("nan"), 0.6, [3])
        assert torch.is_grad_enabled() is enabled
        random_field = model.diffuse((20, 20), 0.6, [3])
    for field in (ddf, random_field, *(step.ddf for step in seen)):
        assert not field.requires_grad
        assert field.grad_fn is None
        assert not field.is_inference()
    ddf += 1.0  # an ordinary tensor


@pytest.mark.parametrize("sampler", SAMPLERS["recresacnet"])
def test_global_random_state_is_left_alone(small, sampler, few_time_steps):
    model, image = small(sampler=sampler), images(1, 20, 20)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    model.sample(image, 0.6, [3])
    model.diffuse((20, 20), 0.6, [3])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_global_seed_does_not_matter(small):
    model, image = small(), images(1, 20, 20)
    fields = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        fields.append(model.sample(image, 0.6, [3]))
    assert torch.equal(*fields)


def test_input_is_not_modified(small):
    image = images(1, 20, 20)
    before = image.clone()
    small().sample(image, 0.6, [3])
    assert torch.equal(image, before)


def test_callback_sees_the_working_grid(small):
    seen = []
    model = small(steps=3)
    model.sample(images(2, 60, 30), 0.6, [1, 2], callback=seen.append)
    assert [step.time for step in seen] == [48, 24, 0]
    assert all(step.ddf.shape == (2, 2, 32, 16) for step in seen)


def test_random_fields_are_those_of_the_process(small):
    on_its_grid = small().diffuse((32, 20), [0.3, 0.7], [1, 2])
    expected = diffuse([torch.Generator().manual_seed(s) for s in (1, 2)], (32, 20), [0.3, 0.7])
    torch.testing.assert_close(on_its_grid, expected, rtol=0, atol=1e-5)


def test_random_fields_of_the_reference_sampler_are_the_released_ones(small):
    ddf = small(sampler="reference").diffuse((32, 20), 0.6, [1])
    released, _ = diffuse_published([torch.Generator().manual_seed(1)], 32, 2, 48)
    torch.testing.assert_close(ddf, crop(fractions_to_voxels(released), (32, 20), centre=True))


def test_without_recovery_the_random_field_remains(small):
    model, image = small(scale=0), images(1, 60, 40)
    ddf, random_field = model.sample(image, 0.2, [5]), model.diffuse((60, 40), 0.2, [5])
    torch.testing.assert_close(ddf, random_field, rtol=0, atol=1e-2)


def test_more_channels(small):
    model = small(in_channels=2)
    assert model.sample(torch.cat([images(1, 20, 24)] * 2, dim=1), 0.5, [1]).shape == (1, 2, 20, 24)


def test_defaults_come_from_the_card(filled_network):
    network = filled_network(2)
    network.card = replace(network.card, sampler="fast", steps=7)
    assert (DRDM(network).sampler, DRDM(network).steps) == ("fast", 7)
    assert DRDM(network, steps=3).steps == 3
    assert (DRDM(network, "reference").sampler, DRDM(network, "reference").steps) == ("reference", 80)
    assert DRDM(network, "reference", 80).steps == 80
    assert DRDM(network).device == torch.device("cpu")


def test_unknown_sampler(filled_network):
    with pytest.raises(ValueError, match=r"sampler must be 'auto' or one of \('reference', 'fast'\).*got 'ddim'"):
        DRDM(filled_network(2), "ddim")


@pytest.mark.parametrize(("sampler", "steps"), [("fast", 0), ("fast", 49), ("auto", -1), ("reference", 20)])
def test_impossible_steps(filled_network, sampler, steps):
    with pytest.raises(ValueError, match=f"got (steps=)?{steps}"):
        DRDM(filled_network(2), sampler, steps)


@pytest.mark.parametrize("recovery", [1.5, -0.1, True, "all", float("nan")])
def test_impossible_recovery(filled_network, recovery):
    with pytest.raises(ValueError, match="recovery must be a number"):
        DRDM(filled_network(2), recovery=recovery)


@pytest.mark.parametrize("sampler", ["fast", "reference"])
def test_recovery_is_whole_for_published_samplers(filled_network, sampler):
    with pytest.raises(ValueError, match="needs sampler 'velocity'"):
        DRDM(filled_network(2), sampler, recovery=0.5)


def test_less_recovery_leaves_more_of_the_random_field():
    """None at all is a network that says nothing; the more, the farther the field goes from there."""
    network = load_network("anatomy-2d")
    image = images(2, 65, 65)
    found = [DRDM(network, recovery=recovery).sample(image, 0.4, [1, 2]) for recovery in (0.0, 0.3, 0.6, 1.0)]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    silent = DRDM(network, symmetry=0.0).sample(image, 0.4, [1, 2])
    torch.testing.assert_close(found[0], silent)
    away = [float((ddf - silent).norm(dim=1).mean()) for ddf in found]
    assert away == sorted(away)
    assert away[1] > 0.2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_image_that_is_not_finite(small, value):
    image = images(2, 20, 20)
    image[1, 0, 3, 4] = value
    with pytest.raises(ValueError, match="images must be finite"):
        small().sample(image, 0.6, [1, 2])


def test_image_beyond_single_precision(small):
    with pytest.raises(ValueError, match="images must be finite in float32"):
        small().sample(torch.full((1, 1, 20, 20), -1.7e308, dtype=torch.float64), 0.6, [1])


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_levels_as_a_tensor_or_array(small, kind):
    given, as_list = (small().sample(images(2, 20, 20), levels, [1, 2]) for levels in (kind([0.25, 0.5]), [0.25, 0.5]))
    assert torch.equal(given, as_list)


@pytest.mark.parametrize("shape", [(1, 20, 20), (1, 2, 20, 20), (1, 1, 20, 20, 20), (0, 1, 20, 20), (1, 1, 0, 20)])
def test_images_that_do_not_fit(small, shape):
    with pytest.raises(ValueError, match=re.escape(f"got {shape}")):
        small().sample(torch.zeros(shape), 0.6, [1])


@pytest.mark.parametrize(("level", "seeds"), [(0.5, [1]), (0.5, [1, 2, 3]), ([0.5], [1, 2]), ([0.1, 0.2, 0.3], [1, 2])])
def test_one_seed_and_level_per_image(small, level, seeds):
    with pytest.raises(ValueError, match=r"one seed per image|one number or one per sample"):
        small().sample(images(2, 20, 20), level, seeds)


def test_autocast_does_not_touch_the_random_field(small):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = small().diffuse((30, 24), 0.7, [3])
    torch.testing.assert_close(inside, small().diffuse((30, 24), 0.7, [3]), rtol=0, atol=0)


@pytest.mark.parametrize("spacing", [(0.0, 1.0), (1.0,), (1.0, 1.0, 1.0), (1.0, float("nan"))])
def test_spacing_that_does_not_fit(small, spacing):
    with pytest.raises(ValueError, match="spacing must be 2 positive numbers"):
        small().sample(images(1, 20, 20), 0.5, [1], spacing)


def test_reference_sampler_takes_all_its_steps(small):
    seen = []
    small(sampler="reference").sample(images(1, 20, 20), 0.3, [1], callback=seen.append)
    assert [step.time for step in seen] == list(range(79, -1, -1))


@pytest.mark.parametrize("level", [0.0, 1.1, -0.5, float("nan")])
@pytest.mark.parametrize("sampler", SAMPLERS["recresacnet"])
def test_level_outside_its_range(small, sampler, level):
    with pytest.raises(ValueError, match=r"deformation_level must be in \(0, 1\]"):
        small(sampler=sampler).sample(images(1, 20, 20), level, [1])
