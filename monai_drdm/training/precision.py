"""Running a network in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer
from torch import nn, Tensor


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself. Emulating it is many times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Bfloat16Inferer(Inferer):
    """Calls a network under bfloat16 autocast and returns its prediction in float32.

    Args:
        enabled: False runs the network in float32.
    """

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """The network's prediction in float32."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.enabled):
            predicted: Tensor = network(inputs, *args, **kwargs)
        return predicted.float()

    def predictor(self, network: nn.Module) -> Callable[..., Tensor]:
        """The network as a function of images and conditions."""
        return lambda images, *conditions: self(images, network, *conditions)
