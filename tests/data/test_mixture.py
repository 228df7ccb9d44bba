"""What a recipe's sources become."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from ett.data.manifest import Manifest
from ett.data.mixture import MAX_BLOCK, Limited, Mixture, PartlyAsked, SourceConfig
from ett.data.sources import Source
from ett.errors import RecipeError
from ett.types import Example


def test_sources_ask_as_often_as_told() -> None:
    """Pictures and answers are the same whether a question stands between them or not."""
    asked = SourceConfig(source="drawn_text", size=64).build()
    partly = SourceConfig(source="drawn_text", size=64, asked=0.3).build()
    never = SourceConfig(source="drawn_text", size=64, asked=0.0).build()
    assert len(partly) == len(asked)
    with_question = 0
    for i in range(100):
        whole, part, bare = asked[i], partly[i], never[i]
        assert part.id == whole.id
        assert part.images[0].tobytes() == whole.images[0].tobytes()
        assert part.messages[-1] == whole.messages[-1] == bare.messages[-1]
        assert bare.messages[0] == {"role": "user", "content": [{"type": "image"}]}
        assert part.messages[0] in (whole.messages[0], bare.messages[0])
        with_question += part.messages[0] == whole.messages[0]
    assert 28 <= with_question <= 32
    with pytest.raises(ValueError, match="asked"):
        SourceConfig(source="names", asked=1.5)


def test_a_part_of_a_source_is_known_by_the_whole(tmp_path: Path) -> None:
    """Caches of codes tell changed data by it."""
    manifest = tmp_path / "mine.jsonl"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "ho"}]
    manifest.write_text((json.dumps({"conversations": turns}) + "\n") * 3, encoding="utf-8")
    source = Manifest(manifest)
    assert Limited(source, 2).fingerprint() == PartlyAsked(source, 0.5).fingerprint() == source.fingerprint() != ""


def test_every_block_holds_the_shares() -> None:
    sources = [SourceConfig(source="drawn_text", size=32, seed=seed).build() for seed in range(3)]
    mixture = Mixture(sources, [0.5, 0.3, 0.2], seed=4)
    for block in range(2):
        owners = [mixture.locate(draw)[0] for draw in range(1000 * block, 1000 * (block + 1))]
        assert [owners.count(k) for k in range(3)] == [500, 300, 200]
    assert [mixture.locate(draw) for draw in range(50)] == [
        Mixture(sources, [0.5, 0.3, 0.2], seed=4).locate(draw) for draw in range(50)
    ]


class Numbers(Source):
    def __init__(self, name: str, length: int) -> None:
        self.name, self._length = name, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        return Example(f"{self.name}{index}", (), ())


@pytest.mark.parametrize(
    ("weights", "block"), [([0.9999, 0.0001], 10_000), ([3.0] * 1500, 10_000), ([1, 2e-5], 100_000)]
)
def test_small_weights_are_neither_raised_nor_lost(weights: list[float], block: int) -> None:
    mixture = Mixture([Numbers(str(k), 7) for k in range(len(weights))], weights, seed=2)
    again = pickle.loads(pickle.dumps(mixture))
    owners = [mixture.locate(draw)[0] for draw in range(block)]
    for k in {0, 1, len(weights) - 1}:
        assert abs(owners.count(k) - weights[k] / sum(weights) * block) < 1
    assert [again.locate(draw) for draw in range(0, 2 * block, 997)] == [
        mixture.locate(draw) for draw in range(0, 2 * block, 997)
    ]
    taken = {mixture.locate(draw) for draw in range(block + 5)}
    drawn = mixture.drawn(block + 5)
    assert all(set(found.tolist()) == {i for source, i in taken if source == k} for k, found in enumerate(drawn[:3]))


def test_a_weight_too_small_to_be_drawn_is_refused() -> None:
    sources = [Numbers("much", 7), Numbers("little", 7)]
    with pytest.raises(RecipeError, match=rf"'little' has a share of 1e-06 .* at least 1/{MAX_BLOCK}"):
        Mixture(sources, [1.0, 1e-6], seed=0)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([1, 1, 1], [334, 333, 333]), ([0.5, 0.499, 0.001], [500, 499, 1]), ([5, 3, 2], [500, 300, 200])],
)
def test_the_order_of_draws_is_what_it_was(weights: list[float], counts: list[int]) -> None:
    """Runs that were started by an earlier version go on with the draws that they would have made."""
    sources = [Numbers(name, length) for name, length in (("a", 10), ("b", 700), ("c", 33))]
    mixture = Mixture(sources, weights, seed=4)
    walked = [0, 0, 0]
    for block in range(3):
        owners = np.repeat(np.arange(3), counts)
        np.random.default_rng([4, 0, block]).shuffle(owners)
        for position, source in enumerate(owners.tolist()):
            epoch, step = divmod(walked[source], len(sources[source]))
            index = np.random.default_rng([4, 1, source, epoch]).permutation(len(sources[source]))[step]
            assert mixture.locate(1000 * block + position) == (source, index)
            walked[source] += 1
