"""Shared fixtures. Tests that need parity files or real scans skip, with the reason, where those are absent."""

import dataclasses
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

# before torch is imported: bits are promised for one number of threads, and workers have one each
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from monai.transforms import Randomizable
from tqdm import tqdm

from monai_drdm.networks import convert_published, RecResACNet

NetworkFactory = Callable[..., RecResACNet]

# few examples, always the same ones, and no shrinking, which takes minutes; `make test-long` looks further
_COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile(
    "short", max_examples=15, derandomize=True, phases=(Phase.explicit, Phase.generate), **_COMMON
)
settings.register_profile("long", max_examples=300, derandomize=False, print_blob=True, **_COMMON)
settings.load_profile("short")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same global random state for every test, whatever ran before.

    MONAI's DataLoader seeds from torch's; transforms without a seed of their own share one state, which MONAI takes
    from the operating system when it is imported.
    """
    Randomizable.R = np.random.RandomState(0)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


class Forked:
    """A call in a fork of this process, which has imported all that the call needs.

    To whoever kills it, or lets it find no room, it is a process like any other, without the seconds that a new
    interpreter takes to import torch and MONAI.

    Args:
        call: what the process does; an integer that it returns is the exit code.
        folder: for what it says.
        before: runs first, in the new process.
    """

    CPU_LIMIT_S = 300

    def __init__(self, call: Callable[[], object], folder: Path, before: Callable[[], object] | None = None) -> None:
        self.said = [folder / f"{name}-{time.monotonic_ns()}" for name in ("stdout", "stderr")]
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(call, before)

    def _run(self, call: Callable[[], object], before: Callable[[], object] | None) -> None:
        code: object = 1
        try:
            import resource  # there is none on Windows, and no fork

            resource.setrlimit(resource.RLIMIT_CPU, (self.CPU_LIMIT_S, self.CPU_LIMIT_S))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for number, path in enumerate(self.said, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", buffering=1) for n in (1, 2))
            tqdm.set_lock(threading.RLock())  # the one it has is shared; a killed process would leave it locked
            if before is not None:
                before()
            code = call()
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 0)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """Wait for its end; what it said."""
        while self.poll() is None:
            time.sleep(0.005)
        out, errors = (path.read_text(encoding="utf-8", errors="replace") for path in self.said)
        return out, errors


@pytest.fixture
def fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Forked]]:
    """Factory of ``Forked`` calls; none outlives its test."""
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork here")
    started: list[Forked] = []

    def start(call: Callable[[], object], before: Callable[[], object] | None = None) -> Forked:
        started.append(Forked(call, tmp_path_factory.mktemp("said"), before))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of the parity files recorded from the authors' release."""
    return _folder("MONAI_DRDM_REFERENCE")


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of real scans."""
    return _folder("MONAI_DRDM_DATA")


@pytest.fixture(scope="session")
def published_weights(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the published cardiac weights, converted; MONAI_DRDM_WEIGHTS points at it from then on."""
    published = reference / "000000_cmr_recresacnet.pth"
    if not published.is_file():
        pytest.skip(f"{published.name} is not in MONAI_DRDM_REFERENCE")
    folder = tmp_path_factory.mktemp("weights")
    convert_published(published, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MONAI_DRDM_WEIGHTS", str(folder))
        yield folder


@pytest.fixture(scope="session")
def filled_network() -> NetworkFactory:
    """Factory: a RecResACNet in evaluation mode, its parameters filled by a formula that needs no file."""
    return _filled_network


def _filled_network(spatial_dims: int, in_channels: int = 1) -> RecResACNet:
    network = RecResACNet(spatial_dims, in_channels)
    filled = {}
    for index, (name, old) in enumerate(network.state_dict().items()):
        wave = torch.sin(0.37 * torch.arange(old.numel(), dtype=torch.float64) + index).reshape(old.shape)
        if name == "time_embed.weight":
            wave = old
        elif old.ndim > 1:
            wave = wave / (old.numel() / old.shape[0]) ** 0.5
        elif name.endswith("ln.weight"):
            wave = 1 + 0.1 * wave
        else:
            wave = 0.1 * wave
        filled[name] = wave.float()
    network.load_state_dict(filled)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def small_network():
    """Factory of an untrained network on a small working grid, its weights fixed by a seed."""

    def build(spatial_dims: int, working_size: int = 32, scale: float = 1.0) -> RecResACNet:
        generator = torch.Generator().manual_seed(spatial_dims)
        network = RecResACNet(spatial_dims).eval().requires_grad_(False)
        for name, parameter in network.named_parameters():
            if "time_embed" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                strength = 1e-4 * scale if name.startswith("conv_out") else 1.0
                parameter.copy_(noise * (strength / max(parameter[0].numel(), 1) ** 0.5))
        network.card = dataclasses.replace(
            network.card, name=f"untrained-{spatial_dims}d", working_size=working_size, steps=2
        )
        return network

    return build


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    if not Path(value).is_dir():
        pytest.skip(f"{variable} is not a folder: {value}")
    return Path(value)


@pytest.fixture
def scan():
    """Factory of a smooth image and a label of nested boxes, ``(1, *S)`` each."""

    def build(shape: tuple[int, ...], label_dtype: torch.dtype = torch.uint8) -> dict[str, torch.Tensor]:
        axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
        radius = torch.stack(axes).norm(dim=0)
        image = torch.exp(-3 * radius**2) + 0.1 * torch.sin(9 * axes[0])
        label = (radius < 0.8).to(torch.int64) + (radius < 0.4).to(torch.int64)
        return {"image": image[None], "label": label[None].to(label_dtype)}

    return build
