"""What the engine is given: how the network is called, and how far a run has come."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from monai.inferers import Inferer
from torch import nn, Tensor

from monai_drdm.training.settings import RunConfig


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16, and does not imitate it, which is many times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Bfloat16Inferer(Inferer):
    """Runs the network's convolutions in bfloat16 where that is wanted."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """The network's prediction in float32."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.enabled):
            predicted: Tensor = network(inputs, *args, **kwargs)
        return predicted.float()

    def bound(self, network: nn.Module) -> Callable[..., Tensor]:
        """The network as a function of images and what it is given beside them."""
        return lambda image, *told: self(image, network, *told)


class Progress:
    """How long and how well a run has gone, also before an interruption."""

    def __init__(self, config: RunConfig) -> None:
        self.limit = config.max_minutes * 60
        self.before = 0.0
        self.started: float | None = None
        self.best = math.inf
        self.stale = 0

    def start(self) -> None:
        """Start counting time."""
        self.started = time.monotonic()

    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.before + (0.0 if self.started is None else time.monotonic() - self.started)

    def spent(self) -> float:
        """Share of the time that is spent; 0 without a limit."""
        return 0.0 if math.isinf(self.limit) else min(self.seconds() / max(self.limit, 1e-9), 1.0)

    def validated(self, loss: float) -> None:
        """Count the validations since the best one."""
        self.stale = 0 if loss < self.best else self.stale + 1
        self.best = min(self.best, loss)

    def state_dict(self) -> dict[str, float]:
        """For checkpoints."""
        return {"seconds": self.seconds(), "best": self.best, "stale": self.stale}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """From a checkpoint."""
        self.before, self.best, self.stale = state["seconds"], state["best"], int(state["stale"])
