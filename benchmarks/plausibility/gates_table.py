"""Make the tables of ``gates.py`` from its rows: which gates are met, and all columns by level.

Gates are shown as mean ± standard error, columns as mean ± standard deviation. Dice lost is shown twice: over all
structures, and over those that the segmenter finds in the real image (Dice 0.7 or more). The others, such as the right
ventricle in slices at its edge, come and go by chance and hide small losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]
GROUP = ("domain", "network", "sha256", "sampler", "steps")

FOUND = 0.7
"""A structure counts as found if its Dice in the real image is at least this."""
PUBLISHED = {
    "domain": "acdc",
    "network": "zheng2026-cmr-2d",
    "sha256": "b10b186406ca420ee543d2058b47dcc321b6dfeb3d022ecb64fec3f1bc96a47f",
}
"""Domain and network of the rows of ``samplers.py``."""


def dice_loss(row: dict[str, Any], under: str, at_least: float = 0) -> float | None:
    """Dice points lost against the real image, mean over structures and draws; None if there is none.

    Args:
        row: of ``gates.py``.
        under: ``deformed`` or ``random``.
        at_least: structures are left out that the segmenter finds worse than this in the real image.
    """
    lost = [
        100 * (real - {"deformed": deformed, "random": random}[under])
        for draw in zip(row.get("dice_deformed", []), row.get("dice_random", []))
        for real, deformed, random in zip(row["dice_real"], *draw)
        if None not in (real, deformed, random) and real >= at_least
    ]
    return float(np.mean(lost)) if lost else None


def mean_dice(row: dict[str, Any], of: str) -> float | None:
    """Mean Dice over structures and draws, in percent."""
    found = row.get(f"dice_{of}", [])
    flat = found if of == "real" else [value for draw in found for value in draw]
    values = [value for value in flat if value is not None]
    return 100 * float(np.mean(values)) if values else None


def _column(key: str, scale: float = 1) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: None if row.get(key) is None else scale * row[key]


def _dice(of: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: mean_dice(row, of)


def _loss(under: str, at_least: float = 0) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: dice_loss(row, under, at_least)


COLUMNS: dict[str, tuple[Callable[[dict[str, Any]], float | None], int]] = {
    "corner folds %": (_column("folds_corner", 100), 4),
    "central folds %": (_column("folds_central", 100), 4),
    "px at 256": (_column("displacement_256"), 2),
    "px": (_column("displacement_px"), 2),
    "px without affine": (_column("displacement_no_affine_px"), 2),
    "px without affine at 256": (_column("displacement_no_affine_256"), 2),
    "σ log det J": (_column("log_jacobian_std"), 3),
    "σ in foreground": (_column("log_jacobian_std_foreground"), 3),
    "diversity": (_column("diversity"), 3),
    "Dice real": (_dice("real"), 1),
    "Dice deformed": (_dice("deformed"), 1),
    "Dice random": (_dice("random"), 1),
    "lost": (_loss("deformed"), 2),
    "lost under random": (_loss("random"), 2),
    "lost, found structures": (_loss("deformed", FOUND), 2),
    "lost under random, found structures": (_loss("random", FOUND), 2),
    "s": (_column("seconds"), 3),
}


def values(rows: Rows, column: str) -> np.ndarray:
    """Values of one column; rows without it are left out."""
    read = COLUMNS[column][0]
    return np.array([value for row in rows if (value := read(row)) is not None])


def _gate(rows: Rows, level: float, column: str, limit: float, *, at_least: bool = False) -> str:
    """Whether the mean is within its limit; mean ± standard error (number of images and draws)."""
    found = values([row for row in rows if row["level"] == level], column)
    if not found.size:
        return "–"
    met = found.mean() >= limit if at_least else found.mean() <= limit
    return f"{_mark(met)} {_estimate(found, COLUMNS[column][1])} ({found.size})"


def _half_of_random(rows: Rows, which: str = "") -> str:
    """Whether the loss is at most half of the loss under random fields, with both losses."""
    if rows[0]["sampler"] == "random":
        return "–"
    rows = [row for row in rows if row["level"] == 0.6]
    lost, random = values(rows, f"lost{which}"), values(rows, f"lost under random{which}")
    if not lost.size:
        return "–"
    return f"{_mark(lost.mean() <= random.mean() / 2)} {_estimate(lost, 2)} : {_estimate(random, 2)} ({lost.size})"


def _estimate(found: np.ndarray, digits: int) -> str:
    error = found.std(ddof=1) / math.sqrt(found.size) if found.size > 1 else math.nan
    return f"{found.mean():.{digits}f} ± {error:.{digits}f}"


def _mark(met: bool) -> str:
    return "met" if met else "**missed**"


GATES: dict[str, Callable[[Rows], str]] = {
    "folds ≤ 0.02 % at 0.6": lambda rows: _gate(rows, 0.6, "corner folds %", 0.02),
    "folds ≤ 0.1 % at 0.8": lambda rows: _gate(rows, 0.8, "corner folds %", 0.1),
    "px without affine ≥ 4 at 256": lambda rows: _gate(rows, 0.6, "px without affine at 256", 4, at_least=True),
    "diversity ≥ 0.8": lambda rows: _gate(rows, 0.6, "diversity", 0.8, at_least=True),
    "σ log det J ≤ 0.45": lambda rows: _gate(rows, 0.6, "σ log det J", 0.45),
    "Dice lost ≤ 2": lambda rows: _gate(rows, 0.6, "lost", 2),
    "≤ half of random": _half_of_random,
    "found structures: lost ≤ 2": lambda rows: _gate(rows, 0.6, "lost, found structures", 2),
    "found structures: ≤ half of random": lambda rows: _half_of_random(rows, ", found structures"),
}


def tables(rows: Rows, published: Rows = ()) -> str:
    """Markdown: the gates, then all columns by level.

    Args:
        rows: of ``gates.py``.
        published: of ``samplers.py``; of the fields of one image and seed they are taken.
    """
    groups = _groups(_with_published(rows, published))
    lines = [_header(["domain", "network", "sampler", "steps", *GATES])]
    for key, group in groups:
        lines.append(_line([*_names(key), *(gate(group) for gate in GATES.values())]))
    lines += ["", _header(["domain", "network", "sampler", "steps", "level", "n (images)", *COLUMNS])]
    for key, group in groups:
        for level in sorted({row["level"] for row in group}):
            chosen = [row for row in group if row["level"] == level]
            count = f"{len(chosen)} ({len({row['image'] for row in chosen})})"
            cells = [_spread(values(chosen, column), digits) for column, (_, digits) in COLUMNS.items()]
            lines.append(_line([*_names(key), str(level), count, *cells]))
    return "\n".join(lines)


NAMES = {
    "acdc": "cardiac MR (never trained on)",
    "cxr": "chest X-rays",
    "nuclei": "nuclei (never trained on)",
    "limbct": "limbs, CT slices (never trained on)",
    "limbmr": "limbs, MR slices (never trained on)",
    "ixi": "brain MR, slices",
    "ixi3d": "brain MR, volumes",
    "hippocampus3d": "hippocampus MR, volumes",
}
_BRIEF = ("px without affine at 256", "σ log det J", "diversity", "lost", "lost under random")


def brief(rows: Rows, published: Rows, rigid: Rows) -> str:
    """The tables in README and docs: the shipped networks at 12 steps, and the gates of every method.

    Args:
        rows: of ``gates.py``.
        published: of ``samplers.py``.
        rigid: of ``rigid_control.py``.
    """
    titles = [title for title in GATES if not title.startswith("found")]
    shipped = [(k, g) for k, g in _groups(rows) if k[1].startswith("anatomy") and k[4] == 12]
    parts = []
    for level in (0.6, 0.8):
        heads = ["images", "network", "n", "folds %", "px at 256 without affine", *_BRIEF[1:3], "Dice lost"]
        lines = [_header([*heads, "under random", "by resampling alone"])]
        for (domain, network, *_), group in shipped:
            chosen = [row for row in group if row["level"] == level]
            cells = [_estimate(values(chosen, column), COLUMNS[column][1]) for column in _BRIEF]
            folds = f"{values(chosen, 'corner folds %').mean():.4g}"
            alone = _estimate(np.array([v for row in rigid if (v := _moved(row, domain)) is not None]), 2)
            lines.append(_line([NAMES[domain], f"`{network}`", str(len(chosen)), folds, *cells, alone]))
        parts.append("\n".join(lines))
    lines = [_header(["images", "method", "steps", *titles])]
    for (domain, network, _, sampler, steps), group in _groups(_with_published(rows, published)):
        name = network if sampler == "random" else f"`{network}`" + f" {sampler}" * (sampler != "velocity")
        lines.append(_line([domain, name, str(steps or "–"), *(GATES[title](group) for title in titles)]))
    return "\n\n".join([*parts, "\n".join(lines)])


def _moved(row: dict[str, Any], domain: str) -> float | None:
    """Dice points lost in a row of ``rigid_control.py``; None if the row has another domain or no structure."""
    pairs = [(a, b) for a, b in zip(row["dice_real"], row["dice_moved"]) if None not in (a, b)]
    return 100 * float(np.mean([a - b for a, b in pairs])) if row["domain"] == domain and pairs else None


def _with_published(rows: Rows, published: Rows) -> Rows:
    """Add rows of ``samplers.py`` in the form of ``gates.py``; two rows of the same image are merged."""
    merged = {_identity(row): row for row in rows}
    for row in published:
        if row["sampler"] not in ("reference", "fast"):
            continue
        renamed = {**row, **PUBLISHED, "steps": row["passes"] // 2}
        renamed |= {"image": str(row["slice"]), "seed": row["slice"]}
        renamed["displacement_256"] = row["displacement_px"]
        renamed["displacement_no_affine_256"] = row["displacement_no_affine_px"]
        identity = _identity(renamed)
        merged[identity] = {**merged.get(identity, {}), **renamed}
    return list(merged.values())


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return (*(row[key] for key in GROUP), row["level"], row["image"], row["seed"])


def _groups(rows: Rows) -> list[tuple[tuple[Any, ...], Rows]]:
    found: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in GROUP), []).append(row)
    return sorted(found.items(), key=lambda item: item[0])


def _names(key: tuple[Any, ...]) -> list[str]:
    domain, network, sha256, sampler, steps = key
    return [domain, f"{network} `{sha256[:8]}`" if sha256 else network, sampler, str(steps)]


def _header(titles: Iterable[str]) -> str:
    titles = list(titles)
    return f"{_line(titles)}\n|{'---|' * len(titles)}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(numbers: np.ndarray, digits: int) -> str:
    return f"{numbers.mean():.{digits}f} ± {numbers.std():.{digits}f}" if numbers.size else "–"
