"""Convolutions of single volumes, against PyTorch's own."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from monai_drdm.networks import VelocityUNet
from monai_drdm.networks.convolution import Conv3d, quicken_convolutions
from monai_drdm.registration.networks import RegistrationNetwork, Structure

ONEDNN = torch.backends.mkldnn.is_available()


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN was called directly."""
    found, called = torch.mkldnn_convolution, []

    def counted(*arguments):
        called.append(arguments[0].shape)
        return found(*arguments)

    monkeypatch.setattr(torch, "mkldnn_convolution", counted)
    return called


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 1), (2, 9, 1), (17, 8, 12), (33, 20, 31)])
@pytest.mark.parametrize("options", [{}, {"dilation": 2, "padding": 2}, {"stride": 2}, {"groups": 2}, {"bias": False}])
def test_values_are_those_of_pytorch(shape, options, calls):
    torch.manual_seed(0)
    ours = Conv3d(4, 6, 3, **{"padding": 1, **options})
    x = torch.randn(1, 4, *shape)
    exact = F.conv3d(
        x.double(),
        ours.weight.double(),
        None if ours.bias is None else ours.bias.double(),
        ours.stride,
        ours.padding,
        ours.dilation,
        ours.groups,
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(x).double(), exact, atol=1e-5, rtol=1e-5)
    assert len(calls) == ONEDNN


def test_memory_that_is_not_contiguous(calls):
    torch.manual_seed(0)
    ours, x = Conv3d(3, 5, 3, padding=1), torch.randn(1, 3, 6, 7, 8)
    with torch.inference_mode():
        expected = ours(x)
        for other in (x.to(memory_format=torch.channels_last_3d), x.transpose(2, 4).contiguous().transpose(2, 4)):
            torch.testing.assert_close(ours(other), expected)


@pytest.mark.parametrize(
    ("x", "around"),
    [
        (torch.rand(2, 2, 5, 6, 7), torch.no_grad()),
        (torch.rand(2, 5, 6, 7), torch.no_grad()),
        (torch.rand(1, 2, 5, 6, 7), nullcontext()),
        (torch.rand(1, 2, 5, 6, 7), torch.backends.mkldnn.flags(enabled=False)),
    ],
    ids=["a batch", "no batch", "with gradients", "switched off"],
)
def test_everything_else_is_left_to_pytorch(x, around, calls):
    ours = Conv3d(2, 3, 3)
    plain = nn.Conv3d(2, 3, 3)
    plain.load_state_dict(ours.state_dict())
    with around:
        torch.testing.assert_close(ours(x), plain(x))
    assert not calls


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "replicate"}])
def test_other_paddings_are_left_to_pytorch(options, calls):
    ours, x = Conv3d(2, 3, 3, **options), torch.rand(1, 2, 5, 6, 7)
    plain = nn.Conv3d(2, 3, 3, **options)
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))
    assert not calls


def test_other_types_are_left_to_pytorch(calls):
    ours, x = Conv3d(2, 3, 3), torch.rand(1, 2, 5, 6, 7)
    with torch.no_grad():
        assert ours.double()(x.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert ours.float()(x).dtype == torch.bfloat16
    assert not calls


@pytest.mark.parametrize("channels", [1, 3])
def test_wrong_inputs_get_the_error_of_pytorch(channels):
    ours = Conv3d(2, 3, 3)
    with torch.no_grad(), pytest.raises(RuntimeError, match="to have 2 channels"):
        ours(torch.rand(1, channels, 5, 5, 5))


def test_gradients_flow():
    ours, x = Conv3d(2, 3, 3), torch.rand(1, 2, 5, 6, 7)
    ours(x).square().sum().backward()
    plain = nn.Conv3d(2, 3, 3)
    plain.load_state_dict(ours.state_dict())
    plain(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)


def test_networks_of_others_keep_their_weights(calls):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3), nn.Sequential(nn.Conv3d(4, 4, 1), nn.Conv2d(4, 4, 1)))
    before = copy.deepcopy(network.state_dict())
    quicken_convolutions(network)
    assert [type(one) for one in network.modules() if isinstance(one, nn.Conv3d)] == [Conv3d, Conv3d]
    assert type(network[1][1]) is nn.Conv2d
    torch.testing.assert_close(network.state_dict(), before)
    torch.testing.assert_close(copy.deepcopy(network).state_dict(), before)


@pytest.mark.skipif(not ONEDNN, reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("kind", ["regunet", "localnet", "voxelmorph", "aligner", "pyramid"])
def test_registration_networks_use_it(kind, calls):
    network = RegistrationNetwork(Structure(kind=kind, spatial_dims=3, channels=4, depth=2)).eval()
    with torch.no_grad():
        network(torch.rand(1, 2, 16, 16, 16))
    assert calls
    assert {type(one) for one in network.modules() if isinstance(one, nn.Conv3d)} == {Conv3d}


@pytest.mark.skipif(not ONEDNN, reason="PyTorch was built without oneDNN")
def test_recovery_networks_use_it(calls):
    network = VelocityUNet(3, 1, (4, 8))
    with torch.inference_mode():
        network(torch.rand(1, 1, 17, 17, 17), torch.tensor([0.5]))
    assert len(calls) == sum(isinstance(one, nn.Conv3d) for one in network.modules())


@pytest.mark.skipif(not ONEDNN, reason="PyTorch was built without oneDNN")
def test_compiled_networks_use_it_too():
    torch.manual_seed(0)
    network, x = (
        nn.Sequential(Conv3d(1, 4, 3, stride=2), nn.SiLU(), Conv3d(4, 2, 3, padding=1)),
        torch.rand(1, 1, 9, 8, 7),
    )
    compiled, nodes = [], []

    def record(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.inference_mode():
        for backend in (record, "aot_eager"):
            torch._dynamo.reset()
            compiled.append(torch.compile(network, fullgraph=True, dynamic=False, backend=backend)(x))
        for one in compiled:
            torch.testing.assert_close(one, network(x))
    assert sum("monai_drdm" in node for node in nodes) == 2
