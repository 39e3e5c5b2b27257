"""Which augmentation helps a U-Net most that learns from few labelled subjects?

First every arm chooses its strength on validation subjects, all with the same number of trials; then the chosen
settings are trained with other labelled subjects and judged on test subjects. Every run is a row; runs
with a row are skipped, so a stopped command goes on. Test subjects are evaluated by ``run`` only, and each
evaluation is a row.

    python benchmarks/few_shot/segmentation.py search --protocol acdc --arms affine
    python benchmarks/few_shot/segmentation.py search --protocol acdc --arms elastic random drdm
    python benchmarks/few_shot/segmentation.py search --protocol acdc --arms elastic random drdm --subjects 1
    python benchmarks/few_shot/segmentation.py run --protocol acdc --arms affine elastic random drdm --subjects 1 5
    python benchmarks/few_shot/segmentation.py run --protocol acdc --arms drdm-tuned --network tuned.safetensors
    python benchmarks/few_shot/segmentation.py table

Training ends when the validation curve is flat or at the common cap; the weights are the averaged ones of the iteration
that was best on validation subjects. With ``FEW_SHOT_COMPILE=1`` the U-Net's training is compiled, which takes a C++
compiler and is half as long without bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from arms import ARMS, Augmenter, candidates, CORE, POSE, PROBABILITIES, Setting, SPARSE, stack, STRENGTHS
from common.labels import dice
from common.rows import append_rows, machine, read_rows
from fields import Fields
from protocols import (
    autocast,
    build_segmenter,
    Case,
    EMA,
    hd95_of,
    labelled,
    PRECISION,
    predict,
    Protocol,
    PROTOCOLS,
    recipe,
    RISE,
    subjects,
    WARM_UP,
)
from table import tables

SEARCH = Path(__file__).parent / "search.jsonl"
SEARCH_SEEDS: dict[int, tuple[int, ...]] = {5: (100,), 1: (100, 101)}
"""Seeds of the search by number of subjects; poses are searched with 5 subjects only."""
COMPILED = bool(os.environ.get("FEW_SHOT_COMPILE"))


def results(protocol: str) -> Path:
    """The file with the rows of a protocol's final runs."""
    return Path(__file__).parent / f"{protocol}.jsonl"


def train(
    protocol: Protocol, arm: str, setting: Setting, count: int, seed: int, fields: Fields
) -> tuple[nn.Module, dict[str, Any]]:
    """Train one segmenter; return it and a record of its training."""
    chosen = labelled(protocol, count, seed)
    cases = [case for subject in chosen for case in subjects(protocol, "pool")[subject]]
    started = time.perf_counter()
    banks = [fields.bank(arm, setting, protocol, case) for case in tqdm(cases, desc="fields", leave=False)]
    drawn, started = time.perf_counter() - started, time.perf_counter()
    augmenter = Augmenter(protocol, setting, cases, banks, stack(seed) if ARMS[arm].stacked else None)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = build_segmenter(protocol)
    forward = torch.compile(network, dynamic=False) if COMPILED else network
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    optimiser = torch.optim.AdamW(network.parameters(), protocol.learning_rate, weight_decay=1e-3)
    loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    curve: list[float] = []
    best, best_weights, risen, at = -1.0, copy.deepcopy(averaged.module), 0, -1.0
    bar = tqdm(range(1, protocol.cap + 1), desc=f"{protocol.name} {arm} {count} subjects seed {seed}", mininterval=5)
    for iteration in bar:
        image, label = augmenter.batch(generator, iteration)
        for group in optimiser.param_groups:
            group["lr"] = protocol.learning_rate * min(1.0, iteration / WARM_UP)
        network.train()
        with autocast():
            logits = forward(image)
        optimiser.zero_grad(set_to_none=True)
        loss(logits.float(), label).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        averaged.update_parameters(network)
        if iteration % protocol.every == 0:
            curve.append(float(np.mean(list(mean_dice(protocol, averaged.module, "validation").values()))))
            if curve[-1] > best:
                best, best_weights = curve[-1], copy.deepcopy(averaged.module)
            if curve[-1] > at + RISE:
                at, risen = curve[-1], iteration
            bar.set_postfix(validation=f"{curve[-1]:.3f}", best=f"{best:.3f}")
            if iteration >= protocol.least and iteration - risen >= protocol.patience:
                break
    story = {
        "labelled": chosen,
        "iterations": iteration,
        "best_iteration": (1 + int(np.argmax(curve))) * protocol.every,
        "curve": [round(value, 4) for value in curve],
        "validation": best,
        "precision": PRECISION,
        "fields_code": fields.code_of(arm),
        "fields_seconds": drawn,
        "seconds": time.perf_counter() - started,
    }
    return best_weights, story


def cases_of(protocol: Protocol, split: str) -> Iterator[Case]:
    for found in subjects(protocol, split).values():
        yield from found


def mean_dice(protocol: Protocol, segmenter: nn.Module, split: str) -> dict[str, float]:
    means = {}
    for case in cases_of(protocol, split):
        known = [d for d in dice(predict(segmenter, case), case.label, len(protocol.structures)) if d is not None]
        means[case.name] = float(np.mean(known))
    return means


def judge(protocol: Protocol, segmenter: nn.Module) -> dict[str, Any]:
    """Compute Dice and HD95 of every structure in every test volume."""
    found: dict[str, Any] = {"dice": {}, "hd95": {}}
    for case in tqdm(list(cases_of(protocol, "test")), desc="test", leave=False):
        predicted = predict(segmenter, case)
        found["dice"][case.name] = dice(predicted, case.label, len(protocol.structures))
        found["hd95"][case.name] = hd95_of(protocol, predicted, case.label)
    return found


def trials(protocol: Protocol, arm: str, count: int, fields: Fields) -> list[Setting]:
    """The settings that the search of an arm tries; poses are searched with 5 subjects only."""
    if arm == "affine":
        return candidates(arm, len(protocol.grid), Setting()) if count == 5 else []
    pose = chosen_setting(protocol, "affine", 5, fields)
    choice = (STRENGTHS, PROBABILITIES) if count == 5 else (SPARSE, PROBABILITIES[-1:])
    return candidates(arm, len(protocol.grid), pose, *choice)


def chosen_setting(protocol: Protocol, arm: str, count: int, fields: Fields) -> Setting:
    """The best setting of an arm on validation subjects; without a search for this count, that of 5 subjects.

    Brains take the settings of hippocampi, which are 3D scans of heads too.
    """
    if arm == "none":
        return Setting()
    if fixed := ARMS[arm].fixed:
        return Setting(low=fixed[0], high=fixed[1], prob=fixed[2])
    protocol = PROTOCOLS["hippocampus"] if protocol.name == "ixi" else protocol
    searched = ARMS[arm].setting_of or arm
    key = {"recipe": recipe(protocol), "arm": searched, "network": fields.name_for(searched, protocol)}
    rows = [row for row in read_rows(SEARCH) if all(row[name] == value for name, value in key.items())]
    count = count if any(row["subjects"] == count for row in rows) else 5
    found = {
        (Setting(**row["setting"]), row["seed"]): float(row["validation"]) for row in rows if row["subjects"] == count
    }
    wanted = trials(protocol, searched, count, fields)
    missing = sum((setting, seed) not in found for setting in wanted for seed in SEARCH_SEEDS[count])
    if missing or not wanted:
        raise SystemExit(
            f"{protocol.name}: the search of {searched!r} with {count} subjects lacks {missing or 'all'} trainings; "
            f"run `search --protocol {protocol.name} --arms {searched} --subjects {count}` first."
        )
    best = max(wanted, key=lambda setting: float(np.mean([found[setting, seed] for seed in SEARCH_SEEDS[count]])))
    if not ARMS[arm].recovers:
        best = replace(best, recovery=1.0)
    return best if ARMS[arm].posed else replace(best, **dict.fromkeys(POSE, 0.0))


def search(protocol: Protocol, arm: str, count: int, fields: Fields) -> None:
    """Train every candidate setting of an arm once per seed, and judge it on validation subjects."""
    for setting in trials(protocol, arm, count, fields):
        for seed in SEARCH_SEEDS[count]:
            key = {"protocol": protocol.name, "recipe": recipe(protocol), "arm": arm, "setting": setting.row()}
            key |= {"subjects": count, "seed": seed, "network": fields.name_for(arm, protocol)}
            if not has(SEARCH, key):
                _, story = train(protocol, arm, setting, count, seed, fields)
                append_rows(SEARCH, key | story | machine())


def run(protocol: Protocol, arm: str, count: int, seed: int, fields: Fields) -> None:
    """Train with the chosen setting and judge on test subjects."""
    key = {"protocol": protocol.name, "recipe": recipe(protocol), "arm": arm, "subjects": count, "seed": seed}
    setting = chosen_setting(protocol, arm, count, fields)
    key |= {"setting": setting.row(), "network": fields.name_for(arm, protocol)}
    if not has(results(protocol.name), key):
        segmenter, story = train(protocol, arm, setting, count, seed, fields)
        append_rows(results(protocol.name), key | story | judge(protocol, segmenter) | machine())


def has(path: Path, key: dict[str, Any]) -> bool:
    """Whether a file contains a row with these entries."""
    return any(all(row.get(k) == value for k, value in key.items()) for row in read_rows(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "run", "table"))
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), default="acdc")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(CORE[:4]))
    parser.add_argument("--subjects", nargs="+", type=int, help="5 for a search, 1 and 5 for runs, unless given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--network", help="network of arm drdm-tuned: a .safetensors file")
    parser.add_argument("--fields", type=Path, default=Path("few_shot_fields"), help="folder for fields drawn ahead")
    args = parser.parse_args()
    protocol, fields = PROTOCOLS[args.protocol], Fields(args.fields, args.network)
    if args.what == "search":
        if not set(args.subjects or [5]) <= set(SEARCH_SEEDS):
            parser.error(f"a search takes --subjects {sorted(SEARCH_SEEDS)}, got {args.subjects}")
        for count in args.subjects or [5]:
            for arm in args.arms:
                search(protocol, arm, count, fields)
    if args.what == "run":
        for seed in args.seeds:
            for count in args.subjects or [1, 5]:
                for arm in args.arms:
                    run(protocol, arm, count, seed, fields)
    print(tables(read_rows(SEARCH), [row for name in PROTOCOLS for row in read_rows(results(name))]))


if __name__ == "__main__":
    main()
