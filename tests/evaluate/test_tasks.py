"""Tasks and the evaluation around them, on toy models."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from ett.data.manifest import Manifest
from ett.data.mixture import SourceConfig
from ett.data.sources import conversation
from ett.errors import DataError, ModelError, UserError
from ett.evaluate.base import Metric, Selection, Subject, Task, spread
from ett.evaluate.run import Evaluation, evaluate, load_for_evaluation
from ett.evaluate.sources import builtin_sources, manifest_source
from ett.evaluate.tasks import TASKS
from ett.evaluate.tasks.naming import candidate_pool, score_answers
from ett.experiments.recipe import EvaluationConfig
from ett.model import EttForConditionalGeneration, EttImageProcessor, EttProcessor
from ett.tokenizers import VisionTokenizer
from ett.types import IGNORE_INDEX, Example
from tests.evaluate.conftest import Listed, Toy, build_toy, picture


def run(toy: Toy, examples: list[Example], *tasks: str, name: str = "listed", batch_size: int = 3) -> Evaluation:
    model, processor = toy
    return evaluate(
        model, processor, [(name, Listed(examples))], tasks or None, batch_size=batch_size, max_new_tokens=6
    )


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_loss_is_what_forward_returns(toy: Toy, examples: list[Example]) -> None:
    model, processor = toy
    batch = processor.collate([processor.encode(example) for example in examples])
    with torch.no_grad():
        expected = model(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
        )
    found = run(toy, examples, "loss").metrics
    assert found["caption_loss"].value == pytest.approx(expected.losses["caption_loss"].item(), rel=1e-5)
    characters = sum(map(len, ["cat", "a large dog", "ox", "Emu.", "two newts"]))
    nats = found["caption_loss"].value * batch.num_supervised
    assert found["caption_loss_per_character"].value == pytest.approx(nats / characters, rel=1e-6)
    targets = batch.labels[:, 1:]
    hits = (expected.logits[:, :-1].argmax(-1) == targets) & (targets != IGNORE_INDEX)
    assert found["caption_token_accuracy"].value == pytest.approx(hits.sum().item() / batch.num_supervised)


def test_only_the_first_answer_counts(toy: Toy, examples: list[Example]) -> None:
    longer = Example(
        "e0",
        [*examples[0].messages, *conversation("and this?", "a second answer")],
        [*examples[0].images, picture(9)],
    )
    first, both = run(toy, [examples[0]], "loss", "answers"), run(toy, [longer], "loss", "answers")
    assert first.metrics == both.metrics
    assert first.predictions == both.predictions


def test_answers_are_scored(toy: Toy, examples: list[Example]) -> None:
    said = run(toy, examples, "answers").predictions
    echo = [
        Example(e.id, [e.messages[0], {"role": "assistant", "content": [{"type": "text", "text": p.prediction or "?"}]}],
                e.images)
        for e, p in zip(examples, said, strict=True)
    ]  # fmt: skip
    found = run(toy, echo, "answers").metrics
    assert found["exact_match"].value == sum(bool(p.prediction) for p in said) / len(said)
    if all(p.prediction for p in said):
        assert found["character_error_rate"].value == 0.0


def test_without_reference(toy: Toy, examples: list[Example]) -> None:
    silent = Example("silent", examples[0].messages[:1], examples[0].images)
    found = run(toy, [*examples, silent])
    assert [p.id for p in found.predictions] == ["e0", "e1", "e2", "e3", "e4", "silent"]
    assert found.predictions[-1].reference is None
    assert {name: metric.num_examples for name, metric in found.metrics.items()} == {
        "caption_loss": 5,
        "caption_loss_per_character": 5,
        "caption_token_accuracy": 5,
        "exact_match": 5,
        "character_error_rate": 5,
        "psnr": 6,
        "ssim": 6,
        "l1": 6,
        "lite0_distance": 6,
        "codebook_usage": 6,
        "index_perplexity": 6,
    }
    alone = run(toy, [silent])
    assert "caption_loss" not in alone.metrics
    assert "exact_match" not in alone.metrics
    assert len(alone.predictions) == 1


def test_text_without_pictures(toy: Toy, examples: list[Example]) -> None:
    text = Example("text", conversation("two and two?", "four", num_images=0), [])
    found = run(toy, [examples[0], text])
    assert found.metrics["caption_loss"].num_examples == 2
    assert found.metrics["psnr"].num_examples == 1
    assert set(run(toy, [text]).metrics) == {
        "caption_loss", "caption_loss_per_character", "caption_token_accuracy", "exact_match", "character_error_rate",
    }  # fmt: skip


def test_an_answer_without_a_question_is_refused(toy: Toy) -> None:
    first = Example("odd", [{"role": "assistant", "content": [{"type": "text", "text": "cat"}]}], [])
    with pytest.raises(DataError, match="'odd'"):
        run(toy, [first], "answers")


def test_scores_of_candidates_equal_the_plain_loop(toy: Toy, examples: list[Example]) -> None:
    model, processor = toy
    candidates = ["cat", "a very long name of an animal", "x", "é"]
    subject = Subject(model.vision_tokenizer, processor, model, batch_size=3)
    with torch.no_grad():
        found = score_answers(subject, examples[2], candidates)
        for candidate, score in zip(candidates, found.tolist(), strict=True):
            question = examples[2].messages[0]["content"][1]["text"]
            batch = processor.collate(
                [processor.encode(Example("", conversation(question, candidate), examples[2].images))]
            )
            loss = model(
                input_ids=batch.input_ids,
                pixel_values=batch.pixel_values,
                attention_mask=batch.attention_mask,
                labels=batch.labels,
            ).losses["caption_loss"]
            assert -score == pytest.approx(loss.item(), rel=1e-4)


def test_naming(toy: Toy, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Example("twin", conversation("?", "CAT."), [picture(7)])
    pool = candidate_pool(Listed([*examples, twin]))
    assert len(pool) == 5
    found = run(toy, [*examples, twin], "naming").metrics
    assert found["naming_candidates"].value == 5
    assert 1 <= found["naming_rank"].value <= 5
    scores = iter([torch.tensor([-1.0, -2.0, -0.5, -1.0, -3.0])] * 6)
    monkeypatch.setattr("ett.evaluate.tasks.naming.score_answers", lambda *_: next(scores))
    found = run(toy, [*examples, twin], "naming").metrics
    # one better, one equal: 1 + 1 + 1/2
    assert found["naming_rank"].value == 2.5
    assert found["naming_top1"].value == 0.0
    assert found["naming_reciprocal_rank"].value == pytest.approx(0.4)


def test_as_many_names_are_ranked_as_one_pays_for(toy: Toy, examples: list[Example]) -> None:
    model, processor = toy
    many = [Example(f"{e.id}-{i}", e.messages, e.images) for i in range(10) for e in examples]
    for options, ranked in (({}, 32), ({"naming_limit": 40}, 40), ({"naming_limit": 3}, 3)):
        found = evaluate(model, processor, [("listed", Listed(many))], ["naming"], limit=45, **options).metrics
        assert found["naming_rank"].num_examples == ranked
    with pytest.raises(ValueError, match="naming_limit is 0"):
        evaluate(model, processor, [("listed", Listed(many))], ["naming"], naming_limit=0)
    with pytest.raises(ValueError, match="naming_limit"):
        EvaluationConfig(naming_limit=0)


def test_naming_is_for_names() -> None:
    names, text = builtin_sources("validation")[0][1], builtin_sources("validation")[2][1]
    assert TASKS["naming"].suits(names)
    assert not TASKS["naming"].suits(text)


class Identity(VisionTokenizer):
    """Gives back what it got, through the 256 levels of a channel: indices stand for the first pixel only."""

    tokenizer_type = "test-identity"

    def __init__(self, like: VisionTokenizer) -> None:
        super().__init__()
        self.quantize, self.inner, self._seen = like.quantize, like, torch.zeros(0)

    @property
    def downsample(self) -> int:
        return 4

    @property
    def precision(self):  # type: ignore[no-untyped-def]
        return "float32"

    @property
    def encoder_output(self) -> torch.Tensor:
        return self.inner.encoder_output

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self._seen = pixel_values
        return self.inner._encode(pixel_values)

    def _decode(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self._seen


def test_perfect_reconstruction_in_json(toy: Toy, examples: list[Example]) -> None:
    model, processor = toy
    found = evaluate(Identity(model.vision_tokenizer), processor, [("listed", Listed(examples))])
    assert found.metrics["psnr"].value == 100.0
    assert found.metrics["ssim"].value == pytest.approx(1.0)
    assert found.metrics["l1"].value == 0.0
    assert found.metrics["lite0_distance"].value == 0.0
    json.dumps(found.to_json(), allow_nan=False)


def test_padding_does_not_count(toy: Toy, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is decoded into the padding, the figures are the same."""
    model, processor = toy
    before = run(toy, examples, "reconstruction").metrics
    detokenize = type(model.vision_tokenizer).detokenize
    boxes = iter([processor.image_processor.fit(example.images[0])[1] for example in examples])

    def painted(tokenizer: VisionTokenizer, indices: torch.Tensor) -> torch.Tensor:
        decoded = detokenize(tokenizer, indices)
        for i in range(len(decoded)):
            box, noise = next(boxes), torch.rand_like(decoded[i]) * 2 - 1
            noise[:, box.top : box.bottom, box.left : box.right] = decoded[
                i, :, box.top : box.bottom, box.left : box.right
            ]
            decoded[i] = noise
        return decoded

    monkeypatch.setattr(type(model.vision_tokenizer), "detokenize", painted)
    after = run(toy, examples, "reconstruction").metrics
    assert {name: metric.value for name, metric in after.items()} == {name: m.value for name, m in before.items()}
    assert before["lite0_distance"].value > 0


def test_lite0_distance_is_left_out_without_its_package(
    toy: Toy, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ett.losses.perceptual.DISTRIBUTION", "no-such-package")
    found = run(toy, examples, "reconstruction").metrics
    assert set(found) == {"psnr", "ssim", "l1", "codebook_usage", "index_perplexity"}


# -- the evaluation ----------------------------------------------------------------------------------------------------


def test_twice_the_same(toy: Toy, examples: list[Example]) -> None:
    torch.manual_seed(1)
    first = json.dumps(run(toy, examples).to_json())
    torch.manual_seed(2)
    assert json.dumps(run(toy, examples).to_json()) == first


def test_batches_do_not_matter(toy: Toy, examples: list[Example]) -> None:
    one, all_at_once = run(toy, examples, batch_size=1), run(toy, examples, batch_size=5)
    assert one.predictions == all_at_once.predictions
    for name, metric in one.metrics.items():
        assert all_at_once.metrics[name].value == pytest.approx(metric.value, rel=1e-4), name


def test_fixed_shape_and_names(toy: Toy, examples: list[Example]) -> None:
    model, processor = toy
    several = evaluate(
        model, processor, [("a", Listed(examples)), ("b.c", Listed(examples[:2]))], ["answers"], max_new_tokens=2
    ).to_json()
    assert set(several["metrics"]) == {
        f"{source}.{metric}" for source in ("a", "b.c") for metric in ("exact_match", "character_error_rate")
    }
    assert set(several["metrics"]["a.exact_match"]) == {"value", "num_examples", "interval"}
    assert [p["id"] for p in several["predictions"]][-2:] == ["b.c/e0", "b.c/e1"]
    assert set(several["predictions"][0]) == {"id", "prediction", "reference"}
    assert {"data", "tasks", "versions", "model"} < set(several)


def test_modes_are_restored(examples: list[Example]) -> None:
    model, processor = build_toy()
    model.train()
    model.vision_tokenizer.eval()
    before = [module.training for module in model.modules()]
    evaluate(model, processor, [("x", Listed(examples))], limit=1, max_new_tokens=2)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tokenizer_alone(toy: Toy, examples: list[Example]) -> None:
    model, processor = toy
    found = evaluate(model.vision_tokenizer, processor, [("x", Listed(examples))])
    assert set(found.metrics) == {"psnr", "ssim", "l1", "lite0_distance", "codebook_usage", "index_perplexity"}
    assert found.predictions == []
    with pytest.raises(UserError, match=r"'answers' needs a language model.*Allowed: reconstruction"):
        evaluate(model.vision_tokenizer, processor, [("x", Listed(examples))], ["answers"])


def test_fewer_pictures_than_answers(toy: Toy, examples: list[Example]) -> None:
    model, processor = toy
    source = [("list", Listed(examples[:3]))]
    found = evaluate(
        model,
        processor,
        source,
        picture_limit=2,
        max_new_tokens=4,
        initial_tokenizer=model.vision_tokenizer,
    )
    assert found.metrics["caption_loss"].num_examples == 3
    assert found.metrics["psnr"].num_examples == found.metrics["indices_changed"].num_examples == 2


def test_a_tokenizer_that_did_not_move(toy: Toy, examples: list[Example]) -> None:
    model, processor = toy
    moved = copy.deepcopy(model.vision_tokenizer)
    source = [("list", Listed(examples[:3]))]

    def drift(initial: VisionTokenizer) -> tuple[float, float]:
        found = evaluate(model, processor, source, ["drift"], initial_tokenizer=initial).metrics
        return found["indices_changed"].value, found["reconstruction_drift"].value

    assert drift(copy.deepcopy(moved)) == (0.0, 0.0)
    with torch.no_grad():
        next(moved.decoder.parameters()).mul_(2)
    changed, difference = drift(moved)
    assert changed == 0.0
    assert difference > 0.0


def test_unknown_tasks_and_sources(toy: Toy, examples: list[Example]) -> None:
    with pytest.raises(UserError, match="Did you mean 'answers'"):
        run(toy, examples, "answer")
    with pytest.raises(UserError, match="No tasks"):
        evaluate(*toy, [("x", Listed(examples))], [])
    with pytest.raises(UserError, match="different names"):
        evaluate(*toy, [("x", Listed(examples)), ("x", Listed(examples))])
    with pytest.raises(ValueError, match="limit"):
        evaluate(*toy, [("x", Listed(examples))], limit=0)


def test_what_is_not_finite_is_null() -> None:
    assert Metric(float("nan"), 3, (0.0, float("inf"))).to_json() == {
        "value": None,
        "num_examples": 3,
        "interval": None,
    }


def test_selection(tmp_path: Path) -> None:
    assert spread(10, 3) == [0, 3, 6]
    many = Listed([Example(str(i), conversation(None, str(i)), []) for i in range(300)])
    assert len(Selection("x", many)) == 128
    assert Selection("x", many)[1].id == "2"
    assert [e.id for e in Selection("x", many, 3)] == ["0", "100", "200"]
    file = tmp_path / "mine.jsonl"
    line = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
    file.write_text("".join(json.dumps({"id": str(i), **line}) + "\n" for i in range(200)))
    assert len(Selection("x", Manifest(file))) == 200
    assert [e.id for e in Selection("x", Manifest(file), 2)] == ["0", "1"]
    assert manifest_source(file)[0][0] == "mine"


def test_builtin_splits() -> None:
    assert [name for name, _ in builtin_sources()] == ["names", "questions", "drawn_text"]
    assert [name for name, _ in builtin_sources("heldout")] == [
        "names.pair", "names.style", "names.concept", "questions.pair", "questions.style", "questions.concept",
        "drawn_text.word", "drawn_text.font",
    ]  # fmt: skip
    assert [name for name, _ in builtin_sources("word")] == ["drawn_text"]
    with pytest.raises(DataError, match="Did you mean 'validation'"):
        builtin_sources("validaton")


def test_sources_of_a_recipe() -> None:
    spelled = SourceConfig(source="drawn_text", spelled=True, size=64, limit=3)
    found = builtin_sources(
        "validation", [spelled, SourceConfig(source="drawn_text"), SourceConfig("manifest", path="x")]
    )
    assert [name for name, _ in found] == ["drawn_text.1", "drawn_text.2"]
    assert found[0][1][0].images[0].size == (64, 64)
    assert len(found[0][1]) > 3
    with pytest.raises(DataError, match="'pair'"):
        builtin_sources("pair", [spelled])


# -- loading and saving ------------------------------------------------------------------------------------------------


def test_load(toy: Toy, examples: list[Example], tmp_path: Path) -> None:
    model, processor = toy
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    model.vision_tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded, tokenizer, prepared = load_for_evaluation(tmp_path / "model")
    assert isinstance(loaded, EttForConditionalGeneration)
    assert loaded.vision_tokenizer is tokenizer
    assert isinstance(prepared, EttProcessor)
    assert prepared.image_processor.height == 32
    with pytest.raises(ModelError, match="32 x 32"):
        load_for_evaluation(tmp_path / "model", image_size=64)

    none, alone, around = load_for_evaluation(tmp_path / "tokenizer")
    assert none is None
    assert around.image_processor.height == 256
    assert load_for_evaluation(tmp_path / "tokenizer", image_size=64)[2].image_processor.width == 64
    with pytest.raises(UserError, match="multiple of 4"):
        load_for_evaluation(tmp_path / "tokenizer", image_size=30)
    EttImageProcessor(32, 16).save_pretrained(tmp_path / "tokenizer")
    sized = load_for_evaluation(tmp_path / "tokenizer")[2]
    assert (sized.image_processor.height, sized.image_processor.width) == (32, 16)
    assert evaluate(alone, sized, [("x", Listed(examples))]).metrics["psnr"].num_examples == 5


def test_load_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder"):
        load_for_evaluation(tmp_path / "missing")
    with pytest.raises(ModelError, match="neither a model nor"):
        load_for_evaluation(tmp_path)


def test_save(toy: Toy, examples: list[Example], tmp_path: Path) -> None:
    found = run(toy, examples, "reconstruction")
    found.save(tmp_path / "new" / "figures.json")
    assert json.loads((tmp_path / "new" / "figures.json").read_text()) == found.to_json()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        found.save(tmp_path / "file" / "figures.json")


def test_what_is_asked_in_words_alone_is_measured_apart(toy: Toy, examples: list[Example]) -> None:
    facts = evaluate(*toy, builtin_sources("concept", [SourceConfig(source="facts")]), limit=5)
    assert facts.tasks == {"facts": ["text", "reconstruction"]}
    assert set(facts.metrics) == {"text_loss", "text_loss_per_character"}
    assert facts.metrics["text_loss"].num_examples == 5
    words = [Example(e.id, [{**m, "content": [p for p in m["content"] if p["type"] == "text"]} for m in e.messages], ())
             for e in examples]  # fmt: skip
    assert not run(toy, examples, "text").metrics, "all of them show pictures"
    mixed = run(toy, [*examples, *words], "text").metrics["text_loss"]
    alone = run(toy, words, "loss").metrics["caption_loss"]
    assert mixed.num_examples == len(words)
    assert mixed.value == pytest.approx(alone.value, rel=1e-5)


def test_every_task_is_named_for_its_file() -> None:
    for name, task in TASKS.items():
        assert isinstance(task, Task)
        assert type(task).__module__ == f"ett.evaluate.tasks.{name}"
