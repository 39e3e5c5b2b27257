"""The training loop with the smallest task: what a task must define, and what a run then does by itself."""

import io
import json
import re
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from monai_drdm.training.loop import run_task
from monai_drdm.training.settings import RunConfig, setting
from monai_drdm.training.task import Batch, DataSummary, Validation
from monai_drdm.training.terminal import in_red, RunBar


@dataclass(frozen=True)
class ShiftConfig(RunConfig):
    """The settings of all runs, and one more."""

    shift: float = setting(3.0, "what is added to the images")
    optimizer: str | None = setting("adamw", "of a network of one weight")


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

    def measures(self, predicted, target):
        return {}

    def sheet(self, network, generator):
        return None

    def write(self, network, path, validation):
        path.write_text(json.dumps({"shift": network.shift.item()} | validation.gates()))


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


@pytest.fixture
def clock(monkeypatch):
    """Every step takes a second; ``clock.step`` goes where a run asks whether to stop."""

    class Clock:
        now = 0.0

        def step(self):
            self.now += 1
            return False

    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_warm_up_and_validations_follow_the_time(tmp_path, clock):
    """Fifty seconds, in a run whose warm-up and first epoch would take a thousand."""
    config = ShiftConfig(learning_rate=0.2, warmup_steps=1000, epoch_length=1000, max_minutes=50 / 60)
    weights = run_task(ShiftTask(config), tmp_path / "run", should_stop=clock.step)
    validated = [row["step"] for row in metrics(tmp_path / "run") if "validation_loss" in row]
    assert len(validated) == 5
    assert validated[-1] == 50
    assert all(10 <= b - a <= 12 for a, b in zip([0, *validated], validated[:-1]))
    assert json.loads(weights.read_text())["shift"] == pytest.approx(3.0, abs=0.3)  # a full learning rate goes so far


def test_validations_that_take_long_leave_time_to_train(tmp_path, clock):
    """Ten of fifty seconds: after the first, forty are for training."""

    class Slow(ShiftTask):
        def sheet(self, network, generator):
            clock.now += 10

    config = ShiftConfig(learning_rate=0.2, epoch_length=1000, max_minutes=50 / 60)
    run_task(Slow(config), tmp_path / "run", should_stop=clock.step)
    assert [row["step"] for row in metrics(tmp_path / "run") if "validation_loss" in row] == [11, 40]


def test_without_a_limit_of_time_validations_end_epochs(tmp_path, clock):
    run_task(task(), tmp_path / "run", should_stop=clock.step)
    assert [row["step"] for row in metrics(tmp_path / "run") if "validation_loss" in row] == [25, 50, 75, 100]


@pytest.mark.parametrize("lost", ["row", "figure"])
def test_a_run_that_was_killed_as_it_ended_gets_its_last_validation(tmp_path, clock, lost):
    class Draws(ShiftTask):
        def sheet(self, network, generator):
            return FigureOfNothing()

    class FigureOfNothing:
        def savefig(self, path, dpi):
            open(path, "wb").close()

    config = ShiftConfig(learning_rate=0.1, epoch_length=7, max_minutes=10 / 60)
    run = tmp_path / "run"
    run_task(Draws(config), run, should_stop=clock.step)
    rows, last = metrics(run), run / "sheets" / "step_10.png"
    assert [list(row) for row in rows[-2:]] == [["step", "loss"], ["step", "validation_loss"]]
    assert last.is_file()
    last.unlink()
    if lost == "row":
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    run_task(Draws(config), run, resume=True, should_stop=clock.step)
    assert metrics(run) == rows
    assert last.is_file()


def test_doing_nothing_is_called_that(tmp_path, capsys):
    """Untrained, the network is 3 off everywhere; predicting zero is only off by the images, which are in [0, 1]."""
    for name, settings in (("lazy", {"learning_rate": 0.0}), ("trained", {"learning_rate": 0.1})):
        config = ShiftConfig(warmup_steps=2, epoch_length=50, max_epochs=2, weight_decay=0.0, **settings)
        written = json.loads(run_task(ShiftTask(config), tmp_path / name).read_text())
        said = capsys.readouterr().err
        assert written["validation_loss_of_doing_nothing"] == pytest.approx(1 / 3, abs=0.05)  # the mean square
        assert f"validation loss {written['validation_loss']:.2f} (0.3" in said
        assert ("This network is no better than doing nothing" in said) == (name == "lazy")
    assert written["validation_loss"] < 0.1


@pytest.mark.parametrize(
    ("loss", "nothing", "better"),
    [
        (0.97, 1.0, True),
        (0.99, 1.0, False),
        (1.0, 1.0, False),
        (1.2, 1.0, False),
        (-1.0, -0.9, True),
        (0.0, 0.0, False),
    ],
)
def test_what_is_better_than_doing_nothing(loss, nothing, better):
    validation = Validation({"validation_loss": loss, "dice": 0.7}, {"validation_loss": nothing, "dice": 0.6})
    assert validation.beats_nothing == better
    assert (validation.doubt == "") == better
    assert validation.gates()["dice_of_doing_nothing"] == 0.6
    assert "dice 0.70 (0.6 is doing nothing)" in validation.summary()


@pytest.mark.parametrize(
    ("terminal", "environment", "red"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)
def test_red_where_there_is_colour(monkeypatch, terminal, environment, red):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    monkeypatch.setattr(sys, "stderr", Stream())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert in_red("bad") == ("\033[31mbad\033[0m" if red else "bad")


@pytest.mark.parametrize(
    ("limit", "step", "seconds", "says"),
    [
        (60.0, 10, 15.0, r" 25%\|.* 00:45 left, step 10, loss 1"),  # 200 steps would take longer
        (6000.0, 100, 15.0, r" 50%\|.* 00:15 left, step 100, loss 1"),
        (float("inf"), 100, 7200.0, r" 50%\|.* 2:00:00 left, step 100, loss 1"),
        (60.0, 10, 75.0, r"100%\|.* 00:00 left, step 10, loss 1"),
    ],
)
def test_the_bar_shows_the_time_that_is_left(capsys, limit, step, seconds, says):
    bar = RunBar(steps=200, limit_seconds=limit, done=0, seconds=0.0)
    bar.show(step, seconds, "loss 1")
    bar.close()
    shown = capsys.readouterr().err.split("\r")[-1]
    assert re.match(says, shown), shown
