import math
import re
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monai_drdm.networks import load_network, RecResACNet

PARITY = [
    f"net{dims}d_{size}_t{t}_rec{recursions}"
    for dims, size in ((2, 32), (2, 64), (3, 16), (3, 32))
    for t in ("0_79", "48_7")
    for recursions in (1, 2)
]

# Six numbers of the output for `wave(2, shape)`, t = (7, 60), filled network, at `spots`. They were taken from this
# implementation while it agreed with the authors' to 1e-6 (test_parity_with_the_release).
RECORDED = [
    (2, (40, 40), 1, (-0.0328415, -0.0334044, -0.0915982, -0.0588946, -0.0674092, -0.0811132)),
    (2, (40, 40), 2, (-0.0771767, -0.1115366, -0.1440201, -0.0994496, -0.06791, -0.1801677)),
    (2, (24, 41), 1, (-0.0490954, -0.0600746, -0.0780712, -0.0346235, -0.0450717, -0.066523)),
    (2, (24, 41), 2, (-0.0926329, -0.0687323, -0.1940213, -0.0811987, -0.1009108, -0.1855613)),
    (3, (16, 16, 16), 1, (-0.0350573, -0.0678931, -0.0904069, -0.0347912, -0.0676873, -0.0910406)),
    (3, (16, 16, 16), 2, (-0.0700931, -0.1360836, -0.1817003, -0.0697392, -0.1379133, -0.1830719)),
    (3, (8, 13, 10), 1, (-0.0348113, -0.0681606, -0.0902233, -0.0363522, -0.0670995, -0.0889737)),
    (3, (8, 13, 10), 2, (-0.0700314, -0.1357717, -0.1808757, -0.072529, -0.1350423, -0.1809063)),
]

SHAPES = [(16, 16), (40, 24), (33, 47), (1, 160), (160, 1), (5, 7), (1, 1), (8, 16, 24), (9, 5, 7), (1, 17, 3)]


@pytest.fixture(scope="module")
def kept_network(filled_network):
    """``filled_network``, made once: for tests that do not change it."""
    return cache(filled_network)


def wave(batch, shape, channels=1):
    """Images in [0, 1] from a formula."""
    k = torch.arange(channels * math.prod(shape), dtype=torch.float64)
    images = torch.stack([0.5 + 0.5 * torch.sin(0.013 * k + 0.7 * b) for b in range(batch)])
    return images.reshape(batch, channels, *shape).float()


def spots(tensor, count=6):
    flat = tensor.flatten()
    return flat[[i * flat.numel() // count + 5 * i for i in range(count)]]


@pytest.mark.parametrize("key", PARITY)
def test_parity_with_the_release(reference, kept_network, key):
    dims, size, *t, recursions = (int(n) for n in re.findall(r"\d+", key.replace("d_", "_")))
    with np.load(reference / "network_parity.npz") as file:
        image, expected = torch.from_numpy(file[f"x{dims}d_{size}"]), torch.from_numpy(file[key])
    out = kept_network(dims)(image, torch.tensor(t), recursions)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_every_recorded_output_is_compared(reference):
    with np.load(reference / "network_parity.npz") as file:
        assert {key for key in file if key.startswith("net")} == set(PARITY)


@pytest.mark.parametrize(("dims", "shape", "recursions", "expected"), RECORDED)
def test_recorded_numbers(kept_network, dims, shape, recursions, expected):
    out = kept_network(dims)(wave(2, shape), torch.tensor([7, 60]), recursions)
    torch.testing.assert_close(spots(out), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dims", "numbers"), [(2, 443_435), (3, 1_313_646)])
def test_state_dict_has_the_published_size(dims, numbers):
    state = RecResACNet(dims).state_dict()
    assert len(state) == 193
    assert sum(tensor.numel() for tensor in state.values()) == numbers
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_state_dict_has_the_published_names():
    state = RecResACNet(2).state_dict()
    assert tuple(state["time_embed.weight"].shape) == (80, 100)
    assert tuple(state["b1.0.conv0.weight"].shape) == (10, 1, 3, 3)
    assert tuple(state["b_mid.2.convs.1.weight"].shape) == (40, 40, 3, 3)
    assert tuple(state["conv_out.weight"].shape) == (2, 10, 3, 3)
    assert "b3.0.ln.weight" in state
    assert "b_mid.0.ln.weight" in state
    assert not any(name.startswith(("b4", "b5", "b_out")) and ".ln." in name for name in state)


def test_state_dict_fits_the_published_file(reference):
    path = reference / "000000_cmr_recresacnet.pth"
    published = torch.load(path, map_location="cpu", weights_only=True)
    ours = RecResACNet(2).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in published.items()}
    torch.testing.assert_close(ours["time_embed.weight"], published["time_embed.weight"], rtol=0, atol=1e-5)


def test_time_table_formula():
    table = RecResACNet(2).time_embed.weight
    for t in (0, 1, 7, 48, 79):
        for i in (0, 1, 10, 49):
            angle = t * 10_000 ** (-4 * i / 100)
            assert float(table[t, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(table[t, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-6)
    assert not table.requires_grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recursions", [1, 2, 3])
def test_any_size_gives_that_size(kept_network, shape, recursions):
    dims = len(shape)
    out = kept_network(dims)(wave(2, shape), torch.tensor([0, 79]), recursions)
    assert out.shape == (2, dims, *shape)
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("shape", [(21, 30), (40, 17), (9, 10, 15)])
def test_padding_is_zeros_at_the_end_cropped_again(kept_network, shape):
    network, image, t = kept_network(len(shape)), wave(1, shape), torch.tensor([31])
    padding = [p for n in reversed(shape) for p in (0, -n % 8)]
    by_hand = network(F.pad(image, padding), t, recursions=1)[(..., *(slice(n) for n in shape))]
    torch.testing.assert_close(network(image, t, recursions=1), by_hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 40), (16, 8, 24)])
def test_second_recursion_sees_the_original_image_warped(kept_network, shape):
    network, image, t = kept_network(len(shape)), wave(1, shape), torch.tensor([12])
    first = network(image, t, recursions=1)
    second = network(grid_sample(image, first * max(shape), "zeros"), t, recursions=1)
    expected = second + grid_sample(first, second * max(shape), "border")
    torch.testing.assert_close(network(image, t, recursions=2), expected, rtol=0, atol=1e-5)


def grid_sample(tensor, ddf, padding_mode):
    """Warp by a field in voxels, written without the package."""
    shape = tensor.shape[2:]
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
    unit = [2 * (axes[d] + ddf[:, d]) / (n - 1) - 1 for d, n in enumerate(shape)]
    return F.grid_sample(tensor, torch.stack(unit[::-1], dim=-1), padding_mode=padding_mode, align_corners=True)


@pytest.mark.parametrize("shape", [(16, 40), (8, 8, 24)])
def test_output_is_clamped_inside_the_image(filled_network, shape):
    network = filled_network(len(shape))
    network.conv_out.bias += torch.tensor([5.0, -5.0, 5.0])[: len(shape)]
    out = network(wave(1, shape), torch.tensor([0]), recursions=1)
    assert float(out.abs().max()) == pytest.approx(1 - 1 / max(shape), abs=1e-6)


def test_samples_of_a_batch_are_independent(kept_network):
    network, images, t = kept_network(2), wave(3, (24, 32)), torch.tensor([0, 40, 79])
    together = network(images, t)
    for b in range(3):
        torch.testing.assert_close(network(images[b : b + 1], t[b : b + 1]), together[b : b + 1], rtol=0, atol=1e-5)


def test_one_time_step_serves_the_whole_batch(kept_network):
    network, images = kept_network(2), wave(3, (16, 24))
    one, each = network(images, torch.tensor([48])), network(images, torch.tensor([48, 48, 48]))
    torch.testing.assert_close(one, each, rtol=0, atol=1e-6)


def test_time_matters(kept_network):
    network, image = kept_network(2), wave(1, (24, 24))
    early, late = (network(image, torch.tensor([t])) for t in (0, 79))
    assert float((early - late).abs().max()) > 1e-5


def test_input_is_not_modified(kept_network):
    image = wave(1, (20, 20))
    before = image.clone()
    kept_network(2)(image, torch.tensor([5]))
    assert torch.equal(image, before)


def test_more_channels(kept_network):
    network = kept_network(2, in_channels=3)
    assert network(wave(1, (19, 16), channels=3), torch.tensor([5])).shape == (1, 2, 19, 16)
    assert network.card.in_channels == 3


def test_gradients_reach_every_trainable_parameter():
    network = RecResACNet(2)
    network(wave(1, (16, 16)), torch.tensor([5])).square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert not network.time_embed.weight.requires_grad


@pytest.mark.parametrize(("dims", "channels"), [(1, 1), (4, 1), (2, 0), (3, -1)])
def test_constructor_refuses(dims, channels):
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3 and in_channels 1 or more"):
        RecResACNet(dims, channels)


@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 2, 16, 16), (1, 1, 16, 16, 16), (16, 16)])
def test_wrong_image_shape(kept_network, shape):
    with pytest.raises(ValueError, match=re.escape(f"got {shape}")):
        kept_network(2)(torch.zeros(shape), torch.tensor([1]))


@pytest.mark.parametrize("t", [torch.tensor(3), torch.tensor([[3]]), torch.tensor([3.0]), torch.tensor([1, 2, 3])])
def test_wrong_time(kept_network, t):
    with pytest.raises(ValueError, match=r"t must be \(B,\) integers in \[0, 80\)"):
        kept_network(2)(torch.zeros(2, 1, 16, 16), t)


@pytest.mark.parametrize("recursions", [0, -1])
def test_wrong_recursions(kept_network, recursions):
    with pytest.raises(ValueError, match=f"recursions must be 1 or more, got {recursions}"):
        kept_network(2)(torch.zeros(1, 1, 16, 16), torch.tensor([1]), recursions)


@pytest.mark.parametrize("t", [10, 48, 79])
def test_bfloat16_says_nearly_the_same(published_weights, reference, t):
    """Of the published network on a deformed scan; were all convolutions rounded, it would be off by a third."""
    network = load_network("zheng2026-cmr-2d")
    with np.load(reference / "recovery_cmr_T48.npz") as file:
        image = torch.from_numpy(file["image_diffused"]).float().reshape(1, 1, 256, 256)
    image = image[..., 80:160, 80:160]  # the heart
    exact = network(image, torch.tensor([t]))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(image, torch.tensor([t]))
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm(dim=1).mean() < 0.05 * exact.norm(dim=1).mean()


def test_bfloat16_gradients_are_finite(small_network):
    network = small_network(2).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.rand(2, 1, 32, 32), torch.tensor([1, 79])).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert network.conv_out.weight.grad.abs().max() > 0
