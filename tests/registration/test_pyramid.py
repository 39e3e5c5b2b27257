from __future__ import annotations

import pytest
import torch
from scipy.ndimage import shift as shifted_by_scipy

from monai_drdm.registration.networks import RegistrationNetwork, Structure
from monai_drdm.registration.pyramid import _products, PyramidNet


@pytest.mark.parametrize("diffeomorphic", [True, False])
@pytest.mark.parametrize("shape", [(16, 24), (8, 16, 8)])
def test_every_weight_matters(filled, shape, diffeomorphic):
    network = filled(PyramidNet(len(shape), channels=4, depth=2, diffeomorphic=diffeomorphic))
    velocity = network(torch.rand(2, 2, *shape))
    assert velocity.shape == (2, len(shape), *shape)
    velocity.square().sum().backward()
    idle = [name for name, one in network.named_parameters() if one.grad is None or not one.grad.abs().max() > 0]
    assert not idle


@pytest.mark.parametrize("forces", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2, 9)])
def test_images_may_be_tiny(filled, shape, forces):
    network = filled(RegistrationNetwork(Structure("pyramid", len(shape), 4, forces=forces)))
    ddf = network(torch.rand(1, 2, *shape))
    assert ddf.shape == (1, len(shape), *shape)
    assert bool(ddf.isfinite().all())


@pytest.mark.parametrize(("size", "seen"), [(40, 24), (48, 24), (64, 32), (9, 16)])
def test_images_are_padded_no_further_than_needed(size, seen):
    """To a multiple of 16, for a stride of 2 and three halvings; with forces, to two voxels on the coarsest grid."""
    network, shapes = RegistrationNetwork(Structure("pyramid", 2, 4)), []
    network.backbone.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[2:]))
    network(torch.rand(1, 2, size, size))
    assert shapes == [(seen, seen)]


def test_one_image_of_a_batch_does_not_depend_on_the_others(filled):
    network = filled(PyramidNet(2, channels=4)).eval()
    images = torch.rand(3, 2, 16, 24)
    alone = torch.cat([network(one[None]) for one in images])
    torch.testing.assert_close(network(images), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 3)])
def test_features_are_compared_with_their_direct_neighbours(shape):
    moving, fixed = torch.randn(2, 1, 3, *shape, dtype=torch.float64)
    steps = [[0] * len(shape)]
    for axis in range(len(shape)):
        steps += [[step * (axis == one) for one in range(len(shape))] for step in (-1, 1)]
    expected = [
        (
            torch.from_numpy(shifted_by_scipy(moving[0].numpy(), [0, *(-n for n in step)], order=0, mode="nearest"))
            * fixed[0]
        ).mean(dim=0)
        for step in steps
    ]
    torch.testing.assert_close(_products(moving, fixed)[0], torch.stack(expected))


def pair_by_a_shift(generator, count):
    """Texture, and the same texture shifted by up to 4 voxels along each axis; the shift is the field."""
    texture = torch.rand(count, 1, 10, 10, generator=generator)
    texture = torch.nn.functional.interpolate(texture, (40, 40), mode="bilinear")
    steps = torch.randint(-4, 5, (count, 2), generator=generator).tolist()
    fixed = torch.stack([one.roll([-a, -b], dims=(1, 2)) for one, (a, b) in zip(texture, steps)])
    return torch.cat([texture, fixed], dim=1), torch.tensor(steps).float().view(count, 2, 1, 1)


@pytest.mark.parametrize(("kind", "low", "high"), [("pyramid", 0.0, 0.3), ("voxelmorph", 0.8, 1.2)])
def test_it_finds_shifts_after_a_few_steps_of_training(kind, low, high):
    """From the images alone; a VoxelMorph without forces is where it began after as many steps."""
    generator = torch.Generator().manual_seed(0)
    network = RegistrationNetwork(Structure(kind, 2, 8, 2, True, 2, False))
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)

    def error(count):
        images, steps = pair_by_a_shift(generator, count)
        apart = (network(images) - steps)[..., 8:-8, 8:-8].norm(dim=1).mean()
        return apart, steps.norm(dim=1).mean()

    for _ in range(150):
        optimiser.zero_grad()
        error(8)[0].backward()
        optimiser.step()
    with torch.no_grad():
        left, length = error(32)
    assert low <= float(left / length) < high


@pytest.mark.parametrize("numbers", [(4, 1, 8, 2), (2, 0, 8, 2), (2, 1, 0, 2), (2, 1, 8, -1)])
def test_numbers_are_checked(numbers):
    with pytest.raises(ValueError, match="a pyramid needs"):
        PyramidNet(*numbers)
