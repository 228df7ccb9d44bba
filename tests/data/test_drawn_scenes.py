"""Scenes of shapes: the same picture for the same seed, prompts in GenEval's form, splits that share none, layouts as asked."""

from __future__ import annotations

import math
import re
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from ett.data.drawing import is_drawing
from ett.data.drawn_scenes import COLOURS, COUNTS, POSITIONS, SHAPES, SPLITS, TAGS, DrawnScenes, Thing, coverage, paint
from ett.data.mixture import SourceConfig
from ett.errors import DataError, RecipeError
from ett.evaluate.sources import builtin_sources, named_sources

WORDING = {
    "single_object": r"a (?P<one>\w+)",
    "two_object": r"a (?P<one>\w+) and a (?P<other>\w+)",
    "counting": r"(?P<count>two|three|four) (?P<many>\w+)",
    "colors": r"an? (?P<colour>\w+) (?P<one>\w+)",
    "position": r"a (?P<one>\w+) (?P<where>left of|right of|above|below) a (?P<other>\w+)",
    "color_attr": r"an? (?P<colour>\w+) (?P<one>\w+) and an? (?P<second>\w+) (?P<other>\w+)",
}


def line(tag: str, found: dict[str, str]) -> dict[str, Any]:
    """GenEval's metadata of a prompt, from its words."""
    one: dict[str, Any] = {"class": found.get("one"), "count": 1}
    other: dict[str, Any] = {"class": found.get("other"), "count": 1}
    if tag == "counting":
        shape = next(shape for shape in SHAPES if found["many"] in (f"{shape}s", f"{shape}es"))
        count = {"two": 2, "three": 3, "four": 4}[found["count"]]
        include, exclude = [{"class": shape, "count": count}], [{"class": shape, "count": count + 1}]
        return {"tag": tag, "include": include, "exclude": exclude}
    if tag == "position":
        return {"tag": tag, "include": [other, {**one, "position": [found["where"], 0]}]}
    if tag == "color_attr":
        return {"tag": tag, "include": [{**one, "color": found["colour"]}, {**other, "color": found["second"]}]}
    if tag == "colors":
        return {"tag": tag, "include": [{**one, "color": found["colour"]}]}
    return {"tag": tag, "include": [one, other] if tag == "two_object" else [one]}


def test_prompts_are_geneval_s() -> None:
    source, seen = DrawnScenes(length=600), dict.fromkeys(TAGS, 0)
    for index in range(600):
        facts = source.facts(index)
        found = re.fullmatch(f"a photo of {WORDING[facts['tag']]}", facts["prompt"])
        assert found is not None, facts
        assert facts == {**line(facts["tag"], found.groupdict()), "prompt": facts["prompt"]}
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", facts["prompt"])
        seen[facts["tag"]] += 1
    assert min(seen.values()) > 60


def test_splits_share_no_prompts_where_there_are_many() -> None:
    prompts = {
        split: {tag: {f["prompt"] for f in map(source.facts, range(1200)) if f["tag"] == tag} for tag in TAGS}
        for split in SPLITS
        for source in [DrawnScenes(split, length=1200)]
    }
    for one, other in combinations(SPLITS, 2):
        for tag in TAGS:
            shared = prompts[one][tag] & prompts[other][tag]
            assert bool(shared) == (tag in ("single_object", "counting")), (one, other, tag)
    assert all(prompts[split][tag] for split in SPLITS for tag in TAGS)


def test_pictures_depend_on_settings_seed_and_index_alone() -> None:
    first, again = DrawnScenes("validation"), DrawnScenes("validation", length=3)
    assert first[2].images[0].tobytes() == again[2].images[0].tobytes()
    assert first[2].metadata == again[2].metadata
    assert first[2].id == "drawn-scenes/validation/0/2"
    different = {DrawnScenes(split, seed=seed)[0].images[0].tobytes() for split in SPLITS for seed in (0, 1)}
    assert len(different) == 6
    assert first[0].images[0].size == (64, 64)
    assert DrawnScenes(size=40)[0].images[0].size == (40, 40)


def test_layouts_fulfil_their_prompts() -> None:
    source = DrawnScenes(length=80)
    for example in source:
        things, facts = example.metadata["things"], example.metadata
        wanted = [each["class"] for each in facts["include"] for _ in range(each["count"])]
        assert [shape for shape, *_ in things] == wanted
        for each, (_, colour, *_) in zip(facts["include"], things, strict=False):
            assert colour == each.get("color", colour)
        for (_, _, x, y, r), (_, _, u, v, s) in combinations(things, 2):
            assert math.dist((x, y), (u, v)) >= r + s + 0.08
        assert all(r < x < 1 - r and r < y < 1 - r for _, _, x, y, r in things)
        if facts["tag"] == "position":
            (_, _, x, y, _), (_, _, u, v, _) = things
            across, down = POSITIONS[facts["include"][1]["position"][0]]
            assert (u - x) * across + (v - y) * down > 0.3
    assert set(COUNTS) == {2, 3, 4}


def test_shapes_are_painted_where_they_stand() -> None:
    for shape, area in (("circle", math.pi), ("ring", math.pi * (1 - 0.55**2)), ("square", 1.96)):
        cover = coverage(shape, (20.0, 30.0), 9.0, 48)
        assert cover.sum() == pytest.approx(area * 81, rel=0.02)
        ys, xs = (np.indices(cover.shape) + 0.5) * cover / cover.sum()
        assert (xs.sum(), ys.sum()) == (pytest.approx(20, abs=0.1), pytest.approx(30, abs=0.1))
    picture = np.asarray(paint([Thing("square", "blue", (0.5, 0.5), 0.3)], 40))
    assert tuple(picture[20, 20]) == COLOURS["blue"]
    assert tuple(picture[1, 1]) == (255, 255, 255)


def test_a_source_of_recipes_and_evaluations() -> None:
    config = SourceConfig(source="drawn_scenes", size=32, draws=True)
    example = config.build()[5]
    assert is_drawing(example)
    assert example.messages[0]["content"] == [{"type": "text", "text": example.metadata["prompt"]}]
    (name, held_out), *rest = builtin_sources("heldout", [config])
    assert (name, held_out[0].metadata["split"], rest) == ("drawn_scenes.heldout", "heldout", [])
    assert [name for name, _ in builtin_sources("validation", [config])] == ["drawn_scenes"]
    assert [name for name, _ in named_sources(["drawn_scenes"])] == ["drawn_scenes"]


def test_short_questions_are_about_what_is_shown() -> None:
    """Every question, answered from the things as they were drawn."""
    source, seen = DrawnScenes(short_answers=True, length=400), dict.fromkeys(TAGS, 0)
    for example in source:
        question = example.messages[0]["content"][1]["text"]
        answer = example.messages[1]["content"][0]["text"]
        things = {shape: (colour, x, y) for shape, colour, x, y, _ in example.metadata["things"]}
        tag = example.metadata["question_kind"]
        seen[tag] += 1
        asked = next((shape for shape in SHAPES if re.search(rf"\b{shape}(e?s)?\b", question)), None)
        if tag == "single_object":
            assert [answer] == list(things)
        elif tag == "counting":
            assert COUNTS[len(example.metadata["things"])] == answer
            assert asked in things
        elif tag == "two_object":
            assert things.keys() == {asked, answer}
        elif tag == "position":
            where, other = answer.split(" the ")
            across, down = POSITIONS[where]
            assert asked is not None
            (_, x, y), (_, u, v) = things[asked], things[other]
            assert (x - u) * across + (y - v) * down > 0.3
        else:
            assert asked is not None
            assert things[asked][0] == answer
    assert min(seen.values()) > 30
    plain = DrawnScenes(length=400)
    assert plain[7].metadata["things"] == source[7].metadata["things"]
    assert (plain.name, source.name) == ("drawn-scenes", "scene-questions")


def test_short_answers_are_of_scenes_that_are_read() -> None:
    asked = SourceConfig(source="drawn_scenes", size=32, short_answers=True).build()[3]
    assert asked.messages[1]["content"][0]["text"] != asked.metadata["prompt"]
    for given in ({"source": "names"}, {"source": "drawn_scenes", "draws": True}):
        with pytest.raises(RecipeError, match="short_answers is for drawn_scenes and drawn_text that are read"):
            SourceConfig(**given, short_answers=True)
    with pytest.raises(RecipeError, match=r"leave asked at 1, not 0\.5"):
        SourceConfig(source="drawn_scenes", short_answers=True, asked=0.5)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"split": "test"}, "split of drawn scenes"), ({"size": 31}, "at least 32"), ({"length": 0}, "at least 1")],
)
def test_what_cannot_be_drawn_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        DrawnScenes(**given)
    with pytest.raises(IndexError):
        DrawnScenes(length=1).facts(1)
