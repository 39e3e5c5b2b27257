"""Image files as a data set from which a bank is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai_drdm.io import Case, load_image


class CaseImages(Sequence[dict[str, Any]]):
    """The images of cases, with their names. Each is read when it is asked for."""

    def __init__(self, cases: Sequence[Case], *, keep_slice: bool = False) -> None:
        self.cases, self.keep_slice = cases, keep_slice

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: Any) -> Any:
        """A sample.

        Raises:
            ValueError: the image cannot be read.
        """
        case = self.cases[index]
        try:
            return {"image": load_image(case.image, keep_slice=self.keep_slice).data, "name": case.name}
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{case.name}: {error}") from error
