"""The collator for other trainers: what it makes of examples and of mappings, and what it refuses."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ett.data.collate import EttCollator
from ett.data.manifest import Manifest
from ett.errors import DataError
from tests.model.test_ett import build, encoded, examples


def test_examples_and_mappings_make_the_same_batch(pictures: Path) -> None:
    _, processor = build()
    collator = EttCollator(processor)
    ours = encoded(processor)
    batch = collator(examples())
    assert torch.equal(batch["labels"], ours.labels)
    assert torch.equal(batch["pixel_values"], ours.pixel_values)
    as_mappings = collator([{"messages": each.messages, "images": each.images} for each in examples()])
    assert all(torch.equal(as_mappings[name], batch[name]) for name in batch)
    plain = {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "number 3"}]}
    path = str(pictures / "3.png")
    expected = collator([Manifest(pictures / "manifest.jsonl")[3]])
    for given in ({**plain, "image": path}, {**plain, "images": [path]}):
        found = collator([given])
        assert torch.equal(found["pixel_values"], expected["pixel_values"])
        assert processor.tokenizer.decode(found["labels"][found["labels"] >= 0]) == "number 3<|end|>"
    # as other trainers write conversations: parts where there is a picture, plain text elsewhere
    user = [{"type": "image"}, {"type": "text", "text": "Which?"}]
    mixed = [{"role": "user", "content": user}, {"role": "assistant", "content": "number 3"}]
    found = collator([{"messages": mixed, "image": path}])
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert collator([plain])["input_ids"].shape[1] < found["input_ids"].shape[1], "and without a picture"
    again = pickle.loads(pickle.dumps(collator))([{**plain, "image": path}])
    assert torch.equal(again["input_ids"], found["input_ids"]), "loaders send it to their workers"


def test_what_cannot_be_collated_is_named(pictures: Path) -> None:
    _, processor = build()
    turns: list[dict[str, Any]] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a long answer"}]
    picture = str(pictures / "3.png")
    cases: list[tuple[dict[str, Any], int | None, str]] = [
        ({}, None, "remove_unused_columns=False"),
        ({"label": 3}, None, "no messages, only label"),
        ({"messages": turns, "image": "missing.png"}, None, r"missing\.png"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [picture] * 2}, None, "brings 2"),
        ({"messages": turns, "image": picture, "id": "long"}, 17, "'long'.*max_length"),
    ]
    for item, max_length, message in cases:
        with pytest.raises(DataError, match=message):
            EttCollator(processor, max_length)([item])
