"""Kill training runs at random moments; check that checkpoints load and that resumed runs end exactly the same.

Every run is a small one on random anatomy, killed with SIGKILL at a random moment after its first metrics, then resumed
to its end and compared with one that nothing happened to: metrics, and weights to the last bit. One JSON line a run.

    python benchmarks/robustness/kill_training.py                # 20 runs more, then the counts over all rows
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from monai_drdm.train import build_config, fit

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine, read_rows

SETTINGS = ["channels=[8, 16]", "working_size=33", "batch_size=2", "epoch_length=3", "max_epochs=8", "warmup_steps=2"]


def killed(run: Path, seconds: float) -> bool:
    """Start a run and kill it ``seconds`` after its first metrics; False if it had finished by then."""
    settings = [part for one in SETTINGS for part in ("--set", one)]
    command = [sys.executable, "-m", "monai_drdm.train", "--out", str(run), *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603 # our own
    while not (run / "metrics.jsonl").is_file() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    return process.wait() != 0


def steps_saved(run: Path) -> tuple[int | None, bool]:
    """The step of the latest checkpoint, and whether all of them load."""
    paths = list((run / "checkpoints").glob("[!.]*.pt"))  # names of unfinished files start with a dot
    loadable = True
    for path in paths:
        try:
            torch.load(path, weights_only=True)
        except Exception:  # whatever damage leads to
            loadable = False
    return max((int(path.stem.split("_")[-1]) for path in paths), default=None), loadable


def metrics_of(run: Path) -> list[Any]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trial(folder: Path, whole: Path, longest: float, seed: int) -> dict[str, Any]:
    """Kill one run, resume it, and compare it with an undisturbed run."""
    run, seconds = folder / "run", random.Random(seed).uniform(0, longest)  # noqa: S311 # moments, not secrets
    ended = not killed(run, seconds)
    step, loadable = steps_saved(run)
    noted = sum(line.endswith("}") for line in (run / "metrics.jsonl").read_text().splitlines())
    fit(build_config(settings=SETTINGS), run, resume=True)
    weights = "network.safetensors"
    return {
        "seed": seed,
        "seconds": round(seconds, 3),
        "ended_before": ended,
        "rows_noted": noted,
        "checkpoint_step": step,
        "loadable": loadable,
        "metrics_equal": metrics_of(run) == metrics_of(whole),
        "weights_equal": (run / weights).read_bytes() == (whole / weights).read_bytes(),
        **machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "kill_training.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fit(build_config(settings=SETTINGS), folder / "whole" / "run")
        started = time.perf_counter()
        fit(build_config(settings=SETTINGS), folder / "again" / "run")
        longest = time.perf_counter() - started
        first = len(read_rows(args.results))
        for number in tqdm(range(first, first + args.kills), desc="kills"):
            append_rows(args.results, trial(folder / str(number), folder / "whole" / "run", longest, number))
    rows = read_rows(args.results)
    for name in ("ended_before", "loadable", "metrics_equal", "weights_equal"):
        print(f"{name}: {sum(row[name] for row in rows)} of {len(rows)}")


if __name__ == "__main__":
    main()
