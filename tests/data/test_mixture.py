"""What a recipe's sources become."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ett.data.manifest import Manifest
from ett.data.mixture import Limited, Mixture, PartlyAsked, SourceConfig


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
