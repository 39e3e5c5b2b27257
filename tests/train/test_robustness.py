"""Runs that are killed, stopped, or find no room on the disk, in processes of their own."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from monai_drdm.train import build_config, fit

SETTINGS = ["channels=[8, 16]", "working_size=33", "batch_size=2", "epoch_length=3", "max_epochs=8", "warmup_steps=2"]
ARGUMENTS = [part for one in SETTINGS for part in ("--set", one)]


def start(folder, *arguments, **options):
    """A run in a process of its own; its folder has the same name everywhere, for the name is in the card."""
    command = [sys.executable, "-m", "monai_drdm.train", "--out", str(folder), *ARGUMENTS, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(folder, *arguments, **options):
    """Exit code, and what it said."""
    process = start(folder, *arguments, **options)
    _, said = process.communicate(timeout=600)
    return process.returncode, said


def wait_for(ready, process):
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def steps_saved(folder):
    """Steps of the checkpoints, every one of which loads."""
    paths = list((folder / "checkpoints").glob("*.pt"))
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
def whole(tmp_path_factory):
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(build_config(settings=SETTINGS), folder)
    return folder


@pytest.fixture
def begun(tmp_path):
    """The same run, stopped at step 7: checkpoints of steps 3, 6 and 7."""
    calls = iter(range(1, 10**6))
    assert fit(build_config(settings=SETTINGS), tmp_path / "run", should_stop=lambda: next(calls) == 9) is None
    return tmp_path / "run"


def test_a_run_that_is_killed_again_and_again(tmp_path, whole):
    run, random_moment = tmp_path / "run", random.Random(0)
    before = 0
    for _ in range(3):
        resume = ["--resume"] if (run / "config.json").is_file() else []
        metrics = run / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.is_file() else 0
        process = start(run, *resume)
        wait_for(lambda: metrics.is_file() and metrics.stat().st_size != size, process)  # noqa: B023 # called at once
        time.sleep(random_moment.uniform(0, 0.25))
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)  # a fast machine may be done already
        saved = steps_saved(run)
        assert not before or saved[-1] >= before, "a checkpoint was lost"
        assert not metrics.is_file() or rows_cut(metrics) - (saved or [0])[-1] <= 3, "more than one interval is lost"
        before = (saved or [0])[-1]
    assert finish(run, "--resume")[0] == 0
    assert same(run, whole)


def rows_cut(metrics):
    """The last step that was noted; the last line may be cut."""
    lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves_it(tmp_path, whole, number):
    process = start(tmp_path / "run")
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").is_file(), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=600)
    if process.returncode:  # a fast machine may be done already
        assert process.returncode == 128 + number
        assert f"go on with --resume --out {tmp_path / 'run'}" in said
        assert steps_saved(tmp_path / "run")[-1] == rows(tmp_path / "run")[-1]["step"]
    assert finish(tmp_path / "run", "--resume")[0] == 0
    assert same(tmp_path / "run", whole)


def test_a_checkpoint_that_may_not_grow_so_large(begun, whole):
    """The same as a full disk to the program, and needs no rights."""
    resource = pytest.importorskip("resource", reason="there are no such limits here")
    before = {path.name: path.read_bytes() for path in (begun / "checkpoints").iterdir()}

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    code, said = finish(begun, "--resume", preexec_fn=limit)
    assert code == 1
    assert "Traceback" not in said
    assert f"the run in {begun} cannot be written and has stopped" in said
    assert os.strerror(errno.EFBIG) in said
    assert "checkpoint_7.pt is intact" in said
    assert {path.name: path.read_bytes() for path in (begun / "checkpoints").iterdir()} == before
    assert finish(begun, "--resume")[0] == 0
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
    code, said = finish(run)
    assert code == 1
    assert "Traceback" not in said
    assert f"the run in {run} cannot be written and has stopped" in said
    assert os.strerror(errno.ENOSPC) in said
    saved = steps_saved(run)
    assert ("there is no checkpoint yet" in said) == (not saved)
    assert not saved or f"checkpoint_{saved[-1]}.pt is intact" in said
    small_disk(tmp_path / "disk", 9000)
    assert finish(run, *(["--resume"] if (run / "config.json").is_file() else []))[0] == 0
    assert same(run, whole)


def test_metrics_that_cannot_be_written(begun, whole):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    metrics = begun / "metrics.jsonl"
    metrics.rename(begun / "aside")
    metrics.symlink_to("/dev/full")
    code, said = finish(begun, "--resume")
    assert code == 1
    assert os.strerror(errno.ENOSPC) in said
    assert "checkpoint_7.pt is intact" in said
    (begun / "aside").replace(metrics)
    assert finish(begun, "--resume")[0] == 0
    assert same(begun, whole)


def test_a_board_that_cannot_be_written(begun, small_disk, whole):
    small_disk(begun / "tensorboard", 4)
    (begun / "tensorboard" / "fill").write_bytes(bytes(4000))
    code, said = finish(begun, "--resume")
    assert code == 1
    assert f"the run in {begun} cannot be written and has stopped" in said
    (begun / "tensorboard" / "fill").unlink()
    small_disk(begun / "tensorboard", 100)
    assert finish(begun, "--resume")[0] == 0
    assert same(begun, whole)


def test_sheets_that_cannot_be_written(begun, whole):
    for sheet in (begun / "sheets").iterdir():
        sheet.unlink()
    (begun / "sheets").rmdir()
    (begun / "sheets").write_text("in the way")
    code, said = finish(begun, "--resume")
    assert code == 1
    assert "checkpoint_7.pt is intact" in said
    (begun / "sheets").unlink()
    assert finish(begun, "--resume")[0] == 0
    assert same(begun, whole)


def test_two_runs_in_one_folder(begun):
    """The second is refused at once, with and without ``--resume``, and leaves the first alone."""
    first = start(begun, "--resume", "--set", "max_epochs=8")
    wait_for(lambda: (begun / "metrics.jsonl").stat().st_size > 1000, first)
    first.send_signal(signal.SIGSTOP)  # it holds the folder for as long as this takes
    try:
        if first.poll() is None:
            code, said = finish(begun, "--resume")
            assert code == 1
            assert f"another run is writing to {begun}" in said
            code, said = finish(begun)
            assert code == 1
            assert "not an empty folder" in said
    finally:
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=600)
    assert first.returncode == 0
