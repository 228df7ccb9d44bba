"""GenEval's six categories in miniature: drawings of scenes of shapes before a judge that was never trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ett.data.drawing import PROMPT
from ett.data.drawn_scenes import SHAPES, TAGS, DrawnScenes
from ett.errors import DataError, UserError
from ett.evaluate.base import Metric
from ett.evaluate.drawing_rows import REAL, JudgedSet, shown_pictures
from ett.evaluate.run import save_text
from ett.evaluate.scene_vision import Seen, see, shows
from ett.images import load_image
from ett.model.ett import EttForConditionalGeneration
from ett.model.image_sampling import ImageSampling
from ett.model.processing import EttProcessor

OVERALL = "scenes_right"
"""The metric over all categories; the others have the categories' names."""
_FINISH = "Finish the folder with the `ett t2i geneval` that began it: it goes on where it was stopped."


def judge_scenes(
    model: EttForConditionalGeneration,
    processor: EttProcessor,
    split: str = "validation",
    *,
    limit: int = 240,
    seed: int = 0,
    sampling: ImageSampling = ImageSampling(),
    batch_size: int = 16,
    on_token: Callable[[int], object] | None = None,
) -> JudgedSet:
    """Draw the first `limit` prompts of a split of ``ett.data.drawn_scenes``, once each, and look whether they were fulfilled.

    Metrics: `OVERALL` and each of `TAGS` that was asked for, the share of pictures that fulfil their prompts. Their chance is
    the share of the other prompts' real pictures that would do as well.

    Args:
        seed: of every drawing.

    Raises:
        DataError: an unknown split. ModelError: as `draw`.
    """
    source = scenes_source(split, min(processor.image_processor.height, processor.image_processor.width))
    examples = [source[index] for index in range(min(limit, len(source)))]
    facts = [example.metadata for example in examples]
    shown = shown_pictures(
        model, processor, examples, PROMPT, seed=seed, sampling=sampling, batch_size=batch_size, on_token=on_token
    )
    seen = {who: [see(picture) for picture in pictures] for who, pictures in shown.items()}
    rows = {who: scene_metrics(each, facts) for who, each in seen.items()}
    return JudgedSet("scenes", split, rows, _chance(seen[REAL], facts))


def scenes_source(split: str, side: int) -> DrawnScenes:
    """The scenes that are asked for, in pictures of `side` pixels, but of 32 at least."""
    return DrawnScenes(split, size=max(32, side))


def scene_metrics(seen: Sequence[Sequence[Seen]], facts: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    """`OVERALL`, and by tag, the share of pictures that show what the line of GenEval's file asks for."""
    right = [float(shows(each, asked)) for each, asked in zip(seen, facts, strict=True)]
    return {name: Metric.mean([right[i] for i in chosen]) for name, chosen in _groups(facts).items()}


def judge_scene_folder(folder: Path) -> dict[str, Metric]:
    """`scene_metrics` of a folder in GenEval's layout whose prompts are those of `write_prompts`.

    Raises:
        DataError: it holds no such pictures, not as many of each prompt, or a file that cannot be read.
    """
    _check_complete(folder)
    seen, facts = [], []
    for place in sorted(folder.glob("*/metadata.jsonl")):
        try:
            asked = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{place} cannot be read: {error}.") from error
        if not _asks_for_shapes(asked):
            raise DataError(
                f"{place} asks for no scene of shapes, which is all that this judge can see: {', '.join(SHAPES)}."
            )
        pictures = sorted((place.parent / "samples").glob("*.png"))
        seen += [see(load_image(path)) for path in pictures]
        facts += [asked] * len(pictures)
    if not seen:
        raise DataError(
            f"{folder} holds no pictures in GenEval's layout. Draw them: ett t2i geneval MODEL --out {folder}"
        )
    return scene_metrics(seen, facts)


def write_prompts(path: Path, split: str, num: int, *, overwrite: bool = False) -> int:
    """Write the first `num` different prompts of a split as GenEval's ``evaluation_metadata.jsonl``; returns how many they are.

    Raises:
        UserError: an unknown split, or a file that is there and not to be overwritten, or that cannot be written.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already. Choose another file, or replace it with --overwrite.")
    source, lines = DrawnScenes(split), dict[str, None]()
    for index in range(len(source)):
        if len(lines) == num:
            break
        lines[json.dumps(source.facts(index))] = None
    save_text(path, "".join(f"{line}\n" for line in lines))
    return len(lines)


def _check_complete(folder: Path) -> None:
    """Every prompt's folder has its line and as many pictures as the others: one that was begun would be judged in part."""
    places = sorted(path for path in folder.glob("*") if path.is_dir() and path.name.isdecimal())
    counts = {place: len(list((place / "samples").glob("*.png"))) for place in places}
    whole = max(counts.values(), default=0)
    for place, count in counts.items():
        if whole > 0 and not (place / "metadata.jsonl").is_file():
            raise DataError(f"{place} has no metadata.jsonl, so nobody knows what was asked for. {_FINISH}")
        if count < whole:
            raise DataError(
                f"{place / 'samples'} holds {count} pictures, and other prompts' folders {whole}. {_FINISH}"
            )


def _asks_for_shapes(asked: object) -> bool:
    """Whether this is a line that `write_prompts` may have written."""
    if not isinstance(asked, dict) or asked.get("tag") not in TAGS or not isinstance(asked.get("include"), list):
        return False
    return all(isinstance(each, dict) and each.get("class") in SHAPES and "count" in each for each in asked["include"])


def _groups(facts: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Metric -> the positions that it is taken over."""
    tags = {tag: [i for i, asked in enumerate(facts) if asked["tag"] == tag] for tag in TAGS}
    return {OVERALL: list(range(len(facts))), **{tag: found for tag, found in tags.items() if found}}


def _chance(real: Sequence[Sequence[Seen]], facts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By metric, the share of the pictures of other prompts that fulfil a prompt, mean over prompts."""
    passed = []
    for asked in facts:
        others = [each for each, of in zip(real, facts, strict=True) if of["prompt"] != asked["prompt"]]
        passed.append(sum(shows(each, asked) for each in others) / max(1, len(others)))
    return {name: sum(passed[i] for i in chosen) / len(chosen) for name, chosen in _groups(facts).items()}
