import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import DVF2DDF, Warp

from monai_drdm.fields import fold_fraction, resize_image
from monai_drdm.registration import load_registration, register, RegistrationNetwork, save_registration, unit_range
from monai_drdm.registration.networks import kinds, Structure


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("shape", [(37, 22), (19, 24, 13)])
def test_networks_begin_with_the_identity_at_any_size(kind, shape):
    network = RegistrationNetwork(Structure(kind, len(shape), channels=4, depth=2))
    moving, fixed = torch.rand(2, 1, *shape), torch.rand(2, 1, *shape)
    ddf = register(network, moving, fixed)
    assert ddf.shape == (2, len(shape), *shape)
    assert float(ddf.abs().max()) == 0


class Says(torch.nn.Module):
    """A network that says the same of all images."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, images):
        return self.field


def test_what_a_network_says_is_a_velocity_or_a_field(smooth_field):
    images = torch.rand(1, 1, 48, 48), torch.rand(1, 1, 48, 48)
    said = 4 * smooth_field((48, 48))
    found = []
    for diffeomorphic in (True, False):
        network = RegistrationNetwork(
            Structure("regunet", 2, 4, depth=2, diffeomorphic=diffeomorphic, stride=1, forces=False)
        )
        network.backbone = Says(said)
        found.append(register(network, *images))
    assert torch.equal(found[1], said)
    flow = DVF2DDF(num_steps=6, mode="bilinear", padding_mode="border")(said)
    torch.testing.assert_close(found[0], flow, atol=1e-3, rtol=0)
    assert float(fold_fraction(found[0])) < 0.2 * float(fold_fraction(found[1]))


class Remembers(Says):
    """Keeps what it was shown."""

    def forward(self, images):
        self.seen = images
        return self.field


@pytest.mark.parametrize("shape", [(47, 36), (20, 31, 24)])
def test_a_coarser_network_sees_every_voxel_and_its_field_is_linear_between_blocks(shape):
    """A map that is linear in the centres of blocks is the same map in voxels; what is seen beside pixel_unshuffle."""
    dims, stride = len(shape), 3
    network = RegistrationNetwork(Structure("regunet", dims, 4, depth=1, diffeomorphic=False, stride=3, forces=False))
    coarse = [-(-n // (2 * stride)) * 2 for n in shape]
    linear = torch.randn(dims, dims, generator=torch.Generator().manual_seed(0))

    def field(*axes):
        return torch.einsum("ij,j...->i...", linear, torch.stack(torch.meshgrid(*axes, indexing="ij")))[None]

    network.backbone = Remembers(field(*(stride * torch.arange(n) + (stride - 1) / 2 for n in coarse)) / stride)
    moving, fixed = torch.rand(1, 1, *shape), torch.rand(1, 1, *shape)
    found = register(network, moving, fixed)
    expected = field(*(torch.arange(n).float() for n in shape))
    inner = (..., *(slice(1, -1),) * dims)  # half a block at the border has no neighbour
    torch.testing.assert_close(found[inner], expected[inner], atol=1e-3, rtol=0)
    if dims == 2:
        padded = F.pad(torch.cat([moving, fixed], dim=1), [0, 0, 0, 1], "replicate")
        assert torch.equal(network.backbone.seen, F.pixel_unshuffle(padded, 3))


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_shift_of_everything_is_the_same_at_any_size(stride):
    network = RegistrationNetwork(Structure("regunet", 2, 4, depth=1, diffeomorphic=False, stride=stride, forces=False))
    for size in (16, 33, 128):
        coarse = -(-size // (2 * stride)) * 2
        network.backbone = Says(torch.full((1, 2, coarse, coarse), 4.0 / stride))
        found = register(network, torch.rand(1, 1, size, size), torch.rand(1, 1, size, size))
        torch.testing.assert_close(found, torch.full((1, 2, size, size), 4.0))


def test_every_round_registers_what_the_last_one_left(smooth_field):
    """Beside a chain of MONAI's Warp."""
    said = 2 * smooth_field((40, 44))
    network = RegistrationNetwork(Structure("regunet", 2, 4, depth=1, diffeomorphic=False, stride=1, forces=False))
    network.backbone = Remembers(said)
    moving, fixed = (F.interpolate(torch.rand(1, 1, 10, 11), (40, 44), mode="bicubic").clamp(0, 1) for _ in range(2))
    found = register(network, moving, fixed, rounds=3)
    monai_warp = Warp("bilinear", "border")
    twice = monai_warp(said, said) + said
    torch.testing.assert_close(network.backbone.seen[:, :1], monai_warp(moving, twice), atol=1e-5, rtol=0)
    torch.testing.assert_close(network.backbone.seen[:, 1:], fixed)
    torch.testing.assert_close(found, monai_warp(twice, said) + said, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="rounds must be 1 or more, got 0"):
        register(network, moving, fixed, rounds=0)


def test_a_coarser_network_of_volumes_takes_all_of_them():
    network = RegistrationNetwork(Structure("regunet", 3, 4, depth=1, stride=2, forces=False))
    network.backbone = Remembers(torch.zeros(1, 3, 4, 6, 8))
    moving, fixed = torch.rand(1, 1, 8, 12, 16), torch.rand(1, 1, 8, 12, 16)
    register(network, moving, fixed)
    assert network.backbone.seen.shape == (1, 16, 4, 6, 8)
    corner = torch.stack(
        [image[0, 0, a::2, b::2, c::2] for image in (moving, fixed) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    )
    assert torch.equal(network.backbone.seen[0], corner)


@pytest.fixture
def smooth_field():
    """A field of waves of unit height."""

    def build(shape):
        axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
        return torch.stack([torch.sin(axes[1] / 3), torch.cos(axes[0] / 3 + axes[1] / 5)])[None]

    return build


@pytest.mark.parametrize("kind", kinds())
def test_what_is_written_comes_back(kind, tmp_path):
    network = RegistrationNetwork(Structure(kind, 2, channels=3, depth=2)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_registration(network, tmp_path / "net.safetensors")
    again = load_registration(tmp_path / "net.safetensors")
    assert again.structure == network.structure
    images = torch.rand(1, 1, 20, 24), torch.rand(1, 1, 20, 24)
    assert torch.equal(register(again, *images), register(network, *images))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no registration network"):
        load_registration(tmp_path / "none.safetensors")
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="cannot be read as a registration network"):
        load_registration(path)
    network = RegistrationNetwork(Structure("regunet", 2, channels=3, depth=2))
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    save_registration(network, path)
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_registration(path)


@pytest.mark.parametrize("arguments", [("resnet",), ("regunet", 4), ("regunet", 2, 1), ("regunet", 2, 8, 0)])
def test_structures_are_checked(arguments):
    with pytest.raises(ValueError, match=r"kind must be|a registration network needs"):
        Structure(*arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"working_size": "64"}, "working_size must be a whole number, got '64'"),
        ({"depth": 2.5}, r"depth must be a whole number, got 2\.5"),
        ({"forces": "no"}, "forces must be True or False, got 'no'"),
    ],
)
def test_types_of_structures_are_checked(arguments, says):
    with pytest.raises(TypeError, match=says):
        Structure(**arguments)


def test_images_of_another_shape_are_refused():
    network = RegistrationNetwork(Structure("regunet", 2, channels=3, depth=2))
    with pytest.raises(ValueError, match=r"\(B, 2, \*S\)"):
        network(torch.rand(1, 1, 20, 20))


@pytest.mark.parametrize(
    "spoil", [lambda image: 255 * image, lambda image: image - 0.5, lambda image: image * torch.nan]
)
def test_images_of_another_range_are_refused(spoil):
    network = RegistrationNetwork(Structure(spatial_dims=2, channels=4, depth=1)).train()
    image = torch.rand(1, 1, 16, 18, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"fixed must be in \[0, 1\].* Use unit_range"):
        register(network, image, spoil(image))
    assert register(network, image, unit_range(255 * image[0])[None]).shape == (1, 2, 16, 18)
    assert network.training, "the mode is as it was"


@pytest.mark.parametrize(("shape", "seen"), [((60, 33), (24, 13)), ((20, 48, 31), (10, 24, 16)), ((24, 20), (24, 20))])
def test_larger_images_are_registered_on_a_coarser_grid(shape, seen):
    """Beside the same network without a working size, on images and with a field resampled by torch."""
    dims, mode = len(shape), "bilinear" if len(shape) == 2 else "trilinear"
    small, large = (RegistrationNetwork(Structure("voxelmorph", dims, 4, 2, working_size=size)) for size in (0, 24))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one, other in zip(small.parameters(), large.parameters()):
            other.copy_(one.copy_(0.2 * torch.randn(one.shape, generator=generator)))
    images = torch.rand(1, 2, *shape)
    with torch.no_grad():
        coarse = small(resize_image(images, seen))
        steps = torch.tensor([(n - 1) / (m - 1) for n, m in zip(shape, seen)]).view(1, dims, *(1,) * dims)
        expected = steps * F.interpolate(coarse, shape, mode=mode, align_corners=True)
        assert float(expected.abs().max()) > 0.1
        torch.testing.assert_close(large(images), expected, atol=1e-4, rtol=1e-4)
