"""Requests and their seeds, sizes, sheets and the folder of drawings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from ett.errors import DataError, ModelError
from ett.generate.draw import Picture, Request, check_room, checkpoint_hash, draw, grid_of, requests, sheet
from ett.generate.drawings import manifest_facts, open_folder, read_prompts, slug, write_drawings
from ett.images import load_image
from ett.model.drawing import DrawingSteps
from ett.model.image_sampling import ImageSampling
from ett.model.text import IMAGE_TOKEN
from tests.model.test_drawing import build


def test_every_prompt_counts_its_seeds_from_the_same_number() -> None:
    asked = requests(["cat", "dog"], num=2, seed=7, rewrite=lambda prompt: f"a drawing of a {prompt}")
    assert [(each.prompt, each.seed, each.words) for each in asked] == [
        ("cat", 7, "a drawing of a cat"),
        ("cat", 8, "a drawing of a cat"),
        ("dog", 7, "a drawing of a dog"),
        ("dog", 8, "a drawing of a dog"),
    ]
    assert requests(["cat"])[0].rewritten is None


@pytest.mark.parametrize("prompts", [[], [" "], [f"a {IMAGE_TOKEN}"]])
def test_prompts_that_cannot_be_drawn(prompts: list[str]) -> None:
    with pytest.raises(DataError):
        requests(prompts)
    with pytest.raises(DataError, match="What became of the prompt 'cat'"):
        requests(["cat"], rewrite=lambda _: "")


@pytest.mark.parametrize("result", [None, 3])
def test_a_rewriter_returns_a_text(result: Any) -> None:
    with pytest.raises(DataError, match=rf"The rewriter returned {result} for the prompt 'cat'"):
        requests(["cat"], rewrite=lambda _: result)


def test_seeds_are_what_a_generator_takes() -> None:
    assert [each.seed for each in requests(["cat"], num=2, seed=2**63 - 2)] == [2**63 - 2, 2**63 - 1]
    with pytest.raises(DataError, match="at most 2\\*\\*63 - 2"):
        requests(["cat"], num=2, seed=2**63 - 1)


def test_what_cannot_be_drawn_is_said_at_once() -> None:
    """A prompt that just fits is drawn, one byte more is refused, and so is a batch of nothing."""
    model, processor = build()
    room = model.config.text_config.get_text_config().max_position_embeddings
    words = "a" * (room - 64 - processor.drawing_inputs([""])["input_ids"].shape[1])
    grid = grid_of(model, processor, None)
    check_room(model, processor, {words: ""}, grid)
    DrawingSteps(model, **processor.drawing_inputs([words]), grid=grid)
    with pytest.raises(ModelError):
        DrawingSteps(model, **processor.drawing_inputs([words + "a"]), grid=grid)
    with pytest.raises(ModelError, match=r"The prompt 'a+\.\.\.' takes"):
        draw(model, processor, requests(["cat", words + "a"]))
    with pytest.raises(ModelError, match=r"prompts\.txt: the prompt"):
        check_room(model, processor, {words + "a": "prompts.txt"}, grid)
    with pytest.raises(ValueError, match="batch_size is 0"):
        draw(model, processor, requests(["cat"]), batch_size=0)


def test_pictures_of_a_request_are_those_of_its_seed() -> None:
    model, processor = build()
    model.train()
    sampling, counts = ImageSampling(guidance=1.5), []
    asked = requests(["cat", "a dog"], num=2)
    drawn = list(draw(model, processor, asked, sampling, batch_size=3, on_token=counts.append))
    assert [each.request for each in drawn] == asked
    assert sum(counts) == 4 * 64
    assert model.training
    alone = next(draw(model, processor, asked[3:], sampling))
    assert np.array_equal(np.asarray(drawn[3].image), np.asarray(alone.image))
    assert drawn[0].image.size == (32, 32)


def test_sizes_are_whole_tokens_within_the_grid() -> None:
    model, processor = build()
    assert grid_of(model, processor, None) == (8, 8)
    assert grid_of(model, processor, (16, 32)) == (4, 8)
    for size, said in (((30, 32), "do not divide"), ((32, 64), "at most 32 pixels"), ((0, 32), "do not divide")):
        with pytest.raises(ModelError, match=said):
            grid_of(model, processor, size)


def test_a_sheet_shows_pictures_in_reading_order() -> None:
    shades = [PIL.Image.new("RGB", (4, 3), (40 * i, 0, 0)) for i in range(5)]
    whole = np.asarray(sheet(shades, columns=2, gap=1))
    assert whole.shape == (3 * 3 + 2, 2 * 4 + 1, 3)
    found = [int(whole[row * 4, column * 5, 0]) for row in range(3) for column in range(2)]
    assert found == [0, 40, 80, 120, 160, 255]


def test_the_folder_of_drawings(tmp_path: Path) -> None:
    out = tmp_path / "out"
    open_folder(out, overwrite=False)
    images = [PIL.Image.new("RGB", (4, 4), (i, i, i)) for i in range(2)]
    asked = [Request("A cat!", 0, "a black cat"), Request("Ärger / 2", 1)]
    facts = manifest_facts("runs/mine", "abc", ImageSampling(), (4, 4), "m:f")
    files = [path for path, _ in write_drawings(map(Picture, asked, images), out, facts, 2)]
    assert [path.name for path in files] == ["0000-a-cat-0.png", "0001-rger-2-1.png"]
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["images"] == [
        {"file": files[0].name, "prompt": "A cat!", "rewritten_prompt": "a black cat", "seeds": [0]},
        {"file": files[1].name, "prompt": "Ärger / 2", "rewritten_prompt": None, "seeds": [1]},
    ]
    assert manifest["sampling"]["guidance"] == 3.0
    assert manifest["checkpoint_sha256"] == "abc"
    assert load_image(out / "grid.png").size == (4 * 2 + 2, 4)

    # interrupted: what is there has its record, and can be replaced
    later = tmp_path / "later"
    open_folder(later, overwrite=False)
    written = write_drawings(map(Picture, asked, images), later, facts, 2)
    next(written)
    written.close()
    assert {path.name for path in later.iterdir()} == {"0000-a-cat-0.png", "manifest.json"}
    assert json.loads((later / "manifest.json").read_text(encoding="utf-8"))["images"] == manifest["images"][:1]
    open_folder(later, overwrite=True)
    assert list(later.iterdir()) == []

    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="--overwrite"):
        open_folder(out, overwrite=False)
    open_folder(out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    with pytest.raises(DataError, match="is not empty"):
        open_folder(out, overwrite=True)
    (out / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="is not a manifest"):
        open_folder(out, overwrite=True)


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "a dog"]
    path.write_text("a cat\u2028in the sun\r\na dog\n", encoding="utf-8", newline="")
    assert read_prompts(path) == ["a cat\u2028in the sun", "a dog"]
    path.write_bytes(b"\xff\xfe")
    for bad in (path, tmp_path / "none.txt"):
        with pytest.raises(DataError, match=bad.name):
            read_prompts(bad)
    assert slug("日本") == "picture"


def test_the_checkpoint_hash_sees_weights_and_configuration(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    (tmp_path / "config.json").write_text("{}")
    first = checkpoint_hash(tmp_path)
    (tmp_path / "readme.txt").write_text("x")
    assert checkpoint_hash(tmp_path) == first
    (tmp_path / "config.json").write_text("{ }")
    second = checkpoint_hash(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert len({first, second, checkpoint_hash(tmp_path)}) == 3
    with pytest.raises(ModelError, match="no weights"):
        checkpoint_hash(tmp_path / "nothing")
