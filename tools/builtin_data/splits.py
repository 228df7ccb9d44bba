"""Which picture belongs to which split: fixed by hashes of names, never by position or chance.

style       all of `HELD_OUT_STYLE`, where the same name is in train in another style.
concept     CONCEPT_SHARE of the base concepts, in every other style. Their pictures in the held-out style are
            dropped: with them the figure would mix an unseen name with an unseen style.
pair        PAIR_SHARE of the (base concept, style family) units,
validation  VALIDATION_SHARE of them; both only where every name of the unit stays in train in another family.
train       the rest.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from builtin_data.artwork import Picture

HELD_OUT_STYLE = "emojione"
CONCEPT_SHARE, PAIR_SHARE, VALIDATION_SHARE = 0.07, 0.05, 0.05
# The prefix "concepts:" below was picked once, before anything was trained: with it no concept makes up more than 3% of
# the concept split (with "concept:" families were 9% of it) and most kinds of question occur there.


def share(unit: str) -> float:
    """A number in [0, 1) that depends on the text of `unit` alone."""
    return int.from_bytes(hashlib.sha256(unit.encode()).digest()[:8], "big") / 2**64


def assign(pictures: Sequence[Picture]) -> dict[str, list[Picture]]:
    """Split -> its pictures, in an order that mixes styles (by hash of the key)."""
    known = [p for p in pictures if p.style != HELD_OUT_STYLE]
    split_of: dict[str, str] = {}
    units: defaultdict[tuple[str, str], list[Picture]] = defaultdict(list)
    for picture in known:
        if share(f"concepts:{picture.emoji.concept}") < CONCEPT_SHARE:
            split_of[picture.key] = "concept"
        else:
            split_of[picture.key] = "train"
            units[picture.emoji.concept, picture.family].append(picture)
    in_train = Counter((p.emoji.code, p.family) for p in known if split_of[p.key] == "train")
    families = {family for _, family in units}

    for (concept, family), members in sorted(units.items()):
        drawn = share(f"unit:{concept}:{family}")
        if drawn >= PAIR_SHARE + VALIDATION_SHARE:
            continue
        others = families - {family}
        if not all(any(in_train[p.emoji.code, other] for other in others) for p in members):
            continue
        for picture in members:
            split_of[picture.key] = "pair" if drawn < PAIR_SHARE else "validation"
            in_train[picture.emoji.code, family] = 0

    trained = {code for (code, _), count in in_train.items() if count}
    for picture in pictures:
        if picture.style == HELD_OUT_STYLE and picture.emoji.code in trained:
            split_of[picture.key] = "style"
    splits: dict[str, list[Picture]] = {"train": [], "validation": [], "pair": [], "style": [], "concept": []}
    for picture in sorted(pictures, key=lambda p: hashlib.sha256(p.key.encode()).digest()):
        if picture.key in split_of:
            splits[split_of[picture.key]].append(picture)
    return splits
