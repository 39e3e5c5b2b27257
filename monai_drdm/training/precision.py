"""Running a network in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from monai.inferers import Inferer
from torch import nn, Tensor
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = (
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
)
_SMALL = 2
_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)


def _exact(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _ROUNDED else value


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself. Emulating it is many times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class SmallGridsInFloat32(TorchFunctionMode):
    """Convolutions of grids that have 2 voxels or fewer along an axis run in float32, whatever autocast says.

    On processors with bfloat16, the gradients that PyTorch 2.13 computes for the weights of such convolutions hold
    whatever was in memory before: with ``Conv3d`` where the first axis has length 2, and with a stride of 2 where the
    last axis has length 1.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch."""
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS:
            image = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if image.dtype in _ROUNDED and min(image.shape[2 - weight.ndim :]) <= _SMALL:
                with torch.autocast(image.device.type, enabled=False):
                    return func(*map(_exact, args), **{name: _exact(one) for name, one in kwargs.items()})
        return func(*args, **kwargs)


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
        small = SmallGridsInFloat32() if self.enabled else nullcontext()
        with small, torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.enabled):
            predicted: Tensor = network(inputs, *args, **kwargs)
        return predicted.float()

    def predictor(self, network: nn.Module) -> Callable[..., Tensor]:
        """The network as a function of images and conditions."""
        return lambda images, *conditions: self(images, network, *conditions)
