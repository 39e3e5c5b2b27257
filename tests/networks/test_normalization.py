"""The group norm of the networks, against its formula in float64 and PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from monai_drdm.networks import VelocityUNet
from monai_drdm.networks.normalization import GroupNorm


@pytest.fixture
def orders(monkeypatch):
    """For every call of PyTorch's group norm, whether its features came in the usual order."""
    found, seen = F.group_norm, []

    def watched(x, *arguments):
        seen.append(x.is_contiguous())
        return found(x, *arguments)

    monkeypatch.setattr(F, "group_norm", watched)
    return seen


def features(shape, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return (2 * torch.randn(shape) + 0.5).to(dtype).contiguous(memory_format=torch.channels_last)


def with_random_weights(norm):
    torch.manual_seed(1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def by_formula(x, norm):
    """Every group of features of every sample gets mean 0 and variance 1; then weight and bias."""
    grouped = x.view(x.shape[0], norm.num_groups, -1)
    centred = grouped - grouped.mean(dim=2, keepdim=True)
    unit = centred / (centred.square().mean(dim=2, keepdim=True) + norm.eps).sqrt()
    return unit.view(x.shape) * norm.weight.double().view(1, -1, 1, 1) + norm.bias.double().view(1, -1, 1, 1)


@pytest.mark.parametrize("shape", [(2, 8, 9, 7), (1, 16, 5, 5), (3, 8, 1, 6)])
def test_values_and_gradients_are_those_of_the_formula(shape, orders):
    norm = with_random_weights(GroupNorm(4, shape[1]))
    x = features(shape).requires_grad_()
    y = norm(x)
    slope = features(shape)
    gradients = torch.autograd.grad(y, (x, norm.weight, norm.bias), slope)
    exact_x = x.detach().double().contiguous().requires_grad_()
    exact_y = by_formula(exact_x, norm)
    exact = torch.autograd.grad(exact_y, (exact_x, norm.weight, norm.bias), slope.double().contiguous())
    assert orders == [True]
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    for ours, true in zip((y, *gradients), (exact_y, *exact)):
        error = (ours.double() - true.double()).norm() / true.double().norm()
        assert error < 0.01  # bfloat16 has 8 bits


@pytest.mark.parametrize("case", ["no gradient", "float32", "usual order", "3D"])
def test_everything_else_is_left_to_pytorch(case, orders):
    x = features((2, 8, 6, 5), torch.float32 if case == "float32" else torch.bfloat16)
    if case == "usual order":
        x = x.contiguous()
    if case == "3D":
        x = x[..., None]
    norm = with_random_weights(GroupNorm(4, 8))
    theirs = nn.GroupNorm(4, 8)
    theirs.load_state_dict(norm.state_dict())
    with torch.set_grad_enabled(case != "no gradient"):
        torch.testing.assert_close(norm(x), theirs(x), rtol=0, atol=0)
    assert orders[0] == orders[1] == x.is_contiguous()


def test_a_network_trains_in_the_usual_order(orders):
    network = VelocityUNet(2, channels=(8, 16))
    image, level = torch.rand(2, 1, 17, 17), torch.tensor([0.5])
    with torch.autocast("cpu", torch.bfloat16):
        network(image, level).sum().backward()
    assert len(orders) == 3
    assert all(orders)
