import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save as to_safetensors

from monai_drdm.fields import identity_grid, resize_ddf
from monai_drdm.networks import load_network, network_sha256, NetworkCard, save_network, VelocityUNet
from monai_drdm.networks.velocity_unet import half_shape

SHAPES_2D = [(1, 1), (1, 33), (33, 1), (3, 5), (17, 17), (35, 51), (65, 19), (97, 3)]
SHAPES_3D = [(1, 1, 1), (1, 17, 9), (17, 1, 1), (3, 5, 7), (19, 11, 33), (17, 17, 17)]
LEVEL = torch.tensor([0.4])


def nudged(dims, in_channels=1, scale=0.1, **options):
    """A network in evaluation mode that predicts something."""
    torch.manual_seed(dims)
    network = VelocityUNet(dims, in_channels, **options).eval()
    with torch.no_grad():
        network.out.weight.normal_(std=scale)
        network.out.bias.normal_(std=scale)
    return network


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("full", "half"), [((1, 1), (1, 1)), ((3, 5), (2, 3)), ((161, 33), (81, 17)), ((97, 1, 21), (49, 1, 11))]
)
def test_half_shape(full, half):
    assert half_shape(full) == half


@pytest.mark.parametrize("shape", SHAPES_2D + SHAPES_3D)
@torch.no_grad()
def test_any_odd_shape(shape):
    velocity = nudged(len(shape))(noise(2, 1, *shape), LEVEL)
    assert velocity.shape == (2, len(shape), *(n // 2 + 1 for n in shape))
    assert velocity.dtype == torch.float32
    assert bool(torch.isfinite(velocity).all())
    assert float(velocity.abs().max()) > 0


@pytest.mark.parametrize("channels", [(8, 16), (4, 4), (5, 7, 9)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (21, 33)])
@torch.no_grad()
def test_any_features_on_any_shape(channels, shape):
    velocity = nudged(2, channels=channels)(noise(1, 1, *shape), LEVEL)
    assert velocity.shape == (1, 2, *half_shape(shape))
    assert bool(torch.isfinite(velocity).all())


@torch.no_grad()
def test_several_channels():
    network, image = nudged(2, 3), noise(1, 3, 33, 21)
    velocity = network(image, LEVEL)
    assert velocity.shape == (1, 2, 17, 11)
    for channel in range(3):
        other = image.clone()
        other[:, channel] = 0
        assert not torch.allclose(network(other, LEVEL), velocity, atol=1e-4)


@pytest.mark.parametrize("shape", [(33, 21), (17, 9, 1)])
@torch.no_grad()
def test_untrained_predicts_nothing(shape):
    assert torch.equal(
        VelocityUNet(len(shape))(noise(1, 1, *shape), LEVEL), torch.zeros(1, len(shape), *half_shape(shape))
    )


@pytest.mark.parametrize(
    ("shape", "exact"),
    [((51, 67), (65, 81)), ((19, 49), (33, 49)), ((35, 3, 1), (49, 17, 1)), ((19, 9, 17), (33, 17, 17))],
)
@torch.no_grad()
def test_padding_is_that_of_zeros_around_the_image(shape, exact):
    """The three lower grids halve the half grid three times: full sizes of 16 k + 1 need no padding."""
    network = nudged(len(shape))
    framed = torch.zeros(1, 1, *exact)
    inside = tuple(slice(n) for n in shape)
    framed[(..., *inside)] = noise(*shape)
    assert half_shape(exact) == tuple(8 * k + 1 for k in ((n - 1) // 16 for n in exact))
    expected = network(framed, LEVEL)[(..., *(slice(n) for n in half_shape(shape)))]
    torch.testing.assert_close(network(framed[(..., *inside)], LEVEL), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(33, 19), (17, 9, 11), (1, 17)])
def test_finite_gradients_of_every_parameter(shape):
    network = nudged(len(shape)).train()
    network(noise(2, 1, *shape), torch.tensor([0.2, 0.9])).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert float(parameter.grad.abs().max()) > 0, name


def test_gradient_reaches_the_image():
    image = noise(1, 1, 19, 25).requires_grad_()
    nudged(2)(image, LEVEL).square().sum().backward()
    assert bool(torch.isfinite(image.grad).all())
    assert float(image.grad.abs().min()) > 0  # every voxel counts


@torch.no_grad()
def test_trains():
    """A few steps of gradient descent bring the output nearer to a target."""
    network, image, target = VelocityUNet(2, channels=(8, 16)), noise(2, 1, 17, 17), noise(2, 2, 9, 9, seed=1)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        with torch.enable_grad():
            loss = (network(image, LEVEL) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.25 * losses[0]


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_level_matters(dims):
    network, image = nudged(dims), noise(1, 1, *(17,) * dims)
    velocities = [network(image, torch.tensor([level])) for level in (0.05, 0.1, 0.5, 1.0)]
    for i, one in enumerate(velocities):
        for other in velocities[:i]:
            assert float((one - other).abs().max()) > 1e-3 * float(one.abs().max())


@pytest.mark.parametrize("shape", [(35, 21), (17, 11, 9)])
@torch.no_grad()
def test_a_sample_does_not_know_its_batch(shape):
    network, images, levels = nudged(len(shape)), noise(3, 1, *shape), torch.tensor([0.1, 0.5, 1.0])
    images[1] *= 100
    together = network(images, levels)
    for b in (0, 2):
        alone = network(images[b : b + 1], levels[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-5)
    alone = network(images[1:2], levels[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


@torch.no_grad()
def test_one_level_for_all():
    network, images = nudged(2), noise(3, 1, 17, 17)
    torch.testing.assert_close(network(images, LEVEL), network(images, LEVEL.expand(3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(33, 21), (17, 9, 11)])
@torch.no_grad()
def test_float32_out_of_autocast(shape):
    network, image = nudged(len(shape)), noise(1, 1, *shape)
    plain = network(image, LEVEL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network.stem(image).dtype == torch.bfloat16
        half = network(image, LEVEL)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0, atol=0.1 * float(plain.abs().max()))


@torch.no_grad()
def test_inputs_are_not_modified():
    image, level = noise(1, 1, 19, 35), LEVEL.clone()
    before = image.clone()
    nudged(2)(image, level)
    assert torch.equal(image, before)
    assert torch.equal(level, LEVEL)


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        (2, (1, 1, 32, 33)),
        (2, (1, 1, 33, 2)),
        (2, (1, 1, 0, 33)),
        (2, (1, 2, 33, 33)),
        (2, (1, 33, 33)),
        (2, (1, 1, 9, 9, 9)),
        (3, (1, 1, 9, 9)),
        (3, (1, 1, 9, 9, 8)),
    ],
)
def test_wrong_images(dims, shape):
    with pytest.raises(ValueError, match="x must have shape"):
        VelocityUNet(dims)(torch.zeros(shape), LEVEL)


@pytest.mark.parametrize(
    "level",
    [
        torch.tensor([1]),
        torch.tensor([True]),
        torch.tensor(0.5),
        torch.tensor([[0.5]]),
        torch.full((2,), 0.5),
        torch.full((4,), 0.5),
        torch.zeros(0),
    ],
)
def test_wrong_levels(level):
    with pytest.raises(ValueError, match="level must be"):
        VelocityUNet(2)(torch.zeros(3, 1, 9, 9), level)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((1,), {}),
        ((4,), {}),
        ((2, 0), {}),
        ((2, 65), {}),
        ((2,), {"channels": ()}),
        ((2,), {"channels": (16,)}),
        ((3,), {"channels": (16, 0)}),
        ((3,), {"channels": (16, -4)}),
        ((2,), {"channels": (16, 5000)}),
    ],
)
def test_senseless_networks(args, options):
    with pytest.raises(ValueError, match="must be"):
        VelocityUNet(*args, **options)


# where the half grid lies


def passing(dims, deepest):
    """A network that hands the image through: ``z = silu(z) - silu(-z)`` on a pair of features ``(z, -z)``.

    Through the half grid alone, or through every coarser grid and back.
    """
    network = VelocityUNet(dims, channels=(2, 2, 2, 2)).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.zero_()
    eye = torch.eye(2)
    centre = (slice(None), slice(None), *(1,) * dims)
    network.stem.weight[(slice(None), 0, *(2,) * dims)] = torch.tensor([1.0, -1.0])
    for down in network.downs:
        down.weight[centre] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    for up, block in zip(network.ups, network.up_blocks):
        up.weight.copy_(eye.view(2, 2, *(1,) * dims))
        kept, upsampled = (0 * eye, eye) if deepest else (eye, 0 * eye)
        block.skip.weight.copy_(torch.cat((kept, upsampled), dim=1).view(2, 4, *(1,) * dims))
    network.out.weight[(0, slice(None), *(1,) * dims)] = torch.tensor([1.0, -1.0])
    return network


@pytest.mark.parametrize("shape", [(49, 33), (35, 51), (3, 19), (1, 27), (17, 33, 17), (11, 1, 19)])
def test_half_voxel_i_lies_at_voxel_2i(shape):
    network = passing(len(shape), deepest=False)
    for coordinate in identity_grid(shape):
        seen = network(coordinate[None, None], LEVEL)[0, 0]
        torch.testing.assert_close(seen, coordinate[tuple(slice(None, None, 2) for _ in shape)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(49, 33), (17, 81), (1, 33), (17, 33, 17)])
def test_coarser_grids_lie_on_the_half_grid(shape):
    """A ramp through the coarsest grid and back is the ramp: no grid is shifted or scaled against the next."""
    network = passing(len(shape), deepest=True)
    for coordinate in identity_grid(shape):
        seen = network(coordinate[None, None], LEVEL)[0, 0]
        torch.testing.assert_close(seen, coordinate[tuple(slice(None, None, 2) for _ in shape)], rtol=0, atol=1e-3)
    image = noise(1, 1, *shape)
    eighth = network(image, LEVEL)[0, 0][tuple(slice(None, None, 8) for _ in shape)]
    expected = image[0, 0][tuple(slice(None, None, 16) for _ in shape)]
    torch.testing.assert_close(eighth, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(33, 19), (3, 51), (1, 21), (9, 17, 5)])
def test_half_grid_and_full_grid_agree_on_a_linear_field(shape):
    """What the half grid says of voxel 2i is, in voxels twice as small, what the full grid gets there."""
    dims = len(shape)
    matrix = torch.randn(dims, dims, generator=torch.Generator().manual_seed(3))

    def linear(positions):
        moved = torch.einsum("ij,j...->i...", matrix, positions)
        return moved * torch.tensor([float(n > 1) for n in shape]).view(-1, *(1,) * dims)

    half = linear(2 * identity_grid(half_shape(shape))) / 2
    torch.testing.assert_close(resize_ddf(half[None], shape)[0], linear(identity_grid(shape)), rtol=1e-5, atol=1e-4)


# cards and files


@pytest.mark.parametrize("dims", [2, 3])
def test_card(dims):
    card = VelocityUNet(dims, 2, channels=[8, 12, 20]).card
    assert (card.kind, card.sampler, card.spatial_dims, card.in_channels) == ("velocity_unet", "velocity", dims, 2)
    assert card.channels == (8, 12, 20)
    assert card.working_size % 2 == 1
    assert json.loads(card.to_json())["channels"] == [8, 12, 20]
    assert NetworkCard.from_json(card.to_json()) == card


@pytest.mark.parametrize(("dims", "shape"), [(2, (33, 19)), (3, (17, 9, 11))])
@torch.no_grad()
def test_file_round_trip(tmp_path, dims, shape):
    network = nudged(dims)
    network.card = replace(network.card, name="mine", steps=3, training_data="phantoms")
    path = tmp_path / "mine.safetensors"
    digest = save_network(network, path)
    assert path.stat().st_size <= 4_000_000
    loaded = load_network(path)
    assert isinstance(loaded, VelocityUNet)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.card == replace(network.card, sha256=digest)
    assert network_sha256(loaded) == network_sha256(network) == digest
    image = noise(1, 1, *shape)
    assert torch.equal(loaded(image, LEVEL), network(image, LEVEL))


@torch.no_grad()
def test_file_of_other_channels(tmp_path):
    network = nudged(2, 3, channels=(6, 10))
    save_network(network, tmp_path / "n.safetensors")
    image = noise(1, 3, 21, 19)
    assert torch.equal(load_network(tmp_path / "n.safetensors")(image, LEVEL), network(image, LEVEL))


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ([16, 32, 48], "tensors of velocity_unet"),
        ([16, 32, 48, 64, 80], "tensors of velocity_unet"),
        ([16, 32, 48, 65], "must be"),
        ([64, 48, 32, 16], "must be"),
        ([16, 32, 48, 0], "channels must be"),
        ([16, 32, 48, 64.0], "channels must be"),
        ([16, 32, 48, "64"], "channels must be"),
        ([16, 32, 48, True], "channels must be"),
        ([[16, 32], [48, 64]], "channels must be"),
        ("16,32,48,64", "channels must be"),
        (16, "network card"),
        (None, "network card"),
        ([16], "channels two or more"),
        ([], "channels two or more"),
    ],
)
def test_damaged_channels_are_refused(tmp_path, channels, message):
    network = VelocityUNet(2)
    card = json.dumps({**json.loads(network.card.to_json()), "channels": channels})
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(to_safetensors(network.state_dict(), {"monai_drdm": card}))
    with pytest.raises(ValueError, match=message):
        load_network(path)


@pytest.mark.parametrize("kind", ["recresacnet", "velocity_net", ""])
def test_another_kind_is_refused(tmp_path, kind):
    network = VelocityUNet(2, channels=(4, 8))
    network.card = replace(network.card, kind=kind)
    save_network(network, tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match=r"kind must be|tensors of recresacnet|network card"):
        load_network(tmp_path / "n.safetensors")
