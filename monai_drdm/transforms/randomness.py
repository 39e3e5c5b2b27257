"""Random decisions: whether a transform fires, the seed, and the deformations that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from monai.transforms import RandomizableTransform
from monai.utils import TransformBackends
from torch import Tensor

from monai_drdm.deformation import Deformation, DeformationParams, FieldDrawer, stable_hash
from monai_drdm.deformation.record import check_record
from monai_drdm.transforms.tracing import TracedTransform

_SEEDS = 2**32

Decision = tuple[bool, int]
"""Whether a sample is deformed, and the seed of its field."""


class DRDMRandomness(RandomizableTransform, TracedTransform):
    """Decides whether to fire and with which seed, for all transforms that draw fields.

    Args:
        prob: chance that a sample is deformed.
        drawer: draws the fields.
    """

    drawer: FieldDrawer
    draws = True
    last: Any = None
    backend = [TransformBackends.TORCH]  # noqa: RUF012  # MONAI declares it so

    def __init__(self, prob: float, drawer: FieldDrawer) -> None:
        RandomizableTransform.__init__(self, checked_prob(prob))
        self.drawer = drawer
        self._decisions: list[Decision] = []

    def randomize(self, data: object = None) -> None:
        """Draw whether to fire, then one integer seed, in that order whether or not it fires.

        Args:
            data: a value whose hash takes the place of the random state; None: the state alone.

        Raises:
            TypeError: a value that has no hash that is the same in every process.
        """
        super().randomize(None)
        decision = bool(self._do_transform), int(self.R.randint(0, _SEEDS, dtype="uint64"))
        self._decisions = [decision if data is None else self._decided_by(data)]
        self._do_transform = self._decisions[0][0]

    def _decided_by(self, value: object) -> Decision:
        """The decision for a value. It does not depend on the transform's state, so threads may share the transform."""
        state = np.random.RandomState(stable_hash(value))
        return bool(state.rand() < self.prob), int(state.randint(0, _SEEDS, dtype="uint64"))

    def decide(self, seed_values: Sequence[object], randomize: bool) -> list[int | None]:
        """The seed of every sample that is deformed, None for every other one.

        Args:
            seed_values: one for each sample: a value whose hash takes the place of the random state, or None.
            randomize: False repeats the decisions of the last call.

        Raises:
            ValueError: nothing to repeat, or decisions of another number of samples.
        """
        decisions = self._decisions
        if randomize:
            decisions = []
            for value in seed_values:
                self.randomize(value)
                decisions.append(self._decisions[-1] if value is None else self._decided_by(value))
            self._decisions = decisions
        else:
            check_replay(len(decisions), len(seed_values))
        return [seed if fires else None for fires, seed in decisions]

    def draw_deformations(
        self,
        images: Sequence[Tensor],
        spacings: Sequence[Sequence[float]],
        seeds: Sequence[int | None],
    ) -> list[Deformation | None]:
        """Draw the field of every image ``(C, *S)`` that has a seed."""
        chosen = [i for i, seed in enumerate(seeds) if seed is not None]
        fields = self.drawer.draw_batch(
            [images[i] for i in chosen], [spacings[i] for i in chosen], [seed for seed in seeds if seed is not None]
        )
        return _spread(fields, chosen, len(images))

    def replay_deformations(
        self,
        images: Sequence[Tensor],
        spacings: Sequence[Sequence[float]],
        params: Sequence[DeformationParams | None],
    ) -> list[Deformation | None]:
        """The field of every image ``(C, *S)`` that has a record.

        Raises:
            TypeError: a record of another kind.
        """
        for one in (one for one in params if one is not None):
            check_record(one, DeformationParams)
        chosen = [i for i, one in enumerate(params) if one is not None]
        fields = self.drawer.replay_batch(
            [images[i] for i in chosen], [spacings[i] for i in chosen], [one for one in params if one is not None]
        )
        return _spread(fields, chosen, len(images))

    def __getstate__(self) -> dict[str, object]:
        """The state without the last field, which may be large."""
        state: dict[str, object] = super().__getstate__()  # type: ignore[no-untyped-call]  # MONAI leaves it without types
        return {key: value for key, value in state.items() if key != "last"}


def _spread(fields: Sequence[Deformation], chosen: Sequence[int], count: int) -> list[Deformation | None]:
    """One entry for each of so many samples: the fields at the chosen ones, None at the others."""
    found: list[Deformation | None] = [None] * count
    for i, field in zip(chosen, fields):
        found[i] = field
    return found


def check_replay(drawn: int, count: int) -> None:
    """Check that the last draw can be repeated for this number of samples.

    Raises:
        ValueError: there was no draw, or one of another number of samples.
    """
    if not drawn:
        raise ValueError("randomize=False replays the last draw, and there is none yet. Call once with randomize=True.")
    if drawn != count:
        raise ValueError(f"randomize=False replays the last draw, of a batch of {drawn}; this one is of {count}.")


def checked_prob(prob: object, name: str = "prob") -> float:
    """A number in [0, 1].

    Raises:
        ValueError: it is not.
    """
    number: Any = prob if isinstance(prob, Real) else np.nan
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {prob!r}.")
    return float(number)
