"""Tasks that judge what a model says, with the model's words put into its mouth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ett.cli import main
from ett.data.drawn_text import DrawnText
from ett.data.manifest import Manifest
from ett.data.mixture import SourceConfig
from ett.data.sources import conversation
from ett.errors import DataError, ModelError
from ett.evaluate import caption_measures
from ett.evaluate.base import Metric
from ett.evaluate.comparison import compare
from ett.evaluate.markdown import markdown
from ett.evaluate.metrics import bootstrap_interval
from ett.evaluate.report import evaluation_page
from ett.evaluate.run import Evaluation, evaluate
from ett.evaluate.sources import builtin_sources
from ett.evaluate.tasks import TASKS
from ett.evaluate.tasks.letters import INSTRUCTION, with_choices
from ett.types import Example
from tests.evaluate.conftest import Listed, Toy, picture


def asked(name: str, answer: str | None = None, question: str = "?", **metadata: Any) -> Example:
    turns = conversation(question, answer or "")
    return Example(name, turns if answer else turns[:1], [picture(0)], metadata)


@pytest.fixture
def run(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Evaluates the tasks of a model that says ``said[id]``; ``run.heard`` are the questions put to it."""

    def evaluated(examples: Sequence[Example], said: Mapping[str, str], *tasks: str) -> Evaluation:
        def answers(model: object, processor: object, batch: Sequence[Example], max_new_tokens: int) -> list[str]:
            evaluated.heard += batch  # type: ignore[attr-defined]
            return [said[example.id] for example in batch]

        for module in ("ett.evaluate.greedy", "ett.evaluate.tasks.letters"):
            monkeypatch.setattr(f"{module}.answers", answers)
        return evaluate(*toy, [("listed", Listed(examples))], tasks, batch_size=2)

    evaluated.heard = []  # type: ignore[attr-defined]
    return evaluated


def values(found: Evaluation) -> dict[str, float]:
    return {name: metric.value for name, metric in found.metrics.items()}


def test_vqa(run: Any) -> None:
    examples = [
        asked("votes", answers=["red"] * 2 + ["blue"] * 8),
        asked("either", answers=["a cat", "kitten"]),
        asked("reference", "Word"),
        asked("other", "A", choices=["x", "y"]),
        asked("unknown"),
    ]
    found = run(
        examples, {"votes": "Red", "either": "kitten.", "reference": "Ward", "other": "A", "unknown": "?"}, "vqa"
    )
    assert values(found) == {
        "vqa_accuracy": pytest.approx((0.6 + 1 + 0) / 3),
        "anls": pytest.approx((1 + 6 / 7 + 0.75) / 3),
    }
    assert [weight for _, weight in found.metrics["anls"].parts] == [1, 1, 1]
    assert [example.id for example in run.heard] == ["votes", "either", "reference"]


def test_tasks_share_what_was_said(run: Any) -> None:
    examples = [asked(str(i), "yes") for i in range(5)] + [asked("5", "maybe")]
    found = run(examples, {str(i): "yes" for i in range(6)}, "yes_no", "answers", "vqa", "reading")
    assert [example.id for example in run.heard] == list("012345")
    assert found.metrics["yes_no_accuracy"].num_examples == 5
    assert found.metrics["exact_match"].num_examples == 6
    assert [p.id for p in found.predictions] == list("012345")


def test_yes_no(run: Any) -> None:
    truth = ["yes", "yes", "yes", "no", "No.", "no", "a cat"]
    said = ["Yes.", "no", "perhaps", "yes", "No, there is not", "no", "yes"]
    examples = [asked(str(i), answer) for i, answer in enumerate(truth)]
    found = run(examples, {str(i): text for i, text in enumerate(said)}, "yes_no")
    # 1 true positive, 1 false positive, 2 false negatives of which one says neither, 2 true negatives
    assert values(found) == pytest.approx(
        {
            "yes_no_accuracy": 3 / 6,
            "yes_no_yes_ratio": 2 / 6,
            "yes_no_answered": 5 / 6,
            "yes_no_precision": 1 / 2,
            "yes_no_recall": 1 / 3,
            "yes_no_f1": 2 * 1 / (2 * 1 + 1 + 2),
        }
    )
    assert found.metrics["yes_no_recall"].num_examples == 3
    assert found.metrics["yes_no_precision"].interval is not None
    assert "yes_no_precision" not in found.to_json()["parts"]
    never = run(examples, dict.fromkeys("0123456", "no"), "yes_no").metrics
    assert "yes_no_precision" not in never
    assert never["yes_no_f1"].value == never["yes_no_recall"].value == 0.0


def test_pairs_whatever_was_said(run: Any) -> None:
    """Which figures have parts, and of how many examples, depends on the references alone."""
    examples = [asked(str(i), answer) for i, answer in enumerate(["yes", "no", "no"])]
    right, never = (
        run(examples, dict(zip("012", said, strict=True)), "yes_no").to_json()["parts"]
        for said in (["yes", "no", "no"], ["no", "no", "no"])
    )
    found = compare({"right": [right], "never": [never]}, "never")["right - never"]
    assert set(found) == {"yes_no_accuracy", "yes_no_yes_ratio", "yes_no_answered", "yes_no_recall", "yes_no_f1"}
    # resamples without the only "yes" have no F1; in all others it is 1 against 0
    assert (found["yes_no_f1"].value, found["yes_no_f1"].interval) == (1.0, (1.0, 1.0))
    assert found["yes_no_accuracy"].value == pytest.approx(1 / 3)


def test_resamples_without_weight_do_not_count() -> None:
    assert bootstrap_interval([2.0, 0.0, 0.0], [4.0, 0.0, 0.0]) == (0.5, 0.5)


def test_reading(run: Any) -> None:
    examples = [
        asked("word", "Fox", text="Fox"),
        asked("spelled", "c a t s", text="cats"),
        asked("line", "the quick brown fox", text="the quick brown fox"),
        asked("colour", "red", text="Fox"),
        asked("unsaid", "ox"),
        asked("picked", "A", choices=["x", "y"]),
    ]
    said = {"word": "fox.", "spelled": "c a p s", "line": "the brown fx", "unsaid": "", "colour": "red", "picked": "A"}
    found = run(examples, said, "reading")
    # edits: 0 of 3, 1 of 4, "quick " and "o" are 7 of 19, 2 of 2; words: 1 of 1, 0 of 1, 2 of 4, 0 of 1
    assert values(found) == pytest.approx(
        {
            "reading_word_accuracy": 3 / 7,
            "reading_character_error_rate": 10 / 28,
            "reading_character_error_rate_1_to_2": 1.0,
            "reading_character_error_rate_3_to_4": 1 / 7,
            "reading_character_error_rate_17_or_more": 7 / 19,
        }
    )
    assert found.metrics["reading_character_error_rate_3_to_4"].num_examples == 2


def test_captions(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [
        asked("cat", "never read", captions=["A cat on a mat.", "a cat"]),
        asked("dog", "a dog runs in the park"),
    ]
    found = run(examples, {"cat": "a cat on a mat", "dog": "the ox"}, "captions")
    assert set(found.metrics) == {"caption_cider_d", "caption_rouge_l", "caption_bleu_4"}
    # of the second, "the" is one of two words and one of six: 2 * (1/2) * (1/6) / (2/3)
    assert [total for total, _ in found.metrics["caption_rouge_l"].parts] == pytest.approx([1.0, 0.25])
    assert found.metrics["caption_cider_d"].parts[1][0] < found.metrics["caption_cider_d"].parts[0][0]
    assert found.metrics["caption_bleu_4"].parts == ()
    assert "caption_cider_d" not in run(examples[:1], {"cat": "a cat"}, "captions").metrics
    monkeypatch.setattr(caption_measures, "DISTRIBUTIONS", ("no-such-package",))
    with pytest.raises(ModelError, match="no-such-package"):
        run(examples, {}, "captions")


def test_choices(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [
        asked("best", "b", choices=["a", "b"]),
        asked("letter", "B.", choices=["x", "y", "z"]),
        asked("tie", "x", choices=["x", "y"]),
        asked("none", "b"),
    ]
    scores = iter([[-2.0, -1.0], [-1.0, -2.0, -3.0], [-1.0, -1.0]])
    heard: list[tuple[str, list[str]]] = []

    def scored(subject: object, example: Example, candidates: list[str]) -> torch.Tensor:
        heard.append((example.id, candidates))
        return torch.tensor(next(scores), dtype=torch.float64)

    monkeypatch.setattr("ett.evaluate.tasks.choices.score_answers", scored)
    found = evaluate(*toy, [("listed", Listed(examples))], ["choices"]).metrics
    assert heard == [("best", ["a", "b"]), ("letter", ["x", "y", "z"]), ("tie", ["x", "y"])]
    assert [total for total, _ in found["choice_accuracy"].parts] == [1, 0, 0]
    assert found["choice_chance"].value == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)


def test_choices_by_the_model_itself(toy: Toy) -> None:
    """The one right answer is the one that the loss task finds likeliest."""
    choices = ["cat", "a large dog", "ox"]
    nats = {
        choice: evaluate(*toy, [("x", Listed([asked("0", choice)]))], ["loss"]).metrics["caption_loss"].value
        for choice in choices
    }
    examples = [asked(choice, choice, choices=choices) for choice in choices]
    found = evaluate(*toy, [("x", Listed(examples))], ["choices"]).metrics["choice_accuracy"]
    assert [total for total, _ in found.parts] == [float(choice == min(nats, key=nats.get)) for choice in choices]  # type: ignore[arg-type]


def test_letters(run: Any) -> None:
    examples = [
        asked(name, "dog", choices=["cat", "dog"], question="Which?") for name in ("right", "words", "wrong", "mute")
    ]
    found = run(
        [*examples, asked("none", "dog")], {"right": "B", "words": "Dog.", "wrong": "(A)", "mute": "Why?"}, "letters"
    )
    assert values(found) == {"letter_accuracy": 0.5, "letter_answered": 0.75, "choice_chance": 0.5}
    assert [example.id for example in run.heard] == ["right", "words", "wrong", "mute"]
    content = run.heard[0].messages[0]["content"]
    assert content == [{"type": "image"}, {"type": "text", "text": f"Which?\nA. cat\nB. dog\n{INSTRUCTION}"}]
    assert examples[0].messages[0]["content"][1]["text"] == "Which?"


def test_choices_that_the_question_lists_are_not_listed_again() -> None:
    listed = asked("0", "B", question="Which?\n(A) cat (B) dog\nSay the letter.", choices=["cat", "dog"])
    assert with_choices(listed, ["cat", "dog"]) is listed
    half = asked("0", "B", question="A. cat or what?", choices=["cat", "dog"])
    assert with_choices(half, ["cat", "dog"]) is not half
    silent = Example("0", conversation(None, "B"), [picture(0)])
    assert with_choices(silent, ["cat", "dog"]).messages[0]["content"][1]["text"] == f"A. cat\nB. dog\n{INSTRUCTION}"


@pytest.mark.parametrize(
    ("example", "task", "message"),
    [
        (asked("e", answers="cat"), "vqa", "'e' has 'answers' = 'cat'. Give a list"),
        (asked("e", answers=[]), "vqa", "Give a list"),
        (asked("e", captions=["a", 1]), "captions", "Give a list"),
        (asked("e", "a", choices=["a"]), "choices", "2 to 26 different"),
        (asked("e", "a", choices=["a", "A."]), "letters", "2 to 26 different"),
        (asked("e", "C", choices=["a cat", "dog"]), "choices", r"'C', which is none of its choices.*\(A to B\)"),
        (asked("e", choices=["a cat", "dog"]), "letters", "none of its choices"),
    ],
)
def test_bad_metadata_are_named(run: Any, example: Example, task: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run([example], {"e": ""}, task)


def test_what_runs_unasked(tmp_path: Path) -> None:
    def suited(answer: str, **fields: Any) -> set[str]:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}]
        file.write_text(json.dumps({"conversations": turns, **fields}) + "\n")
        return {name for name, task in TASKS.items() if task.suits(Manifest(file))} - everywhere

    everywhere = {"loss", "answers", "reconstruction", "drift"}
    assert suited("a cat") == set()
    assert suited("Yes") == {"yes_no"}
    assert suited("a", answers=["a", "b"]) == {"vqa"}
    assert suited("a", choices=["a", "b"]) == {"choices", "letters"}
    assert suited("a", text="a") == {"reading"}
    assert suited("a", captions=["a"]) == {"captions"}
    own = {"names": {"naming"}, "questions": set(), "drawn_text": {"reading"}}
    for name, source in builtin_sources():
        assert {task.name for task in TASKS.values() if task.suits(source)} - everywhere == own[name]


def test_drawn_text_is_read_from_the_answers_that_are_given_anyway(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def answers(_model: Any, _processor: Any, examples: list[Example], **_: Any) -> list[str]:
        said.extend(example.id for example in examples)
        return [str(example.metadata["text"]) for example in examples]

    monkeypatch.setattr("ett.evaluate.greedy.answers", answers)
    source = DrawnText("validation", size=32, kinds=("word", "colour"))
    found = evaluate(*toy, [("drawn_text", source)], limit=8)
    assert {"answers", "reading"} <= set(found.tasks["drawn_text"])
    assert found.metrics["reading_word_accuracy"].value == 1.0
    assert 1 <= found.metrics["reading_word_accuracy"].num_examples < 8, "a colour is not written in the picture"
    assert len(said) == len(set(said)) == 8


def test_short_questions_about_built_in_pictures_are_vqa() -> None:
    configs = [
        SourceConfig(source="drawn_text", size=32),
        SourceConfig(source="drawn_text", size=32, short_answers=True),
        SourceConfig(source="drawn_scenes", size=32, short_answers=True),
    ]
    found = {
        name: {task.name for task in TASKS.values() if task.suits(source)}
        for name, source in builtin_sources("heldout", configs)
    }
    assert list(found) == [
        "drawn_text.word",
        "drawn_text.font",
        "text_questions.word",
        "text_questions.font",
        "drawn_scenes.heldout",
    ]
    for name, tasks in found.items():
        assert ("vqa" in tasks) == (not name.startswith("drawn_text")), name
        assert ("reading" in tasks) == name.startswith("drawn_text"), name


def test_markdown_and_page(run: Any) -> None:
    found = run([asked("a", "yes"), asked("b", "no")], {"a": "yes", "b": "<b>|"}, "yes_no", "answers").to_json()
    lines = markdown(found).splitlines()
    assert lines[:2] == ["| Measure | listed |", "| --- | ---: |"]
    assert "| Yes or no: accuracy (share, higher is better) | 0.5 [0, 1], n = 2 |" in lines
    assert "- Data: listed (2 of 2 examples)." in lines
    several = {**found, "metrics": {
        "a.x|y.psnr": Metric(20.0, 3, (19.0, 21.0)).to_json(), "b.ssim": Metric(float("nan"), 1).to_json()
    }}  # fmt: skip
    assert markdown(several).splitlines()[:4] == [
        "| Measure | a.x\\|y | b |",
        "| --- | ---: | ---: |",
        "| PSNR (dB, higher is better) | 20 [19, 21], n = 3 | – |",
        "| SSIM (higher is better) | – | –, n = 1 |",
    ]
    page = evaluation_page("<mine>", found)
    assert "Yes or no: accuracy" in page
    assert "&lt;mine&gt;" in page
    assert "&lt;b&gt;|" in page
    assert "<b>|" not in page


def test_command(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in toy:
        part.save_pretrained(tmp_path / "model")
    picture(0).save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>"}]
    answered = [*turns, {"from": "gpt", "value": "B"}]
    lines = [
        {"image": "0.png", "conversations": turns, "answers": ["cat", "kitten"]},
        {"image": "0.png", "conversations": answered, "choices": ["dog", "cat"]},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {kind: tmp_path / f"figures.{kind}" for kind in ("json", "markdown", "html")}
    options = [text for kind, file in files.items() for text in (f"--{kind}", str(file))]
    given = [
        "--data",
        str(tmp_path / "mine.jsonl"),
        "--tasks",
        "letters,choices,vqa",
        "--max-new-tokens",
        "2",
        *options,
    ]
    assert main(["evaluate", str(tmp_path / "model"), *given]) == 0
    measured = {"vqa_accuracy", "anls", "choice_accuracy", "choice_chance", "letter_accuracy", "letter_answered"}
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == measured
    content = json.loads(files["json"].read_text())
    assert set(content["metrics"]) == measured
    assert files["markdown"].read_text() == markdown(content)
    assert files["html"].read_text().startswith("<!doctype html>")
