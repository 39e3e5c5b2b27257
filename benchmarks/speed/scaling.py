"""Measure how time and memory grow with image size, batch size, steps and classes of the label.

One thing is changed at a time, the rest stays at its default. Memory is the peak of a process of its own above what it
held with image and label: network, fields, outputs and, for a bank, drawing two fields.

    python benchmarks/speed/scaling.py --threads 1 --turns 3
    python benchmarks/speed/scaling.py --table
    python benchmarks/speed/scaling.py --leak 2000        # memory over many calls
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from monai_drdm import BatchRandDRDMDeformd, DeformationBank, RandDRDMBankd, RandDRDMDeformd

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine, read_rows
from peers import KEYS, make_sample, peak_mb, reset_peak, resident_mb

PATH = Path(__file__).parent / "scaling.jsonl"
LEAK = Path(__file__).parent / "scaling_leak.jsonl"
Case = dict[str, Any]

DEFAULTS: dict[int, Case] = {
    2: {"shape": (256, 256), "batch": 1, "steps": None, "classes": 4, "form": "fresh"},
    3: {"shape": (96, 96, 96), "batch": 1, "steps": None, "classes": 4, "form": "fresh"},
}
VARIED: dict[int, dict[str, list[Any]]] = {
    2: {
        "shape": [(128, 128), (512, 512), (1024, 1024)],
        "batch": [4, 16],
        "steps": [6, 24],
        "classes": [20, 100],
        "form": ["bank"],
    },
    3: {
        "shape": [(64, 64, 64), (128, 128, 128), (192, 192, 192)],
        "batch": [2],
        "steps": [6],
        "classes": [20],
        "form": ["bank"],
    },
}
EXTRA: list[Case] = [
    DEFAULTS[3] | {"shape": (192, 192, 192), "classes": 20},
    DEFAULTS[3] | {"shape": (192, 192, 192), "classes": 20, "form": "bank"},
]


def cases() -> list[Case]:
    found = []
    for dims, defaults in DEFAULTS.items():
        found += [defaults, *(defaults | {name: value} for name, values in VARIED[dims].items() for value in values)]
    return [*found, *EXTRA]


def sample_of(case: Case) -> dict[str, Any]:
    """An image, and a label with the number of classes of the case."""
    sample = make_sample(tuple(case["shape"]))
    return sample | {"label": (sample["image"] * case["classes"]).clamp(max=case["classes"] - 1).to(torch.uint8)}


def call_of(case: Case, sample: dict[str, Any]) -> Callable[[], object]:
    """The function that is timed for a case."""
    settings: dict[str, Any] = {"keys": KEYS, "mode": ["bilinear", "label"], "prob": 1.0}
    if case["form"] == "bank":
        bank = DeformationBank.build([sample], id_key="name", fields_per_image=2, progress=False)
        banked = RandDRDMBankd(bank=bank, id_key="name", **settings)
        return lambda: banked(sample)
    settings["steps"] = case["steps"]
    if case["batch"] == 1:
        single = RandDRDMDeformd(**settings)
        return lambda: single(sample)
    batch = {key: torch.stack([sample[key]] * case["batch"]) for key in KEYS}
    batched = BatchRandDRDMDeformd(**settings)
    return lambda: batched(batch)


def one(case: Case, threads: int, turns: int) -> None:
    """Time one case and print what it took: seconds and peak megabytes."""
    torch.set_num_threads(threads)
    sample = sample_of(case)
    before = resident_mb()
    reset_peak()
    call = call_of(case, sample)
    call()
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        call()
        seconds.append(round(time.perf_counter() - start, 4))
    print(json.dumps({"seconds": seconds, "peak_above_data_mb": round(peak_mb() - before, 1)}))


def leak(calls: int) -> None:
    """Record resident memory over many calls of every form; one recovery step needs as much memory as twelve."""
    sample = make_sample((64, 64))
    bank = DeformationBank.build([sample], id_key="name", fields_per_image=4, progress=False)
    settings: dict[str, Any] = {"keys": KEYS, "mode": ["bilinear", "nearest"], "prob": 1.0}
    batch = {key: torch.stack([sample[key]] * 2) for key in KEYS}
    forms: dict[str, tuple[Any, Any]] = {
        "RandDRDMBankd": (RandDRDMBankd(bank=bank, id_key="name", **settings), sample),
        "RandDRDMDeformd": (RandDRDMDeformd(steps=1, **settings), sample),
        "BatchRandDRDMDeformd": (BatchRandDRDMDeformd(steps=1, **settings), batch),
    }
    for name, (transform, data) in forms.items():
        found = []
        for number in tqdm(range(calls), desc=name):
            transform(data)
            if number >= calls // 10 and number % max(1, calls // 20) == 0:
                found.append(round(resident_mb(), 1))
        append_rows(LEAK, {"form": name, "calls": calls, "resident_mb": found} | machine())
        print(name, found)


def leak_table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the latest run of every form."""
    lines = ["| form | calls | MB after a tenth of them | at the end | largest in between |", "|---|---|---|---|---|"]
    for row in {r["form"]: r for r in rows}.values():
        found = row["resident_mb"]
        lines.append(f"| {row['form']} | {row['calls']} | {found[0]:.1f} | {found[-1]:.1f} | {max(found):.1f} |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the latest row of every case."""
    lines = [
        "| images | form | batch | steps | classes | threads | seconds (smallest to largest) | peak MB |",
        "|" + "---|" * 8,
    ]
    latest = {json.dumps([row[key] for key in (*DEFAULTS[2], "threads")]): row for row in rows}
    for row in latest.values():
        s = np.array(row["seconds"])
        shape = "×".join(map(str, row["shape"]))
        peak = f"{row['peak_above_data_mb']:.0f}" if "peak_above_data_mb" in row else "–"
        lines.append(
            f"| {shape} | {row['form']} | {row['batch']} | {row['steps'] or 'default'} | {row['classes']} "
            f"| {row['threads']} | {np.median(s):.3f} ({s.min():.3f} to {s.max():.3f}) | {peak} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", help="only cases of these shapes, such as 192x192x192")
    parser.add_argument("--leak", type=int, metavar="CALLS", help="only watch memory over many calls")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(json.loads(args.one), args.threads, args.turns)
        return
    if args.leak:
        leak(args.leak)
        return
    if not args.table:
        where = machine() | {"threads": args.threads}
        where |= {"run": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        chosen = [one for one in cases() if not args.shapes or "x".join(map(str, one["shape"])) in args.shapes]
        for case in tqdm(chosen, unit="case"):
            command = [sys.executable, __file__, "--one", json.dumps(case), "--threads", str(args.threads)]
            command += ["--turns", str(args.turns)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)  # noqa: S603
            append_rows(PATH, case | json.loads(answer.stdout.splitlines()[-1]) | where)
    print(table(read_rows(PATH)), leak_table(read_rows(LEAK)), sep="\n\n")


if __name__ == "__main__":
    main()
