"""All judges of drawings together, and their figures as a comparison of models takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ett.config import require
from ett.data.artwork import SPLITS, ArtworkNames
from ett.data.drawing import PROMPT as WHOLE_ANSWER
from ett.data.drawing import prompt_of
from ett.data.sources import Source
from ett.errors import DataError, ModelError, unknown
from ett.evaluate.base import Metric
from ett.evaluate.drawing_judges import CHOICES, PROMPT, TOPS, Judged, judge_drawings
from ett.evaluate.drawing_rows import DRAWN, RECONSTRUCTED, JudgedSet
from ett.evaluate.drawing_scenes import OVERALL, judge_scenes, scenes_source
from ett.evaluate.drawing_words import WORDS_PROMPT, judge_words, words_source
from ett.evaluate.reading import Reader
from ett.losses import perceptual
from ett.model.ett import EttForConditionalGeneration
from ett.model.image_sampling import ImageSampling
from ett.model.processing import EttProcessor
from ett.types import Example

JudgeName = Literal["names", "words", "scenes"]
JUDGES: tuple[JudgeName, ...] = get_args(JudgeName)
NUM_WORDS, NUM_SCENES = 128, 240
"""Pictures asked for where no limit is given; of names all."""
_DRAWN_SPLITS = {"validation": ("validation", "validation")}
_FINAL = ("word", "heldout")
"""Splits of words and scenes that go with a split of names: validation, or for final figures."""


@dataclass(frozen=True)
class DrawingsConfig:
    """What is drawn for the judges, and which of them see it.

    Attributes:
        judges: "names" (EfficientNet-Lite0), "words" (RapidOCR), "scenes" (nothing trained).
        split: of the built-in pictures whose names are drawn; with "validation" go the validation splits of drawn text and
            scenes, with others their held-out ones.
        limit: pictures that each judge asks for, >= 1 (of names >= 2); null asks for every name, 128 words and 240 scenes.
        prompt: of names.
        seed: of every drawing. sampling: of its tokens.
    """

    judges: tuple[JudgeName, ...] = JUDGES
    split: str = "validation"
    limit: int | None = None
    prompt: str = PROMPT
    seed: int = 0
    sampling: ImageSampling = ImageSampling()

    def __post_init__(self) -> None:
        require(len(self.judges) >= 1, "judges", self.judges, f"some of {', '.join(JUDGES)}")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1, or null")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass(frozen=True)
class DrawingReport:
    """What the judges say.

    Attributes:
        names: None where that judge was not asked or is not there. sets: what the others say.
        notes: judges that are not there, and how to get them.
    """

    names: Judged | None
    sets: Sequence[JudgedSet]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values; those of names at the top."""
        names = {} if self.names is None else self.names.to_json()
        return {**names, **{each.judge: each.to_json() for each in self.sets}, "notes": list(self.notes)}

    def metrics(self) -> dict[str, Metric]:
        """Figures of drawings, and of what the tokenizer leaves of the real pictures ("..._of_reconstructions"), by source:
        "names.drawn_choice", "drawn_text.drawn_words_read", "drawn_scenes.<tag>.drawn_scenes_right" and so on."""
        found: dict[str, Metric] = {}
        for who, ending in ((DRAWN, ""), (RECONSTRUCTED, "_of_reconstructions")):
            if self.names is not None:
                row = self.names.rows[who]
                found |= {f"names.drawn_top{top}{ending}": row[f"retrieval_top{top}"] for top in TOPS}
                found[f"names.drawn_choice{ending}"] = row[f"choice_of_{CHOICES}"]
                found |= {f"names.drawn_{name}{ending}": row[name] for name in ("frechet_distance", "kernel_distance")}
            for each in self.sets:
                found |= _set_metrics(each.judge, each.rows[who], ending)
        return found


def judge_all(
    model: EttForConditionalGeneration,
    processor: EttProcessor,
    config: DrawingsConfig = DrawingsConfig(),
    *,
    batch_size: int = 16,
    on_token: Callable[[int], object] | None = None,
) -> DrawingReport:
    """Draw and ask every judge of `config` that is there; one whose package is missing is noted, and the others go on.

    Raises:
        DataError: an unknown split. ModelError: none of the judges is there; otherwise as `draw`.
    """
    words_split, scenes_split = _splits(config)
    notes: list[str] = []
    network = _there(perceptual.load_lite0, notes) if "names" in config.judges else None
    reader = _there(Reader, notes) if "words" in config.judges else None
    if network is None and reader is None and "scenes" not in config.judges:
        raise ModelError(" ".join(["No judge of drawings is there.", *notes]))
    names, sets = None, list[JudgedSet]()
    common: dict[str, Any] = {
        "seed": config.seed,
        "sampling": config.sampling,
        "batch_size": batch_size,
        "on_token": on_token,
    }
    if network is not None:
        network = network.to(model.vision_tokenizer.encoder_output.device)
        names = judge_drawings(
            model, processor, network, config.split, prompt=config.prompt, limit=config.limit, **common
        )
    if reader is not None:
        sets.append(judge_words(model, processor, reader, words_split, limit=config.limit or NUM_WORDS, **common))
    if "scenes" in config.judges:
        sets.append(judge_scenes(model, processor, scenes_split, limit=config.limit or NUM_SCENES, **common))
    return DrawingReport(names, sets, notes)


def asked_examples(config: DrawingsConfig, side: int, count: int) -> list[tuple[str, Example]]:
    """`count` of the pictures that the judges of `config` ask for, with their prompts, the judges in turn.

    Args:
        side: of pictures that are drawn here [pixels].

    Raises:
        DataError: an unknown split.
    """
    words_split, scenes_split = _splits(config)
    sources: dict[JudgeName, tuple[Source, str]] = {
        "names": (ArtworkNames(config.split), config.prompt),
        "words": (words_source(words_split, side), WORDS_PROMPT),
        "scenes": (scenes_source(scenes_split, side), WHOLE_ANSWER),
    }
    found = []
    for i in range(count):
        source, prompt = sources[config.judges[i % len(config.judges)]]
        # spread over the source, never the same place twice
        example = source[(2 * i + 1) * len(source) // (2 * count)]
        found.append((prompt_of(example, prompt), example))
    return found


def _splits(config: DrawingsConfig) -> tuple[str, str]:
    """(split of words, split of scenes)."""
    if config.split not in SPLITS:
        raise DataError(unknown("split of the built-in artwork", config.split, SPLITS))
    return _DRAWN_SPLITS.get(config.split, _FINAL)


def _there(load: Callable[[], Any], notes: list[str]) -> Any:
    """A judge, or None with a note where its package is missing."""
    try:
        return load()
    except ModelError as error:
        notes.append(str(error))
        return None


def _set_metrics(judge: str, row: Mapping[str, Metric], ending: str) -> dict[str, Metric]:
    if judge == "words":
        return {f"drawn_text.drawn_{name}{ending}": metric for name, metric in row.items()}
    # the whole is pooled from the categories
    return {f"drawn_scenes.{tag}.drawn_scenes_right{ending}": metric for tag, metric in row.items() if tag != OVERALL}
