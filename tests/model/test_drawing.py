"""Drawing: the heads, the loss of image tokens, and pictures drawn from a cache as they are learned without one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from ett.config import from_mapping
from ett.data.drawing import drawing
from ett.data.sources import conversation
from ett.errors import ModelError, RecipeError
from ett.losses import image as image_module
from ett.losses.caption import supervised_columns
from ett.losses.image import image_token_loss
from ett.losses.joint import LossConfig
from ett.model import EttForConditionalGeneration, EttProcessor
from ett.model.build import ModelSpec, build_model, build_vision_tokenizer, start_from
from ett.model.drawing import DrawingSteps
from ett.model.image_head import ImageHead, ImageHeadConfig
from ett.model.image_sampling import ImageSampling, draw_tokens, kept, uniform_numbers
from ett.model.loading import load_model
from ett.tokenizers import VisionTokenizer
from ett.types import DRAWN_INDEX, IGNORE_INDEX, Batch, Example
from tests.conftest import LANGUAGE_MODELS, TOKENIZER

HEADS: list[dict[str, Any]] = [
    {"kind": "tied"},
    {"kind": "tied", "bias": True},
    {"kind": "linear"},
    {"kind": "vocabulary"},
]
GEN = LossConfig(tokenizer_weight=0.0, caption_weight=0.0)
GRID = (8, 8)


def build(
    head: dict[str, Any] | None = None, kind: str = "llama", **changes: Any
) -> tuple[EttForConditionalGeneration, EttProcessor]:
    given = {
        "image_size": 32,
        "vision_tokenizer": dict(TOKENIZER),
        "language_model": {"config": LANGUAGE_MODELS[kind]},
        "projector": {"whiten": True, "grid_positions": 8},
        "image_head": head or {"kind": "tied"},
        **changes,
    }
    spec = from_mapping(ModelSpec, given)
    torch.manual_seed(0)
    model, processor = build_model(spec, build_vision_tokenizer(spec))
    return model.eval(), processor


def picture(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def drawings(processor: EttProcessor, prompts: tuple[str, ...] = ("cat", "a red apple")) -> Batch:
    examples = [Example(text, drawing(text), [picture(i)]) for i, text in enumerate(prompts)]
    return processor.collate([processor.encode(example) for example in examples])


def inputs(batch: Batch) -> dict[str, Any]:
    names = ("input_ids", "pixel_values", "attention_mask", "labels")
    return {name: getattr(batch, name) for name in names}


def drawn_logits(model: EttForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """float[B, N, K] of every image token, without a cache."""
    out = model(**{**inputs(batch), "labels": None}, output_hidden_states=True)
    rows = [out.hidden_states[-1][b, (row == DRAWN_INDEX).nonzero()[:, 0] - 1] for b, row in enumerate(batch.labels)]
    assert model.image_head is not None
    return model.image_head(torch.stack(rows), model.codes())


# -- heads ---------------------------------------------------------------------------------------------------------------


def test_a_tied_head_is_the_codebook_seen_through_one_matrix() -> None:
    head = ImageHead(ImageHeadConfig("tied"), hidden_size=6, codebook_size=10, codebook_dim=3)
    hidden, codes = torch.randn(2, 5, 6), torch.randn(10, 3)
    by_hand = torch.einsum("btc,dc,kd->btk", hidden, head.layer.weight, codes)
    torch.testing.assert_close(head(hidden, codes), by_hand)
    assert sum(p.numel() for p in head.parameters()) == 6 * 3


def test_a_fresh_tied_head_is_nearly_uniform_whatever_the_codebooks_scale() -> None:
    for scale in (0.01, 30.0):
        head = ImageHead(ImageHeadConfig("tied"), 64, 200, 16)
        codes = scale * torch.randn(200, 16)
        head.fit(codes)
        assert head(torch.randn(50, 64), codes).std().item() == pytest.approx(0.1, rel=0.3)


def test_whitened_codes_give_the_heads_own_family() -> None:
    """Whitening is a change of basis and a shift, which no softmax sees: still (W·h)·Eᵀ."""
    model, _ = build()
    assert model.image_head is not None
    codes = model.vision_tokenizer.quantize.codebook.detach()
    hidden = torch.randn(4, 48)
    scale = model.projector.scale
    assert scale is not None
    plain = hidden @ model.image_head.layer.weight.T @ scale.T @ codes.T
    torch.testing.assert_close(model.image_head(hidden, model.codes()).softmax(-1), plain.softmax(-1))


@pytest.mark.parametrize(
    ("projector", "said"), [({"merge_size": 2}, "merges 4 tokens into one"), ({"context_layers": 1}, "drawn after it")]
)
def test_projectors_that_cannot_be_drawn_through_are_refused(projector: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        build(projector=projector)


# -- the loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_image_loss_by_hand(head: dict[str, Any], kind: str) -> None:
    model, processor = build(head, kind)
    batch = drawings(processor)
    assert (batch.num_drawn, batch.num_supervised) == (128, 0)
    out = model(**inputs(batch), loss_config=GEN)
    logits = drawn_logits(model, batch)
    if head["kind"] == "vocabulary":
        hidden = model(**{**inputs(batch), "labels": None}, output_hidden_states=True)
        first = [int((row == DRAWN_INDEX).nonzero()[0]) for row in batch.labels]
        text = torch.stack([hidden.logits[b, at - 1 : at + 63] for b, at in enumerate(first)])
        logits = torch.cat([text, logits], dim=-1)
    log_p = logits.log_softmax(-1)[..., -64:]
    indices = model.vision_tokenizer.tokenize(batch.pixel_values).flatten(1)
    by_hand = -log_p.gather(-1, indices[..., None]).mean()
    torch.testing.assert_close(out.losses["image_loss"], by_hand)
    torch.testing.assert_close(out.loss, by_hand)
    assert set(out.losses) == {"image_loss"}
    # a code cache gives the same
    cached = {**inputs(batch), "pixel_values": None, "image_indices": indices.unflatten(1, GRID)}
    torch.testing.assert_close(model(**cached, loss_config=GEN).loss, by_hand)


def test_ends_of_rows_are_read_and_not_predicted() -> None:
    model, processor = build(projector={"row_ends": True})
    assert processor.num_image_positions == 8 * 9
    batch = drawings(processor)
    assert batch.num_drawn == 128
    start = int((batch.labels[0] == DRAWN_INDEX).nonzero()[0])
    ends = (batch.labels[0, start : start + 72] == IGNORE_INDEX).nonzero()[:, 0]
    assert ends.tolist() == [8 + 9 * row for row in range(8)]
    visual = model.visual_embeddings(model.vision_tokenizer.tokenize(batch.pixel_values))
    assert model.projector.row_end is not None
    assert torch.equal(visual[1, ends], model.projector.row_end.expand(8, -1))
    out = model(**inputs(batch), loss_config=GEN)
    indices = model.vision_tokenizer.tokenize(batch.pixel_values).flatten(1)
    by_hand = -drawn_logits(model, batch).log_softmax(-1).gather(-1, indices[..., None]).mean()
    torch.testing.assert_close(out.loss, by_hand)
    out.loss.backward()
    assert model.projector.row_end.grad.abs().sum() > 0


def test_the_loss_reaches_what_draws_and_not_the_tokenizer() -> None:
    model, processor = build({"kind": "tied", "bias": True})
    model.vision_tokenizer.requires_grad_(False)
    batch = drawings(processor)
    model(**inputs(batch), loss_config=GEN, logits_to_keep=supervised_columns(batch.labels)).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert {name.split(".")[0] for name in without} == {"vision_tokenizer", "language_model"}
    assert {name for name in without if name.startswith("language_model")} == {"language_model.lm_head.weight"}


def test_tokens_read_back_wrong_are_other_pictures_at_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build()
    read = Example("read", conversation("What?", "a dog"), [picture(7)])
    drawn = [Example(str(i), drawing("a cat"), [picture(i)]) for i in range(3)]
    batch = processor.collate([processor.encode(each) for each in (drawn[0], read, *drawn[1:])])
    indices = torch.arange(4)[:, None, None] * 64 + torch.arange(64).view(8, 8)
    torch.manual_seed(0)
    for _ in range(5):
        found = model.with_wrong_tokens(indices, batch.input_ids, batch.labels, 0.3)
        assert torch.equal(found % 64, indices % 64)
        assert torch.equal(found[1], indices[1]), "a picture that is read stays"
    many = torch.stack([model.with_wrong_tokens(indices, batch.input_ids, batch.labels, 0.3) for _ in range(200)])
    # three of four permuted pictures at a place are others
    assert (many != indices)[:, [0, 2, 3]].float().mean().item() == pytest.approx(0.3 * 3 / 4, abs=0.02)
    # the loss: wrong tokens are read, the right ones predicted, and only while learning
    noisy = LossConfig(tokenizer_weight=0.0, caption_weight=0.0, image_noise=0.5)
    torch.testing.assert_close(
        model(**inputs(batch), loss_config=noisy).loss, model(**inputs(batch), loss_config=GEN).loss
    )
    wrong = torch.randint(0, model.vision_tokenizer.codebook_size, (4, 8, 8))
    monkeypatch.setattr(model, "with_wrong_tokens", lambda *_: wrong)
    right = model.vision_tokenizer.tokenize(batch.pixel_values)
    model.train()
    found = model(**inputs(batch), loss_config=noisy, output_hidden_states=True)
    model.eval()
    given = inputs(batch) | {"pixel_values": None}
    hidden = model(**given | {"labels": None}, image_indices=wrong, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found.loss, model.image_loss(hidden, batch.input_ids, batch.labels, right))


def test_words_and_pictures_of_one_batch_have_their_own_losses() -> None:
    model, processor = build({"kind": "vocabulary"})
    read = Example("read", conversation("What?", "a dog"), [picture(7)])
    draw = Example("draw", drawing("a cat"), [picture(8)])
    both = processor.collate([processor.encode(each) for each in (read, draw)])
    weights = LossConfig(tokenizer_weight=0.0, caption_weight=0.5, image_weight=2.0)
    out = model(**inputs(both), loss_config=weights)
    torch.testing.assert_close(out.loss, 0.5 * out.losses["caption_loss"] + 2 * out.losses["image_loss"])
    alone = processor.collate([processor.encode(draw)])
    torch.testing.assert_close(out.losses["image_loss"], model(**inputs(alone), loss_config=GEN).loss)
    # divisors of a whole step, as accumulation gives them
    parts = model(**inputs(both), loss_config=weights, num_items_in_batch=20, num_drawn_in_batch=100)
    torch.testing.assert_close(parts.losses["image_loss"], out.losses["image_loss"] * 64 / 100)
    one = model(**inputs(alone), loss_config=GEN, num_items_in_batch=128)
    torch.testing.assert_close(one.loss, out.losses["image_loss"] / 2)


def test_chunks_of_the_loss_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(5, 30).double()
    rows, targets = torch.randn(17, 5, dtype=torch.float64, requires_grad=True), torch.randint(30, (17,))

    def gradients() -> list[torch.Tensor]:
        loss = image_token_loss(rows, targets, layer, 30)
        return [loss.detach(), *torch.autograd.grad(loss, [rows, layer.weight])]

    whole = gradients()
    monkeypatch.setattr(image_module, "CHUNK_ELEMENTS", 4 * 30)
    for ours, theirs in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(ours, theirs)
    none = image_token_loss(rows[:0], targets[:0], layer, 30)
    none.backward()
    assert none.item() == 0
    assert layer.weight.grad is not None


def test_labels_of_a_conversation() -> None:
    """The picture alone is drawn: neither the prompt nor what the template puts behind it is learned; words beside it are."""
    _, processor = build()
    ids, labels = processor.tokenize_conversation(drawing("cat"))
    assert [label for label in labels if label != IGNORE_INDEX] == [DRAWN_INDEX] * 64
    assert ids.count(processor.image_token_id) == 64
    turn = {"role": "assistant", "content": [{"type": "text", "text": "here: "}, {"type": "image"}]}
    _, labels = processor.tokenize_conversation([drawing("cat")[0], turn])
    assert labels.count(DRAWN_INDEX) == 64
    assert processor.tokenizer.decode([label for label in labels if label >= 0]).startswith("here:")
    # a model that only reads learns nothing from such a turn's picture
    processor.draws = False
    assert DRAWN_INDEX not in processor.tokenize_conversation(drawing("cat"))[1]


# -- drawing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("qwen2", {"visual_input": "index"}),
        ("qwen2", {"projector": {"row_ends": True}}),
        ("llama", {"projector": {"row_ends": True, "grid_positions": 8, "normalize_output": True}}),
        ("llama", {"projector": {}}),
    ],
    ids=str,
)
def test_cached_logits_are_the_teacher_forced_ones(kind: str, changes: dict[str, Any]) -> None:
    """Within 1e-4, for prompts of different lengths, padded on the left, and without words."""
    model, processor = build({"kind": "linear"}, kind, **changes)
    assert model.image_head is not None
    torch.nn.init.normal_(model.image_head.layer.weight, std=0.3)
    batch = drawings(processor, ("cat", "a red apple", ""))
    forced = drawn_logits(model, batch)
    indices = model.vision_tokenizer.tokenize(batch.pixel_values).flatten(1)
    steps = DrawingSteps(model, **processor.drawing_inputs(["cat", "a red apple", ""], guided=False), grid=GRID)
    with torch.no_grad():
        hidden = [steps.first(), *(steps.next(indices[:, token]) for token in range(63))]
        cached = steps.logits(torch.stack(hidden, dim=1))
    assert forced.std() > 1
    torch.testing.assert_close(cached, forced, rtol=0, atol=1e-4)


def test_greedy_drawing_is_the_chain_of_likeliest_tokens() -> None:
    model, processor = build()
    made = model.generate_images(
        **processor.drawing_inputs(["cat"]), grid=GRID, seeds=[0], sampling=ImageSampling(temperature=0, guidance=2.5)
    )
    assert made.indices.shape == (1, 8, 8)
    assert made.pixel_values.shape == (1, 3, 32, 32)
    ids = [processor.tokenize_conversation(drawing(text))[0] for text in ("cat", "")]
    logits = []
    for row in ids:
        given = torch.tensor([row])
        out = model(input_ids=given, image_indices=made.indices, output_hidden_states=True)
        start = row.index(processor.image_token_id)
        assert model.image_head is not None
        logits.append(model.image_head(out.hidden_states[-1][0, start - 1 : start + 63], model.codes()))
    guided = logits[1] + 2.5 * (logits[0] - logits[1])
    assert torch.equal(guided.argmax(-1), made.indices.flatten())


def test_same_seed_same_picture_whatever_the_batch() -> None:
    model, processor = build()
    sampling = ImageSampling(guidance=2.0, top_k=40, top_p=0.95, guidance_schedule="cosine")

    def draw(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        found = model.generate_images(**processor.drawing_inputs(prompts), grid=GRID, seeds=seeds, sampling=sampling)
        return found.indices

    together = draw(["cat", "cat", "a dog"], [5, 6, 5])
    assert torch.equal(together, draw(["cat", "cat", "a dog"], [5, 6, 5]))
    assert torch.equal(together[1:2], draw(["cat"], [6]))
    assert not torch.equal(together[0], together[1])


def test_other_sizes_are_drawn_as_far_as_the_grid_reaches() -> None:
    model, processor = build()
    given = processor.drawing_inputs(["cat"], guided=False)
    plain = ImageSampling(guidance=1.0)
    made = model.generate_images(**given, grid=(4, 6), seeds=[0], sampling=plain)
    assert made.pixel_values.shape == (1, 3, 16, 24)
    with pytest.raises(ValueError, match="grid_positions"):
        model.generate_images(**given, grid=(9, 1), seeds=[0], sampling=plain)
    with pytest.raises(ValueError, match="need 2 rows"):
        model.generate_images(**given, grid=GRID, seeds=[0], sampling=ImageSampling(guidance=2.0))


def test_nothing_in_the_loop_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there are no values: whoever looked at one would fail. (Decoding comes after the loop.)"""
    monkeypatch.setattr(VisionTokenizer, "detokenize", lambda _, indices: torch.empty(len(indices), 3, 32, 32))
    model, processor = build({"kind": "linear"})
    given = {name: tensor.to("meta") for name, tensor in processor.drawing_inputs(["cat", "dog"]).items()}
    sampling = ImageSampling(temperature=0, guidance=3.0, guidance_schedule="linear")
    made = model.to("meta").generate_images(**given, grid=GRID, seeds=[0, 1], sampling=sampling)
    assert made.pixel_values.shape == (2, 3, 32, 32)
    filtered = kept(torch.empty(2, 50, device="meta"), 7, 0.5)
    assert filtered.shape == (2, 50)


def test_models_that_only_read_say_so() -> None:
    model, processor = build()
    model.image_head = None
    with pytest.raises(ModelError, match="no image head"):
        model.generate_images(
            **processor.drawing_inputs(["cat"], guided=False), grid=GRID, seeds=[0], sampling=ImageSampling(guidance=1)
        )


def test_too_long_a_prompt_is_refused() -> None:
    model, processor = build()
    with pytest.raises(ModelError, match="the language model has 512"):
        model.generate_images(**processor.drawing_inputs(["x" * 450]), grid=GRID, seeds=[0])


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_saved_models_draw_the_same(head: dict[str, Any], tmp_path: Path) -> None:
    model, processor = build(head)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor_again = load_model(tmp_path)
    assert processor_again.draws
    given = processor.drawing_inputs(["cat"])
    first, second = (each.generate_images(**given, grid=GRID, seeds=[3]).indices for each in (model, again))
    assert torch.equal(first, second)


def test_a_reading_model_gets_a_head(tmp_path: Path) -> None:
    model, processor = build()
    model.image_head, model.config.image_head, processor.draws = None, None, False
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    spec = from_mapping(ModelSpec, {"init": str(tmp_path), "image_head": {"kind": "linear"}})
    found, processor = start_from(tmp_path, spec)
    assert processor.draws
    assert found.image_head is not None
    assert found.config.image_head == {"kind": "linear", "bias": False}
    merged, other = build(projector={"merge_size": 2}, image_head=None)
    merged.save_pretrained(tmp_path / "merged")
    other.save_pretrained(tmp_path / "merged")
    with pytest.raises(RecipeError, match="one token a position"):
        start_from(tmp_path / "merged", from_mapping(ModelSpec, {"init": "x", "image_head": {"kind": "tied"}}))


# -- sampling ------------------------------------------------------------------------------------------------------------


def test_draws_follow_the_softmax() -> None:
    """Frequencies of 4,000 draws within four standard deviations, and none outside of top-k and top-p."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    uniforms = uniform_numbers([1], 4000, torch.device("cpu"))[:, 0]
    many = logits.expand(4000, 5)
    p = (logits / 0.7).softmax(-1)
    counts = torch.bincount(draw_tokens(many, ImageSampling(temperature=0.7), uniforms), minlength=5)
    assert ((counts - 4000 * p).abs() <= 4 * (4000 * p * (1 - p)).sqrt()).all()
    assert set(draw_tokens(many, ImageSampling(top_k=2), uniforms).tolist()) == {0, 1}
    mass = logits.softmax(-1).cumsum(-1)
    assert set(draw_tokens(many, ImageSampling(top_p=float(mass[2]) - 1e-3), uniforms).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("temperature", [1e-38, 1e-40, 1e-300])
def test_a_temperature_near_nothing_takes_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([[3.0, -50.0, 90.0], [-7.0, -8.0, -9.0]])
    found = draw_tokens(logits, ImageSampling(temperature=temperature), torch.tensor([0.0, 0.999], dtype=torch.float64))
    assert found.tolist() == [2, 0]


def test_the_likeliest_token_is_always_kept() -> None:
    found = kept(torch.tensor([[0.0, 5.0, 1.0]]), None, 1e-6)
    assert found.isfinite().tolist() == [[False, True, False]]


def test_guidance_schedules() -> None:
    scales = {
        name: [ImageSampling(guidance=5.0, guidance_schedule=name).scale(token, 5) for token in range(5)]
        for name in ("constant", "linear", "cosine")
    }
    assert scales["constant"] == [5.0] * 5
    assert scales["linear"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert scales["cosine"] == pytest.approx([1, 1.5858, 3, 4.4142, 5], abs=1e-4)
    assert not ImageSampling(guidance=1.0).guided


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"guidance": -0.1},
        {"guidance": math.inf},
        {"guidance": math.nan},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ImageSampling(**settings)
