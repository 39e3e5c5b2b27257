"""Runs that are killed, stopped, or find no room on the disk, in processes of their own."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from monai_drdm import load_network
from monai_drdm.train import build_config, fit
from monai_drdm.train.__main__ import main
from monai_drdm.training.run_folder import Checkpoints

SETTINGS = ["channels=[8, 16]", "working_size=33", "batch_size=2", "epoch_length=3", "max_epochs=4", "warmup_steps=2"]
ARGUMENTS = [part for one in SETTINGS for part in ("--set", one)]


@pytest.fixture
def start(fork):
    """A run in a process of its own; its folder has the same name everywhere, for the name is in the card."""
    forks = not torch.cuda.is_available() and torch.get_num_threads() == 1  # torch's threads do not come along

    def begin(folder, *arguments):
        arguments = ["--out", str(folder), *ARGUMENTS, *arguments]

        def run():
            signal.alarm(600)  # nothing here takes a hundredth of it; a process that waits for ever spends no time
            if not forks:
                os.execv(sys.executable, [sys.executable, "-m", "monai_drdm.train", *arguments])
            return main(arguments)

        return fork(run)

    return begin


def call(folder, *arguments):
    """The command in this process: its exit code, and what it said."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(["--out", str(folder), *ARGUMENTS, *arguments])
    return code, said.getvalue()


def wait_for(ready, process):
    """Until something has happened, or the process has ended."""
    while not ready() and process.poll() is None:
        time.sleep(0.005)


def steps_saved(folder):
    """Steps of the checkpoints, every one of which loads."""
    paths = list((folder / "checkpoints").glob("[!.]*.pt"))  # the one that was being written may be torn
    assert all(torch.load(path, weights_only=True)["network"] for path in paths)
    return sorted(int(path.stem.split("_")[-1]) for path in paths)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(run, whole):
    """The same metrics, the same weights and card to the last bit, and nothing half-written left."""
    left = [path for path in run.rglob("*") if path.name.startswith(".")]
    return (
        not left
        and rows(run) == rows(whole)
        and (run / "network.safetensors").read_bytes() == (whole / "network.safetensors").read_bytes()
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The run that nothing happened to, and what was said of it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, said = call(folder)
    assert code == 0
    return folder, said


@pytest.fixture
def whole(told):
    return told[0]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    calls, folder = iter(range(1, 10**6)), tmp_path_factory.mktemp("stopped") / "run"
    assert fit(build_config(settings=SETTINGS), folder, should_stop=lambda: next(calls) == 7) is None
    return folder


@pytest.fixture
def begun(stopped, tmp_path):
    """The same run, stopped at step 7: checkpoints of steps 3, 6 and 7."""
    return shutil.copytree(stopped, tmp_path / "run")


def test_a_run_that_is_killed_again_and_again(tmp_path, start, whole):
    run, some = tmp_path / "run", random.Random(0)
    metrics, before = run / "metrics.jsonl", 0
    for _ in range(3):
        resume = ["--resume"] if (run / "config.json").is_file() else []
        size, more = size_of(metrics), some.randint(1, 200)  # a line has some thirty bytes
        process = start(run, *resume)
        wait_for(lambda: size_of(metrics) >= size + more, process)  # noqa: B023 # called at once
        time.sleep(some.uniform(0, 0.1))  # in a step, in a picture, in a checkpoint: all must do
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)  # a fast machine may be done already
        saved = steps_saved(run)
        assert not before or saved[-1] >= before, "a checkpoint was lost"
        assert not metrics.is_file() or rows_cut(metrics) - (saved or [0])[-1] <= 3, "more than one interval is lost"
        before = (saved or [0])[-1]
    assert call(run, "--resume")[0] == 0
    assert same(run, whole)


def size_of(path):
    return path.stat().st_size if path.is_file() else 0


def rows_cut(metrics):
    """The last step that was noted; the last line may be cut."""
    lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves_it(tmp_path, start, whole, number):
    process = start(tmp_path / "run")
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").is_file(), process)
    process.send_signal(number)
    _, said = process.communicate()
    if process.returncode:  # a fast machine may be done already
        assert process.returncode == 128 + number
        assert f"go on with --resume --out {tmp_path / 'run'}" in said
        assert steps_saved(tmp_path / "run")[-1] == rows(tmp_path / "run")[-1]["step"]
    assert call(tmp_path / "run", "--resume")[0] == 0
    assert same(tmp_path / "run", whole)


def test_a_checkpoint_that_may_not_grow_so_large(begun, whole):
    """The same as a full disk to the program, and needs no rights."""
    resource = pytest.importorskip("resource", reason="there are no such limits here")
    before = {path.name: path.read_bytes() for path in (begun / "checkpoints").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code, said = call(begun, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "Traceback" not in said
    assert f"the run in {begun} cannot be written and has stopped" in said
    assert os.strerror(errno.EFBIG) in said
    assert "checkpoint_7.pt is intact" in said
    assert {path.name: path.read_bytes() for path in (begun / "checkpoints").iterdir()} == before
    assert call(begun, "--resume")[0] == 0
    assert same(begun, whole)


@pytest.fixture
def small_disk(tmp_path):
    """Makes a folder a disk of so many kilobytes, or gives it another size."""
    mounted = set()

    def make(folder, kilobytes):
        folder.mkdir(exist_ok=True)
        options = f"size={kilobytes}k" if folder not in mounted else f"remount,size={kilobytes}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.decode().strip()}")
        mounted.add(folder)

    if sys.platform != "linux":
        pytest.skip("small disks are made of Linux's tmpfs")
    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [4, 100, 900])
def test_a_full_disk(tmp_path, small_disk, whole, kilobytes):
    """Too small for the settings and first metrics, for the first checkpoint, for the third."""
    small_disk(tmp_path / "disk", kilobytes)
    run = tmp_path / "disk" / "run"
    code, said = call(run)
    assert code == 1
    assert "Traceback" not in said
    assert f"the run in {run} cannot be written and has stopped" in said
    assert os.strerror(errno.ENOSPC) in said
    saved = steps_saved(run)
    assert ("there is no checkpoint yet" in said) == (not saved)
    assert not saved or f"checkpoint_{saved[-1]}.pt is intact" in said
    small_disk(tmp_path / "disk", 9000)
    assert call(run, *(["--resume"] if (run / "config.json").is_file() else []))[0] == 0
    assert same(run, whole)


def test_metrics_that_cannot_be_written(begun, whole):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    metrics = begun / "metrics.jsonl"
    metrics.rename(begun / "aside")
    metrics.symlink_to("/dev/full")
    code, said = call(begun, "--resume")
    assert code == 1
    assert os.strerror(errno.ENOSPC) in said
    assert "checkpoint_7.pt is intact" in said
    (begun / "aside").replace(metrics)
    assert call(begun, "--resume")[0] == 0
    assert same(begun, whole)


def test_a_board_that_cannot_be_written(begun, small_disk, whole):
    small_disk(begun / "tensorboard", 4)
    (begun / "tensorboard" / "fill").write_bytes(bytes(4000))
    code, said = call(begun, "--resume")
    assert code == 1
    assert f"the run in {begun} cannot be written and has stopped" in said
    (begun / "tensorboard" / "fill").unlink()
    small_disk(begun / "tensorboard", 100)
    assert call(begun, "--resume")[0] == 0
    assert same(begun, whole)


def test_sheets_that_cannot_be_written(begun, whole):
    for sheet in (begun / "sheets").iterdir():
        sheet.unlink()
    (begun / "sheets").rmdir()
    (begun / "sheets").write_text("in the way")
    code, said = call(begun, "--resume")
    assert code == 1
    assert "checkpoint_7.pt is intact" in said
    (begun / "sheets").unlink()
    assert call(begun, "--resume")[0] == 0
    assert same(begun, whole)


def test_two_runs_in_one_folder(begun, start, whole):
    """The second is refused, with and without ``--resume``, and leaves the first alone."""
    size = (begun / "metrics.jsonl").stat().st_size
    first = start(begun, "--resume")
    wait_for(lambda: (begun / "metrics.jsonl").stat().st_size > size, first)
    first.send_signal(signal.SIGSTOP)  # it holds the folder for as long as this takes
    try:
        if first.poll() is None:
            code, said = call(begun, "--resume")
            assert code == 1
            assert f"another run is writing to {begun}" in said
        code, said = call(begun)
        assert code == 1
        assert "not an empty folder" in said
    finally:
        first.send_signal(signal.SIGCONT)
        first.communicate()
    assert first.returncode == 0
    assert same(begun, whole)


def test_damage_inside_a_checkpoint_is_noticed(begun, whole):
    """One bit among the weights of the latest: torch alone would load it."""
    path = begun / "checkpoints" / "checkpoint_7.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, said = call(begun, "--resume")
    assert code == 0
    assert "checkpoint_7.pt is damaged" in said
    assert "falling back to checkpoint_6.pt" in said
    assert same(begun, whole)


def test_only_the_latest_checkpoints_are_kept(begun):
    """Also over interruptions, and with damaged ones of later steps."""
    assert steps_saved(begun) == [3, 6, 7]
    for step in (6, 7):
        (begun / "checkpoints" / f"checkpoint_{step}.pt").write_bytes(b"")
    (begun / "checkpoints" / "checkpoint_1000.pt").write_bytes(b"torn")
    code, said = call(begun, "--resume")
    assert code == 0
    assert "checkpoint_1000.pt is damaged" in said
    assert "falling back to checkpoint_3.pt" in said
    assert steps_saved(begun) == [6, 9, 12]


def test_what_is_being_written_is_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints({"step": torch.tensor(3.0)}, "checkpoint_3.pt")
    (tmp_path / "checkpoints" / ".part-0-checkpoint_6.pt").write_bytes(b"torn")
    assert [path.name for path in checkpoints.paths()] == ["checkpoint_3.pt"]
    assert checkpoints.latest() == {"step": torch.tensor(3.0)}


def test_a_run_ends_with_what_it_is_worth(told):
    folder, said = told
    assert [path.name for path in folder.rglob("*.safetensors")] == ["network.safetensors"]
    validations = [row["validation_loss"] for row in rows(folder) if "validation_loss" in row]
    card = json.loads((folder / "network.json").read_text())
    nothing = card["gates"].pop("validation_loss_of_doing_nothing")
    assert nothing == pytest.approx(1, abs=1e-4)  # by how the loss is defined
    assert card["gates"] == {"validation_loss": validations[-1]}
    assert (validations[-1] > 0.98) == ("This network is no better than doing nothing" in said)
    assert (validations[-1] > 0.98) == ("; no better than doing nothing" in card["source"])
    card["gates"]["validation_loss_of_doing_nothing"] = nothing
    assert card == json.loads(load_network(folder / "network.safetensors").card.to_json())
    assert f"validation loss {validations[-1]:.2f} (1 is doing nothing)" in said


def test_wrong_starts_leave_no_folder(tmp_path):
    for arguments in (["--init", str(tmp_path / "none.safetensors")], ["--data", str(tmp_path)], ["--resume"]):
        code, said = call(tmp_path / "run", *arguments)
        assert code == 1
        assert "cannot be written" not in said
        assert not (tmp_path / "run").exists()


def test_skipped_scans_are_counted_and_named(tmp_path):
    (tmp_path / "scans").mkdir()
    for number in range(3):
        pixels = np.random.RandomState(number).randint(0, 255, (20, 30), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "scans" / f"{number}.png")
    (tmp_path / "scans" / "torn.png").write_bytes((tmp_path / "scans" / "0.png").read_bytes()[:50])
    Image.new("L", (20, 30)).save(os.fsencode(tmp_path / "scans") + b"/\xff.png", "PNG")  # black, and no name in UTF-8
    code, said = call(tmp_path / "run", "--data", str(tmp_path / "scans"), "--set", "max_epochs=1")
    assert code == 0
    assert "2 of 5 scans skipped:\n" in said
    assert f"  {tmp_path / 'scans' / 'torn.png'}: cannot be read" in said
    assert ".png: is constant" in said


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_a_checkpoint_that_cannot_be_read_now_is_not_a_damaged_one(begun, monkeypatch, error):
    """A disk that fails for a moment must not make the run start again and drop what it has."""
    before = {path.name: path.read_bytes() for path in (begun / "checkpoints").iterdir()}
    read = Path.read_bytes

    def fail(path):
        if path.suffix == ".pt":
            raise error
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    code, said = call(begun, "--resume")
    monkeypatch.undo()
    assert code == 1
    assert "checkpoint_7.pt cannot be read now" in said
    assert {path.name: path.read_bytes() for path in (begun / "checkpoints").iterdir()} == before
    assert rows(begun)[-1]["step"] == 7
