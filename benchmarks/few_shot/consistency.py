"""What do unlabelled scans add to few labelled ones, and does a deformed view of them help?

A mean teacher predicts labels of unlabelled images; the network that learns must predict the same on a strong view of
them: other intensities, CutMix, and, by arm, another pose or a deformation that moves image, label and confidence
together. Labelled images have poses, as in ``segmentation.py``, which has the protocols. First every arm chooses its
strength on validation subjects, all with the same number of trials; then the chosen settings are trained with other
labelled subjects and judged on test subjects with the weights of the last iteration. Arm ``alone`` is the same training
without the unlabelled images. Every training is a row; those with a row are skipped, so a stopped command goes on.

    python benchmarks/few_shot/consistency.py search --arms none poses drdm elastic random
    python benchmarks/few_shot/consistency.py run --arms none drdm --subjects 1 3 5
    python benchmarks/few_shot/consistency.py table
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.transforms import CutMix
from torch import nn, Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # the recipe that is measured
from arms import INTENSITY, Setting
from common.rows import append_rows, machine, read_rows
from fields import Fields
from mean_teacher import unlabelled_loss
from protocols import autocast, build_segmenter, Case, labelled, PRECISION, Protocol, PROTOCOLS, subjects
from segmentation import chosen_setting, has, judge, mean_dice, results
from table import apart, by_structure, case_means, p_value, Row, split, spread

from monai_drdm.fields import identity_grid, sample
from monai_drdm.train.augmentation import Appearance, change_appearance, Pose, random_pose

ROWS = Path(__file__).parent / "consistency.jsonl"
SEARCH_SEEDS = (100, 101)
"""Draws of labelled subjects on which settings are chosen; tests are run with others."""

STRONG = Appearance(gamma=0.7, contrast=0.5, bias=0.3, blur_vox=1.0, noise=0.05)
"""Change of intensities of strong views."""


@dataclass(frozen=True)
class Recipe:
    """How the network learns from labelled and unlabelled images; the same for all arms."""

    iterations: int
    labelled_batch: int
    unlabelled_batch: int
    bank: int
    """Number of fields drawn for every image before training."""
    learning_rate: float = 2e-3
    power: float = 0.9
    """Exponent of the polynomial decay of the learning rate."""
    decay: float = 0.99
    """Of the mean teacher's weights."""
    confidence: float = 0.95
    """Smallest probability with which the teacher's label counts."""
    weight: float = 1.0
    """Of the unlabelled loss."""
    ramp: int = 600
    """Iterations over which the weight rises from 0."""
    cutmix: float = 0.5
    """Probability that a part of a strong view comes from another."""
    strong: Appearance = STRONG

    def digest(self) -> str:
        """Identify the recipe; results of different recipes are not compared."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]


RECIPES = {
    "acdc": Recipe(4000, 8, 12, bank=2),
    "hippocampus": Recipe(2000, 2, 3, bank=2),
    "ixi": Recipe(2000, 2, 3, bank=2),
}
SEARCHED = 0.5
"""Length of a training of the search, as a share of the recipe's."""


@dataclass(frozen=True)
class View:
    """The geometry of a strong view: what moves it, how strongly, and where the movement enters."""

    fields: str = ""
    """Arm of ``fields.py`` that draws the fields: `elastic`, `random`, `drdm`, `drdm-tuned`; empty: none."""
    posed: bool = True
    """Whether the teacher sees images in the same pose as the network; otherwise it sees them as they are."""
    low: float = 0.0
    high: float = 0.0
    """Range of the strength of fields: noise magnitude or deformation level, by arm."""
    prob: float = 0.8
    where: str = "strong"
    """`strong`: fields move strong views; `both`: also what the teacher sees, alike; `labelled`: strong views and
    labelled images."""

    def setting(self) -> Setting:
        """The fields as the other benchmark names them."""
        return Setting(low=self.low, high=self.high, prob=self.prob)


STRENGTHS: dict[str, dict[str, tuple[tuple[float, float], ...]]] = {
    "acdc": {
        "drdm": ((0.05, 0.25), (0.2, 0.5), (0.3, 0.8)),
        "elastic": ((0.0, 2.0), (0.0, 4.0), (0.0, 6.0)),
        "random": ((0.03, 0.16), (0.06, 0.32), (0.1, 0.44)),
    },
    "hippocampus": {
        "drdm": ((0.05, 0.25), (0.3, 0.8)),
        "elastic": ((0.0, 65.0), (0.0, 260.0)),
        "random": ((0.03, 0.16), (0.11, 0.49)),
    },
    "ixi": {
        "drdm": ((0.05, 0.25), (0.3, 0.8)),
        "elastic": ((0.0, 100.0), (0.0, 320.0)),
        "random": ((0.04, 0.23), (0.13, 0.57)),
    },
}
"""Ranges that an arm may choose; by rank they move the middle half of the images equally far (``displacement``)."""


PLACES: dict[str, tuple[str, ...]] = {"acdc": ("both", "labelled"), "hippocampus": (), "ixi": ()}
"""Where else fields may enter, tried with the strength that was best in strong views."""
ARMS = ("alone", "none", "poses", "elastic", "random", "drdm", "drdm-tuned")


class Data:
    """Random batches of one training: images, their fields, and poses."""

    def __init__(self, protocol: Protocol, pose: Pose, cases: list[Case], fields: list[Tensor] | None) -> None:
        self.protocol, self.pose = protocol, pose
        self.images = torch.cat([case.image for case in cases])
        self.labels = torch.cat([case.label for case in cases])
        self.bank = torch.cat(fields) if fields else None

    def choose(self, generator: torch.Generator, size: int) -> Tensor:
        """Numbers of random images."""
        return torch.randint(len(self.images), (size,), generator=generator)

    def ddf(self, chosen: Tensor, generator: torch.Generator, prob: float) -> Tensor | None:
        """A field of each chosen image, ``(B, D, *grid)``, zero where it does not fire."""
        if self.bank is None:
            return None
        which = torch.randint(self.bank.shape[1], (len(chosen),), generator=generator)
        fires = torch.rand(len(chosen), generator=generator) < prob
        return self.bank[chosen, which].float() * fires.view(-1, *(1,) * (1 + len(self.protocol.grid)))

    def posing(self, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        """Positions ``(B, D, *grid)`` that random poses sample, and their matrices ``(B, D, D)``."""
        shape = self.protocol.grid
        matrix, shift = random_pose(generator, size, shape, self.pose)
        form = (1, -1, *(1,) * len(shape))
        centre = torch.tensor([(n - 1) / 2 for n in shape]).view(form)
        turned = torch.einsum("bij,bj...->bi...", matrix, identity_grid(shape).expand(size, -1, *shape) - centre)
        return turned + centre + shift.view(size, -1, *form[2:]), matrix


def labelled_batch(data: Data, view: View, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Posed images and labels, deformed if the view says so."""
    chosen = data.choose(generator, size)
    position, _ = data.posing(generator, size)
    if view.where == "labelled" and (ddf := data.ddf(chosen, generator, view.prob)) is not None:
        position = position + sample(ddf, position)
    image = sample(data.images[chosen], position)
    return change_appearance(image, generator, INTENSITY), sample(data.labels[chosen], position, "nearest")


def unlabelled_views(data: Data, view: View, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What the teacher sees, what the network sees, and where in the former each voxel of the latter lies."""
    chosen = data.choose(generator, size)
    position, matrix = data.posing(generator, size)
    ddf = data.ddf(chosen, generator, view.prob)
    moved = torch.zeros_like(position) if ddf is None else sample(ddf, position)
    images = data.images[chosen]
    strong = sample(images, position + moved)
    here = identity_grid(data.protocol.grid).expand_as(position)
    if not view.posed and view.where == "both" and ddf is not None:
        return sample(images, here + ddf), strong, position
    if not view.posed:
        return images, strong, position + moved
    if view.where == "both":
        return strong, strong, here
    back = torch.linalg.solve(matrix, moved.flatten(2)).view_as(moved)
    return sample(images, position), strong, here + back


@torch.no_grad()
def pseudo_labels(teacher: nn.Module, weak: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's labels and their confidence, ``(B, 1, *grid)``, moved to where the strong view has them."""
    teacher.eval()
    with autocast():
        confidence, label = teacher(weak).float().softmax(1).max(1, keepdim=True)
    return sample(label.byte(), position, "nearest"), sample(confidence, position)


def mix(cutmix: CutMix, prob: float, generator: torch.Generator, *batches: Tensor) -> list[Tensor]:
    """A part of some images, of their labels and of their confidence comes from another image of the batch."""
    cutmix.randomize(batches[0])
    chosen = torch.rand(len(batches[0]), generator=generator) < prob
    form = (-1, *(1,) * (batches[0].ndim - 1))
    return [torch.where(chosen.view(form), cutmix(batch, randomize=False), batch) for batch in batches]


def train(
    protocol: Protocol, recipe: Recipe, view: View, pose: Pose, count: int, seed: int, fields: Fields
) -> tuple[nn.Module, dict[str, Any]]:
    """Train one segmenter; return the averaged one and a record of its training."""
    started = time.perf_counter()
    chosen = labelled(protocol, count, seed)
    pool = subjects(protocol, "pool")
    everyone = replace(protocol, bank=recipe.bank)

    def load(numbers: list[int]) -> Data:
        cases = [case for number in numbers for case in pool[number]]
        if not view.fields:
            return Data(protocol, pose, cases, None)
        bar = tqdm(cases, desc="fields", leave=False)
        return Data(
            protocol, pose, cases, [_there(fields.bank(view.fields, view.setting(), everyone, one)) for one in bar]
        )

    few, many = load(chosen), load(list(pool))
    drawn, started = time.perf_counter() - started, time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    cutmix = CutMix(recipe.unlabelled_batch).set_random_state(seed)
    network = build_segmenter(protocol)
    teacher = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.decay))
    optimiser = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=1e-3)
    supervised = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    curve: list[float] = []
    trusted = 0.0
    for iteration in tqdm(range(1, recipe.iterations + 1), desc=f"{view} {count} subjects seed {seed}", mininterval=20):
        image, label = labelled_batch(few, view, recipe.labelled_batch, generator)
        inputs = [image]
        if recipe.weight:
            weak, strong, position = unlabelled_views(many, view, recipe.unlabelled_batch, generator)
            guess, confidence = pseudo_labels(teacher, weak, position)
            strong = change_appearance(strong, generator, recipe.strong)
            counts = (confidence >= recipe.confidence).float()
            strong, guess, counts = mix(cutmix, recipe.cutmix, generator, strong, guess, counts)
            inputs.append(strong)
            trusted += float(counts.mean()) / recipe.iterations
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * (1 - (iteration - 1) / recipe.iterations) ** recipe.power
        network.train()
        with autocast():
            logits = network(torch.cat(inputs)).float()
        loss = supervised(logits[: len(image)], label)
        if recipe.weight:
            weight = recipe.weight * min(1.0, iteration / recipe.ramp)
            loss = loss + weight * unlabelled_loss(logits[len(image) :], guess, counts)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        teacher.update_parameters(network)
        if iteration % (recipe.iterations // 8) == 0:
            found = mean_dice(protocol, teacher.module, "validation").values()
            curve.append(sum(found) / len(found))
    story = {"labelled": chosen, "iterations": recipe.iterations, "curve": [round(value, 4) for value in curve]}
    story |= {"validation": curve[-1], "trusted": trusted, "precision": PRECISION}
    story |= {"fields_seconds": drawn, "seconds": time.perf_counter() - started}
    return teacher.module, story


def _there(bank: Tensor | None) -> Tensor:
    assert bank is not None
    return bank


class Trainings:
    """The trainings of one protocol, each made once and kept as a row."""

    def __init__(self, protocol: Protocol, fields: Fields) -> None:
        self.protocol, self.recipe, self.fields = protocol, RECIPES[protocol.name], fields
        self.pose = chosen_setting(protocol, "affine", 5, fields).pose

    def key(self, what: str, arm: str, view: View, count: int, seed: int) -> dict[str, Any]:
        """What names a row."""
        recipe = self._recipe(what, arm)
        return {
            "what": what,
            "protocol": self.protocol.name,
            "recipe": recipe.digest(),
            "arm": arm,
            "view": asdict(view),
            "subjects": count,
            "seed": seed,
            "network": self.fields.name_for(view.fields, self.protocol) if view.fields else "",
        }

    def _recipe(self, what: str, arm: str) -> Recipe:
        recipe = replace(self.recipe, weight=0.0) if arm == "alone" else self.recipe
        return replace(recipe, iterations=round(recipe.iterations * SEARCHED)) if what == "search" else recipe

    def train(self, what: str, arm: str, view: View, count: int, seed: int) -> dict[str, Any]:
        """The row of a training, which is made unless it is there."""
        key = self.key(what, arm, view, count, seed)
        if not has(ROWS, key):
            network, story = train(self.protocol, self._recipe(what, arm), view, self.pose, count, seed, self.fields)
            if what == "test":
                story |= judge(self.protocol, network)
            append_rows(ROWS, key | story | machine())
        return next(row for row in read_rows(ROWS) if all(row.get(k) == v for k, v in key.items()))

    def validation(self, arm: str, view: View) -> float:
        """Mean validation Dice of a view over the draws of the search, with one labelled subject."""
        found = [self.train("search", arm, view, 1, seed)["validation"] for seed in SEARCH_SEEDS]
        return sum(found) / len(found)

    def chosen(self, arm: str) -> View:
        """The best view of an arm on validation subjects; its trainings are made unless they are there.

        Brains take that of hippocampi, which are 3D scans of heads too, with fields that move them as far, by rank.
        """
        if arm in ("alone", "none", "poses"):
            return View(posed=arm == "none")
        if arm == "drdm-tuned":
            return replace(self.chosen("drdm"), fields=arm)
        if self.protocol.name == "ixi":
            view = Trainings(PROTOCOLS["hippocampus"], self.fields).chosen(arm)
            rank = STRENGTHS["hippocampus"][view.fields].index((view.low, view.high))
            low, high = STRENGTHS["ixi"][view.fields][rank]
            return replace(view, low=low, high=high)
        posed = self.validation("none", View()) >= self.validation("poses", View(posed=False))
        strengths = [View(arm, posed, low, high) for low, high in STRENGTHS[self.protocol.name][arm]]
        best = max(strengths, key=lambda view: self.validation(arm, view))
        views = best, *(replace(best, where=one) for one in PLACES[self.protocol.name])
        return max(views, key=lambda view: self.validation(arm, view))


def displacement(protocol: Protocol, arm: str, fields: Fields) -> Iterator[tuple[float, float, float]]:
    """Every strength of an arm, and how far its fields move the middle half of images, RMS in voxels."""
    cases = [pair[0] for pair in list(subjects(protocol, "pool").values())[::6]]
    for low, high in STRENGTHS[protocol.name][arm.removesuffix("-tuned")]:
        setting = Setting(low=low, high=high)
        banks = [fields.bank(arm, setting, replace(protocol, bank=2), one) for one in cases]
        ddf = torch.cat([_there(bank).flatten(0, 1).float() for bank in banks])
        middle = [slice(n // 4, n - n // 4) for n in protocol.grid]
        moved = ddf[(slice(None), slice(None), *middle)].square().sum(1).flatten(1)
        yield low, high, float(moved.mean(1).sqrt().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "run", "displacement", "table"))
    parser.add_argument("--protocol", choices=tuple(RECIPES), default="acdc")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["none", "poses", "drdm", "elastic", "random"])
    parser.add_argument("--subjects", nargs="+", type=int, default=[1, 3, 5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--network", help="network of arm drdm-tuned: a .safetensors file")
    parser.add_argument("--fields", type=Path, default=Path("few_shot_fields"), help="folder for fields drawn ahead")
    args = parser.parse_args()
    if args.what == "table":
        print(table(read_rows(ROWS), [row for name in RECIPES for row in read_rows(results(name))]))
        return
    protocol, fields = PROTOCOLS[args.protocol], Fields(args.fields, args.network)
    trainings = Trainings(protocol, fields)
    for arm in args.arms:
        if args.what == "search":
            view = trainings.chosen(arm)
            print(arm, view, f"{trainings.validation(arm, view):.4f}")
        if args.what == "displacement":
            for low, high, voxels in displacement(protocol, arm, fields):
                print(f"{arm} {low} to {high}: {voxels:.2f} voxels")
    if args.what == "run":
        for seed in args.seeds:
            for count in args.subjects:
                for arm in args.arms:
                    trainings.train("test", arm, trainings.chosen(arm), count, seed)


def table(rows: list[Row], supervised: list[Row]) -> str:
    """Markdown tables of the search and of the tests."""
    parts = [search_table([row for row in rows if row["what"] == "search"])]
    for name in RECIPES:
        tested = [row for row in rows if (row["what"], row["protocol"]) == ("test", name)]
        if tested:
            known, _ = split([row for row in supervised if row["protocol"] == name])
            parts += [f"## {name}: test subjects", test_table(tested, known), comparison(tested, known)]
    return "\n\n".join(parts)


def search_table(rows: list[Row]) -> str:
    """Validation Dice of every view by draw of the labelled subject."""
    lines = ["| protocol | arm | strength | where | validation Dice %, by draw | mean |", "|---|---|---|---|---|---|"]
    for _, found in sorted(_grouped(rows, "protocol", "arm", "view").items()):
        view, values = found[0]["view"], [100 * row["validation"] for row in sorted(found, key=lambda row: row["seed"])]
        strength = f"{view['low']:g} to {view['high']:g}" if view["fields"] else "–"
        place = f"{view['where']}, {'same pose' if view['posed'] else 'teacher unposed'}"
        each = " / ".join(f"{value:.1f}" for value in values)
        mean = f"{sum(values) / len(values):.1f}"
        lines.append(f"| {found[0]['protocol']} | {found[0]['arm']} | {strength} | {place} | {each} | {mean} |")
    return "\n".join(lines)


def test_table(rows: list[Row], supervised: list[Row]) -> str:
    """Test Dice of every arm, mean ± standard deviation over draws; supervised arms of the same subjects first."""
    structures = PROTOCOLS[rows[0]["protocol"]].structures
    lines = [f"| labelled | arm | draws | Dice % | by draw | {' | '.join(structures)} | seconds |"]
    lines.append("|" + "---|" * (6 + len(structures)))
    for kind, group in (("labelled scans only", supervised), ("with unlabelled", rows)):
        for (count, arm), found in sorted(_grouped(group, "subjects", "arm").items()):
            dice = 100 * np.array([by_structure(row, "dice") for row in sorted(found, key=lambda row: row["seed"])])
            each = " / ".join(f"{value:.1f}" for value in dice.mean(1))
            name = "the same training, labelled scans only" if arm == "alone" else f"{arm}, {kind}"
            cells = [name, f"{len(found)}", spread(dice.mean(1)), each, *(spread(one) for one in dice.T)]
            lines.append(f"| {count} | {' | '.join(cells)} | {np.median([row['seconds'] for row in found]):.0f} |")
    return "\n".join(lines)


def comparison(rows: list[Row], supervised: list[Row]) -> str:
    """Every arm minus consistency without deformation, and that minus trainings on labelled scans alone."""
    lines = ["| labelled | arm | minus | Dice points | by draw | p, patients |", "|" + "---|" * 6]
    groups, alone = _grouped(rows, "subjects", "arm"), _grouped(supervised, "subjects", "arm")
    for (count, arm), ours in sorted(groups.items()):
        if arm == "alone":
            continue
        base = arm in ("none", "poses")
        others = {}
        if base:
            others["labelled scans only, poses"] = alone.get((count, "affine"))
            others["the same training, labelled scans only"] = groups.get((count, "alone"))
        peers = () if base else ("none", "poses", "elastic", "random")
        peers += ("drdm",) if arm == "drdm-tuned" else ()
        others |= {other: groups.get((count, other)) for other in peers}
        for name, theirs in others.items():
            seeds = {row["seed"] for row in ours} & {row["seed"] for row in theirs or []}
            if not seeds or name == arm or theirs is None:
                continue
            a, b = (case_means(group, seeds) for group in (ours, theirs))
            patients: dict[str, list[float]] = {}
            for case in a:
                patients.setdefault(case.split("-")[0], []).append(a[case] - b[case])
            points = [float(np.mean(values)) for values in patients.values()]
            each = " / ".join(f"{100 * apart(ours, theirs, seed):+.1f}" for seed in sorted(seeds))
            lines.append(f"| {count} | {arm} | {name} | {100 * np.mean(points):+.2f} | {each} | {p_value(points)} |")
    return "\n".join(lines)


def _grouped(rows: list[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(json.dumps(row[name]) if isinstance(row[name], dict) else row[name] for name in names)
        groups.setdefault(key, []).append(row)
    return groups


if __name__ == "__main__":
    main()
