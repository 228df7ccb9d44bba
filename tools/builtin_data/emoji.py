"""The names and facts of emoji, from emojibase and CLDR: what every picture is a picture of."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from builtin_data.sources import EMOJIBASE, Package

_JOINER, _SELECTOR, _KEYCAP = "200d", "fe0f", "20e3"
_PERSONS = {"1f468", "1f469", "1f9d1", "1f471", "1f9d4"}
"""Man, woman, person; the one with blond hair, the one with a beard."""
_CHILDREN = {"1f466", "1f467", "1f9d2"}
_DROPPED = {_JOINER, _SELECTOR, "2640", "2642", "27a1", "1f9b0", "1f9b1", "1f9b2", "1f9b3"}
"""Inside a sequence: gender signs, facing right, hair."""
_SAME: Mapping[str, str] = {
    code: name
    for name, codes in {
        "older": ("1f474", "1f475", "1f9d3"),
        "royal": ("1f934", "1f478", "1fac5"),
        "claus": ("1f385", "1f936", "person+1f384"),
        "dancing": ("1f483", "1f57a"),
        "pregnant": ("1f930", "1fac3", "1fac4"),
        "feeding": ("1f931", "person+1f37c"),
        "holding hands": ("1f46b", "1f46c", "1f46d", "person+1f91d+person"),
        "kiss": ("1f48f", "person+2764+1f48b+person"),
        "couple": ("1f491", "person+2764+person"),
        "gender sign": ("2640", "2642"),
        "rest room": ("1f6b9", "1f6ba"),
    }.items()
    for code in codes
}
"""Gender variants that are not spelled as sequences."""

_DIRECTION = re.compile(r"\b(?:(?:up|down)(?:-(?:left|right))?|left|right)(?=\b|wards)")
COLOURS = (
    "light blue", "red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "grey", "pink",
)  # fmt: skip
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Emoji:
    """One emoji without skin tone.

    Attributes:
        code: code points in lower-case hexadecimal joined by "-", without fe0f.
        name: the CLDR short name.
        group, subgroup: emojibase's English words for them.
        tags: CLDR keywords.
        gender: "female", "male" or None.
        concept: name of the base concept: what is left without gender, hair, family and direction variants.
        facts: answers that the name really holds, by kind: flag, time, direction, colour, written.
        order: position in Unicode's order.
    """

    code: str
    name: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    gender: str | None
    concept: str
    facts: Mapping[str, str]
    order: int


def plain_code(hexcode: str) -> str:
    """``1F3CC-FE0F-200D-2642-FE0F`` -> ``1f3cc-200d-2642``."""
    return "-".join(part for part in hexcode.lower().split("-") if part != _SELECTOR)


def base_code(code: str) -> str:
    """What the gender, hair, family and facing variants of `code` share."""
    parts = code.split("-")
    if len(parts) > 1:
        parts = [part for part in parts if part not in _DROPPED] or parts
    if {"1f46a"} == set(parts) or (len(parts) > 1 and set(parts) <= _PERSONS | _CHILDREN):
        return "family"
    kinds = ["person" if part in _PERSONS else "child" if part in _CHILDREN else part for part in parts]
    joined = "+".join(kinds)
    return _SAME.get(joined, joined)


def _turned(name: str) -> str:
    """`name` with its direction taken out: the same for things that only point elsewhere."""
    return _DIRECTION.sub("*", name)


def _facts(name: str, subgroup: str) -> dict[str, str]:
    """Answers that stand in the name itself; nothing is guessed from the picture."""
    facts = {}
    if subgroup == "country-flag":
        facts["flag"] = name.removeprefix("flag: ")
    if time := re.fullmatch(rf"({'|'.join(_NUMBERS)})(?: o\u2019clock|-(thirty))", name):
        facts["time"] = f"{_NUMBERS.index(time[1]) + 1}:{'30' if time[2] else '00'}"
    if direction := _direction(name):
        facts["direction"] = direction
    if colour := _colour(name):
        facts["colour"] = colour
    if written := _written(name):
        facts["written"] = written
    return facts


def _direction(name: str) -> str | None:
    """Where the thing points or faces, for the forms of name that say so."""
    way = r"(up|down|left|right|(?:up|down)-(?:left|right))"
    forms = (
        rf"{way} arrow",
        rf".*\bpoint(?:ing|ed) {way}",
        rf".*: facing {way}",
        rf"{way}-facing fist",
        rf"{way}wards (?:pushing )?hand",
        rf"{way}wards button",
        rf"thumbs {way}",
        rf"magnifying glass tilted {way}",
    )
    for form in forms:
        if match := re.fullmatch(form, name):
            return match[1]
    return None


def _colour(name: str) -> str | None:
    """The colour in the name where it is the colour of the whole thing."""
    # Canes, dragon tiles, flowers and salads are mostly of another colour; "hollow" and "square button" are of two.
    if re.search(r"\bcane\b|dragon|flower|salad|hollow|square button|leafy|person: |man: ", name):
        return None
    match = re.match(rf"(?:large |small )?({'|'.join(COLOURS)}) \w", name)
    return match[1] if match else None


def _written(name: str) -> str | None:
    """The characters on a button, key or sign that the name quotes."""
    if match := re.fullmatch(r"keycap: (.+)", name):
        return match[1]
    if match := re.fullmatch(r"([A-Z]+!?) (?:button(?: \(blood type\))?|arrow|sign)", name):
        return match[1]
    return None


def load(folder: Path) -> list[Emoji]:
    """Every emoji but components (skin tones, hair) and lone regional letters, in Unicode's order."""
    with Package(folder, EMOJIBASE) as package:
        data = package.json("en/data.json")
        messages = package.json("en/messages.json")
        groups = package.json("meta/groups.json")
    words = {kind: {entry["key"]: entry["message"] for entry in messages[kind]} for kind in ("groups", "subgroups")}
    kept = [
        entry for entry in data if "group" in entry and groups["groups"][str(entry["group"])] not in ("component", "")
    ]
    kept.sort(key=lambda entry: entry["order"])
    concepts = _concepts([(plain_code(entry["hexcode"]), entry["label"]) for entry in kept])
    emojis = []
    for entry in kept:
        code = plain_code(entry["hexcode"])
        subgroup = groups["subgroups"][str(entry["subgroup"])]
        emojis.append(
            Emoji(
                code=code,
                name=entry["label"],
                group=words["groups"][groups["groups"][str(entry["group"])]],
                subgroup=words["subgroups"][subgroup],
                tags=tuple(entry.get("tags", ())),
                gender={0: "female", 1: "male"}.get(entry.get("gender")),
                concept=concepts[code],
                facts=_facts(entry["label"], subgroup),
                order=entry["order"],
            )
        )
    return emojis


def _concepts(named: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Code -> name of its base concept: the first member's name, a neutral one before the gendered ones."""
    by_base: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    turned: dict[str, str] = {}
    for code, name in named:
        base = turned.setdefault(_turned(name), base_code(code)) if "*" in _turned(name) else base_code(code)
        by_base[base].append((code, name))
    concepts = {}
    for members in by_base.values():
        neutral = [
            name for code, name in members if not {"2640", "2642", "27a1", "1f468", "1f469"} & set(code.split("-"))
        ]
        for code, _ in members:
            concepts[code] = (neutral or [members[0][1]])[0]
    return concepts
