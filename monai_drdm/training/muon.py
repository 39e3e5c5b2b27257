"""The optimizer Muon: updates of convolutions are orthogonalised before they are added to the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn, Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of a polynomial that brings singular values between 0 and 1 near 1 when it is repeated."""
_ITERATIONS = 5
_FEWEST_FEATURES = 4
"""Layers with fewer features at one end, the first and the last ones of a network, are left to AdamW."""


class Muon(torch.optim.Optimizer):
    """Muon for the weights of convolutions, AdamW for everything else.

    Muon follows the momentum of the gradient, all of whose singular values are first brought near 1, so that rare
    directions are learned as fast as frequent ones (K. Jordan et al., "Muon: an optimizer for hidden layers in neural
    networks", 2024). Updates are scaled to the size of those of AdamW (J. Liu et al., "Muon is scalable for LLM
    training", arXiv 2502.16982), so that one learning rate and one weight decay serve both. ``torch.optim.Muon`` takes
    matrices only; here the weight of a convolution is one, with a row for each feature of its output.

    Args:
        parameters: of the network.
        lr: learning rate.
        weight_decay: share of the weights, times the learning rate, that every step takes off.
        momentum: decay of the average of gradients.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for one in parameters:
            (matrices if one.ndim > 2 and min(one.shape[:2]) >= _FEWEST_FEATURES else others).append(one)
        self._adamw = torch.optim.AdamW(others, lr, weight_decay=weight_decay)
        groups = [self._adamw.param_groups[0], {"params": matrices}]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step along the gradients, as they are; ``closure`` must be None."""
        if closure is not None:
            raise ValueError("Muon.step takes no closure.")
        rest, group = self.param_groups
        self._adamw.param_groups, self._adamw.state = [rest], self.state
        self._adamw.step()
        for weight in group["params"]:
            if weight.grad is None:
                continue
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            average = self.state[weight]["momentum"]
            average.lerp_(weight.grad, 1 - group["momentum"])
            update = orthogonalised(weight.grad.lerp(average, group["momentum"]).flatten(1))
            size = 0.2 * math.sqrt(max(update.shape))  # the root mean square of updates of AdamW is about 0.2
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update.view_as(weight), alpha=-group["lr"] * size)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix near 1 (between about 0.7 and 1.2), by Newton and Schulz's iteration."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if is_tall else matrix
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        square = found @ found.T
        found = a * found + (b * square + c * square @ square) @ found
    turned: Tensor = found.T if is_tall else found
    return turned
