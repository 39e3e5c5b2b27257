"""The convolutions of all networks: for a single volume on a CPU, oneDNN's instead of PyTorch's own.

PyTorch calls oneDNN for batches, but for one sample only if it is large, by a rule that looks at the first three axes
of the input. It was made for images. Volumes are large with their fourth axis, so their convolutions mostly run on the
kernels that oneDNN was meant to replace.
"""

from __future__ import annotations

import torch
from torch import nn, Tensor

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


@torch.library.custom_op(
    "monai_drdm::conv3d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int[] padding, int[] stride, int[] dilation, int groups) -> Tensor",
)
def _compiled_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """oneDNN's convolution as ``torch.compile`` can call it."""
    return torch.mkldnn_convolution(x.contiguous(), weight, bias, padding, stride, dilation, groups).contiguous()


_compiled_conv3d.register_fake(
    lambda x, weight, bias, padding, stride, dilation, groups: torch.conv3d(
        x.contiguous(), weight, bias, stride, padding, dilation, groups
    ).contiguous()
)


class Conv3d(nn.Conv3d):
    """``torch.nn.Conv3d`` that is faster for single volumes on a CPU, where no gradient is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, *S)`` to ``(B, out_channels, *S')``."""
        if isinstance(self.padding, str) or not self._is_slow(x):
            return super().forward(x)
        conv3d = _compiled_conv3d if torch.compiler.is_compiling() else torch.mkldnn_convolution
        out: Tensor = conv3d(x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        return out

    def _is_slow(self, x: Tensor) -> bool:
        """Whether PyTorch would take its own kernel, and oneDNN's can be called in its place."""
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and x.ndim == 5
            and x.shape[0] == 1
            and x.shape[1] == self.in_channels
            and x.numel() > 0
            and self.padding_mode == "zeros"
            and _HAS_ONEDNN
            and bool(torch.backends.mkldnn.enabled)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )


CONVOLUTION: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: Conv3d}
"""The convolution for a number of spatial axes."""


def quicken_convolutions(network: nn.Module) -> None:
    """Make every ``torch.nn.Conv3d`` of a network that others wrote a :class:`Conv3d`; weights and names stay."""
    for module in network.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = Conv3d
