"""Pictures in several versions: what stays, what moves, and what is never mirrored."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest

from ett.data.mixture import SourceConfig
from ett.data.moved import SMALLEST, Moved
from ett.data.sources import Source, conversation
from ett.errors import DataError, RecipeError
from ett.types import Example


class _Squares(Source):
    """A red left half and a blue right half, without white."""

    name = "squares"

    def __init__(self, answer: str = "a flag", **facts: Any) -> None:
        self.answer, self.facts = answer, facts

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Example:
        pixels = np.zeros((40, 40, 3), dtype=np.uint8)
        pixels[:, :20, 0] = pixels[:, 20:, 2] = 200
        return Example(f"s/{index}", conversation(None, self.answer), (PIL.Image.fromarray(pixels),), dict(self.facts))


def mirrored(example: Example) -> bool:
    """Whether blue comes first."""
    pixels = np.asarray(example.images[0]).astype(int)
    red, blue = (
        ((pixels[:, :, 0] - pixels[:, :, 2]) > 100).nonzero()[1],
        ((pixels[:, :, 2] - pixels[:, :, 0]) > 100).nonzero()[1],
    )
    return bool(blue.mean() < red.mean())


def test_versions() -> None:
    plain, source = _Squares(), Moved(_Squares(), 40)
    assert len(source) == 120
    assert [source[i].images[0].tobytes() for i in range(3)] == [plain[i].images[0].tobytes() for i in range(3)]
    assert len({example.id for example in source}) == 120
    shares, corners = [], []
    for example in list(source)[3:]:
        assert example.messages == plain[0].messages
        shown = (np.asarray(example.images[0]) != 255).any(axis=2)
        assert shown.shape == (40, 40)
        rows, columns = shown.any(axis=1).nonzero()[0], shown.any(axis=0).nonzero()[0]
        assert (rows[-1] - rows[0], len(rows), len(columns)) == (columns[-1] - columns[0], len(columns), len(rows)), (
            "whole"
        )
        shares.append(len(rows) / 40)
        corners.append((rows[0], columns[0]))
    assert SMALLEST <= min(shares) < 0.8
    assert max(shares) > 0.95
    assert len(set(corners)) > 30
    assert 40 < sum(map(mirrored, source)) < 77
    assert source[60].images[0].tobytes() == Moved(_Squares(), 40)[60].images[0].tobytes()
    with pytest.raises(IndexError):
        source[120]
    with pytest.raises(DataError, match="at least 1 version"):
        Moved(plain, 0)


@pytest.mark.parametrize(
    "given", [{"direction": "left"}, {"flag": "NL"}, {"answer": "fist facing Left"}, {"written": "ok"}]
)
def test_what_has_a_side_is_never_mirrored(given: dict[str, Any]) -> None:
    assert not any(map(mirrored, Moved(_Squares(**given), 30)))


def test_in_a_recipe() -> None:
    once, often = SourceConfig(source="names"), SourceConfig(source="names", versions=3)
    assert len(often.build()) == 3 * len(once.build())
    assert len(often.with_split("validation")) == len(once.with_split("validation")), "what is measured comes once"
    with pytest.raises(RecipeError, match="versions are of names, not of drawn_text"):
        SourceConfig(source="drawn_text", versions=2)
    with pytest.raises(ValueError, match="versions = 0"):
        SourceConfig(source="names", versions=0)
