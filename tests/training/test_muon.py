from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from monai_drdm.networks import VelocityUNet
from monai_drdm.training.muon import Muon, orthogonalised


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def set_gradients(network, seed):
    for number, one in enumerate(network.parameters()):
        one.grad = random(*one.shape, seed=1000 * seed + number)


@pytest.mark.parametrize("shape", [(8, 8), (6, 40), (40, 6), (96, 576)])
def test_singular_values_are_near_one_and_directions_stay(shape):
    matrix = random(*shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ orthogonalised(matrix) @ right.T
    assert 0.6 < found.diag().min() <= found.diag().max() < 1.3
    assert values.max() / values.min() > 1.5  # they were not alike before
    torch.testing.assert_close(found - found.diag().diag(), torch.zeros_like(found), atol=1e-3, rtol=0)


def test_scale_does_not_matter_and_zero_stays_zero():
    matrix = random(8, 20)
    torch.testing.assert_close(orthogonalised(1e-6 * matrix), orthogonalised(1e4 * matrix), atol=1e-3, rtol=0)
    assert not orthogonalised(torch.zeros(4, 9)).any()


def test_convolutions_move_as_matrices_do_under_torch():
    """A convolution of one voxel is a matrix, of which PyTorch has the same method, computed in bfloat16."""
    theirs_of = getattr(torch.optim, "Muon", None)
    if theirs_of is None:
        pytest.skip("torch.optim.Muon came with PyTorch 2.9")
    convolution = nn.Conv2d(12, 20, 1, bias=False)
    matrix = nn.Parameter(convolution.weight.detach().flatten(1).clone())
    start = matrix.detach().clone()
    ours = Muon([convolution.weight, nn.Parameter(torch.zeros(1))], 0.01, weight_decay=0.1)
    theirs = theirs_of([matrix], 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        matrix.grad = random(20, 12, seed=step)
        convolution.weight.grad = matrix.grad.view(20, 12, 1, 1).clone()
        ours.step()
        theirs.step()
    moved, expected = convolution.weight.detach().flatten(1) - start, matrix.detach() - start
    assert (moved - expected).norm() < 0.02 * expected.norm()
    assert expected.abs().max() > 0.005


def test_everything_else_moves_as_under_adamw():
    network = VelocityUNet(2, channels=(4, 8))
    other = copy.deepcopy(network)
    ours, theirs = Muon(network.parameters(), 1e-2, 0.1), torch.optim.AdamW(other.parameters(), 1e-2, weight_decay=0.1)
    for step in range(3):
        for net in (network, other):
            set_gradients(net, step)
        ours.step()
        theirs.step()
    for (name, mine), yours in zip(network.named_parameters(), other.parameters()):
        is_matrix = mine.ndim > 2 and name not in ("stem.weight", "out.weight")
        assert torch.equal(mine, yours) != is_matrix, name


def test_updates_are_as_large_as_those_of_adamw():
    network = VelocityUNet(3, channels=(8, 16))
    before = copy.deepcopy(network.state_dict())
    set_gradients(network, 0)
    Muon(network.parameters(), 1e-3).step()
    for name in ("down_blocks.1.conv1.weight", "downs.0.weight", "ups.0.weight"):
        moved = (network.state_dict()[name] - before[name]).square().mean().sqrt()
        assert 0.1e-3 < moved < 0.3e-3  # AdamW's are 0.2 times the learning rate once its averages have settled


def test_a_loaded_state_goes_on_as_if_nothing_had_happened():
    one = VelocityUNet(2, channels=(4, 8))
    optimiser = Muon(one.parameters(), 1e-2)
    for step in range(2):
        set_gradients(one, step)
        optimiser.step()
    two = copy.deepcopy(one)
    resumed = Muon(two.parameters(), 1e-2)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for step in (2, 3):
        for net, its in ((one, optimiser), (two, resumed)):
            set_gradients(net, step)
            its.step()
    for mine, yours in zip(one.parameters(), two.parameters()):
        assert torch.equal(mine, yours)


def test_layers_without_gradient_stay():
    network = VelocityUNet(2, channels=(4, 8))
    before = copy.deepcopy(network.state_dict())
    set_gradients(network, 0)
    network.downs[0].weight.grad = network.embed[0].weight.grad = None
    Muon(network.parameters(), 1e-2, 0.1).step()
    same = {name for name, value in network.state_dict().items() if torch.equal(value, before[name])}
    assert same == {"downs.0.weight", "embed.0.weight"}


def test_it_takes_no_closure():
    with pytest.raises(ValueError, match="closure"):
        Muon(nn.Conv2d(4, 4, 3).parameters(), 1e-3).step(lambda: 0.0)
