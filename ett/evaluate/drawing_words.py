"""Are drawn words legible? An OCR judge reads drawings of words, and real pictures of them before and after the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import PIL.Image

from ett.data.drawn_text import DrawnText
from ett.evaluate.base import Metric
from ett.evaluate.drawing_rows import JudgedSet, shown_pictures
from ett.evaluate.metrics import character_errors, normalized
from ett.evaluate.reading import Reader
from ett.model.ett import EttForConditionalGeneration
from ett.model.image_sampling import ImageSampling
from ett.model.processing import EttProcessor

WORDS_PROMPT = 'the text "{answer}"'
"""What asks for a picture of a text; recipes that teach it say the same."""
CHARACTERS = (3, 4)
"""Of the words: what the judge reads at 64 pixels, most of the time."""


def judge_words(
    model: EttForConditionalGeneration,
    processor: EttProcessor,
    reader: Reader,
    split: str = "validation",
    *,
    prompt: str = WORDS_PROMPT,
    limit: int = 128,
    seed: int = 0,
    sampling: ImageSampling = ImageSampling(),
    batch_size: int = 16,
    on_token: Callable[[int], object] | None = None,
) -> JudgedSet:
    """Draw the first `limit` words of a split of ``ett.data.drawn_text``, once each, and have them read.

    Metrics; case and white space make no difference:
        words_read: share of the pictures in which the judge reads the word and nothing else.
        reading_errors: edits from what it reads to the word, by characters of the words; a judge that reads nothing has 1.

    Args:
        reader: the judge. prompt: made of ``{answer}``, the word. seed: of every drawing.

    Raises:
        DataError: an unknown split. ModelError: as `draw`.
    """
    source = words_source(split, min(processor.image_processor.height, processor.image_processor.width))
    examples = [source[index] for index in range(min(limit, len(source)))]
    wanted = [str(example.metadata["text"]) for example in examples]
    shown = shown_pictures(
        model, processor, examples, prompt, seed=seed, sampling=sampling, batch_size=batch_size, on_token=on_token
    )
    return JudgedSet("words", split, {who: _read(reader, pictures, wanted) for who, pictures in shown.items()})


def words_source(split: str, side: int) -> DrawnText:
    """The words that are asked for, in pictures of `side` pixels, but of 32 at least."""
    return DrawnText(split, size=max(32, side), difficulty=0.0, kinds=("word",), characters=CHARACTERS)


def _read(reader: Reader, pictures: Sequence[PIL.Image.Image], wanted: Sequence[str]) -> dict[str, Metric]:
    said = ["".join(reader.read(picture).split()) for picture in pictures]
    errors = [character_errors(each, word) for each, word in zip(said, wanted, strict=True)]
    right = [float(normalized(each) == normalized(word)) for each, word in zip(said, wanted, strict=True)]
    return {"words_read": Metric.mean(right), "reading_errors": Metric.mean(*zip(*errors, strict=True))}
