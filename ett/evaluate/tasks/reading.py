"""Whether what is written in a picture is read: by words, by letters, and by how much there is to read."""

from __future__ import annotations

from typing import ClassVar

from ett.data.drawn_text import DrawnText
from ett.data.manifest import question_and_reference
from ett.data.sources import Source
from ett.evaluate.answer_measures import length_class, words_read
from ett.evaluate.base import Metric, Selection, Subject, Task, TaskResult
from ett.evaluate.greedy import greedy
from ett.evaluate.metrics import character_errors, normalized
from ett.evaluate.references import TEXT, manifest_states, references
from ett.types import Example


class ReadingTask(Task):
    """Greedy answers to the examples whose reference is what is written in the picture.

    Metrics; case, white space, a final period and the spaces of a spelled reference make no difference:
        reading_word_accuracy: words of the references that the answers hold in their order, by words of the references.
        reading_character_error_rate: edits by characters of the references, over all examples together.
        reading_character_error_rate_<1_to_2 ...>: the same by the reference's length in characters.
    """

    name: ClassVar[str] = "reading"
    needs_language_model: ClassVar[bool] = True

    def suits(self, source: Source) -> bool:
        return source.name == DrawnText.name or manifest_states(source, TEXT)

    def run(self, subject: Subject, data: Selection) -> TaskResult:
        said = greedy(subject, data, f"{data.name} {self.name}", _written)
        if not said:
            return TaskResult()
        read = [words_read(text, written) for written, text in said]
        errors = [character_errors(text, written) for written, text in said]
        by_length: dict[str, list[tuple[int, int]]] = {"": errors}
        for edits, length in sorted(errors, key=lambda pair: pair[1]):
            by_length.setdefault(f"_{length_class(length)}", []).append((edits, length))
        metrics = {"reading_word_accuracy": Metric.mean([there for there, _ in read], [words for _, words in read])}
        for suffix, pairs in by_length.items():
            metrics[f"reading_character_error_rate{suffix}"] = Metric.mean(*zip(*pairs, strict=True))
        return TaskResult(metrics)


def _written(example: Example) -> str | None:
    """The reference, where it is the "text" of the metadata, spelled or not; without such a text, any reference."""
    text, reference = example.metadata.get(TEXT), question_and_reference(example)[1]
    if not isinstance(text, str):
        found = references(example, TEXT)
        return None if found is None else found[0]
    same = reference is not None and _letters(reference) == _letters(text)
    return reference if same else None


def _letters(text: str) -> str:
    return normalized(text).replace(" ", "")
