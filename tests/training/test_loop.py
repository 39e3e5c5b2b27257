"""The training loop with the smallest task: what a task must define, and what a run then does by itself."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from monai_drdm.training.loop import run_task
from monai_drdm.training.settings import RunConfig, setting
from monai_drdm.training.task import Batch, DataSummary


@dataclass(frozen=True)
class ShiftConfig(RunConfig):
    """The settings of all runs, and one more."""

    shift: float = setting(3.0, "what is added to the images")


class ShiftTask:
    """A network with one weight learns the constant that was added to random images."""

    def __init__(self, config):
        self.config = config

    def prepare(self, progress):
        return DataSummary(fingerprint=f"shift by {self.config.shift}")

    def build_network(self):
        return Shift()

    def batch(self, network, generator, *, validate=False):
        images = torch.rand(self.config.batch_size, 1, 4, 4, generator=generator)
        return Batch(images + self.config.shift, target=images)

    def loss(self, predicted, target):
        return self.error(predicted, target)

    def error(self, predicted, target):
        return (predicted - target).square().mean()

    def sheet(self, network, generator):
        return None

    def write(self, network, path, validation_loss):
        path.write_text(json.dumps({"shift": network.shift.item(), "validation_loss": validation_loss}))


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return images - self.shift


def task(**settings):
    return ShiftTask(ShiftConfig(learning_rate=0.1, warmup_steps=2, epoch_length=25, max_epochs=4, **settings))


def stop_after(count):
    calls = iter(range(1, 10**6))
    return lambda: next(calls) == count


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_task_is_trained_and_written(tmp_path):
    weights = run_task(task(), tmp_path / "run")
    written = json.loads(weights.read_text())
    assert written["shift"] == pytest.approx(3.0, abs=0.1)
    assert (
        written["validation_loss"]
        == [row for row in metrics(tmp_path / "run") if "validation_loss" in row][-1]["validation_loss"]
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["shift"] == 3.0
    assert not (tmp_path / "run" / "sheets").exists()


@pytest.mark.parametrize("stop", [10, 25, 60])
def test_a_resumed_task_takes_the_same_steps(tmp_path, stop):
    whole = run_task(task(), tmp_path / "whole")
    assert run_task(task(), tmp_path / "parts", should_stop=stop_after(stop)) is None
    resumed = run_task(task(), tmp_path / "parts", resume=True)
    assert resumed.read_text() == whole.read_text()
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_checkpoints_keep_their_keys(tmp_path):
    """Runs of earlier versions are resumed by them."""
    run_task(task(), tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "checkpoints" / "checkpoint_100.pt", weights_only=True)
    assert set(saved) == {"trainer", "network", "optimizer", "averaged", "progress"}
    assert set(saved["progress"]) == {"seconds", "best", "stale"}


def test_other_data_are_refused(tmp_path):
    class OtherData(ShiftTask):
        def prepare(self, progress):
            return DataSummary(fingerprint="other data")

    run_task(task(), tmp_path / "run", should_stop=stop_after(10))
    with pytest.raises(ValueError, match="the data have changed since the run was begun"):
        run_task(OtherData(task().config), tmp_path / "run", resume=True)


def test_skipped_files_are_reported(tmp_path, capsys):
    class Skips(ShiftTask):
        def prepare(self, progress):
            return DataSummary(skipped="1 of 2 scans skipped\n")

    run_task(Skips(task().config), tmp_path / "run")
    assert "1 of 2 scans skipped\n" in capsys.readouterr().err
    assert not (tmp_path / "run" / "data.sha256").exists()
