import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import DVF2DDF
from scipy.ndimage import zoom

from monai_drdm.fields import fold_fraction
from monai_drdm.registration import load_registration, register, RegistrationNetwork, save_registration
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


def test_a_coarser_network_sees_every_voxel_and_its_field_is_upsampled(smooth_field):
    """Beside torch's pixel_unshuffle, and interpolation by SciPy's zoom."""
    network = RegistrationNetwork(Structure("regunet", 2, 4, depth=1, diffeomorphic=False, stride=3, forces=False))
    said = smooth_field((16, 12))
    network.backbone = Remembers(said)
    moving, fixed = torch.rand(1, 1, 47, 36), torch.rand(1, 1, 47, 36)
    found = register(network, moving, fixed)
    padded = F.pad(torch.cat([moving, fixed], dim=1), [0, 0, 0, 1], "replicate")
    assert torch.equal(network.backbone.seen, F.pixel_unshuffle(padded, 3))
    larger = torch.stack([torch.from_numpy(zoom(one.numpy(), 3, order=1)) for one in said[0]])
    scale = torch.tensor([47 / 15, 35 / 11]).view(2, 1, 1)
    torch.testing.assert_close(found[0], (larger * scale)[:, :47], atol=1e-4, rtol=0)


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
    with pytest.raises(ValueError, match="is not a registration network"):
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


def test_images_of_another_shape_are_refused():
    network = RegistrationNetwork(Structure("regunet", 2, channels=3, depth=2))
    with pytest.raises(ValueError, match=r"\(B, 2, \*S\)"):
        network(torch.rand(1, 1, 20, 20))
