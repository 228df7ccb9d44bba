"""The offline judges of drawings: search by name, its chance, the kernel distance, and a whole judgement of a toy model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ett.cli import main
from ett.data.artwork import ArtworkNames
from ett.errors import DataError
from ett.evaluate import drawing_judges as judges_module
from ett.evaluate import drawing_sheet as sheet_module
from ett.evaluate.drawing_judges import NameSearch, judge_drawings
from ett.evaluate.drawing_sheet import compare_drawings, write_sheet
from ett.evaluate.kernel_distance import kernel_distance
from ett.images import load_image
from ett.losses import perceptual
from ett.model.image_sampling import ImageSampling
from tests.model.test_drawing import build


def test_pictures_are_found_by_name() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]) + 5
    search = NameSearch(features, ["cat", "dog", "cat", "cow"])
    seen = torch.tensor([[6.0, 5.1], [5.1, 6.0], [5.1, 6.0]])
    assert search.hits(seen, ["cat", "dog", "cow"], 1) == [1.0, 1.0, 0.0]
    # the second nearest of the last two is the cat on the right
    assert search.hits(seen, ["dog", "cat", "cow"], 2) == [1.0, 1.0, 0.0]
    assert search.hits(seen, ["cow"] * 3, 10) == [1.0] * 3


def test_a_choice_is_right_where_the_own_picture_is_nearest() -> None:
    features = torch.eye(12)
    search = NameSearch(features, [*"abcdefghijkl"])
    seen = torch.stack([features[0], features[1] * 0.2 + features[5], torch.ones(12)])
    assert search.choices(seen[:1], ["a"], 10) == [1.0]
    assert search.choices(seen[1:2], ["b"], 12) == [0.0]
    rng = torch.Generator().manual_seed(0)
    blind = search.choices(torch.randn(3000, 12, generator=rng), ["c"] * 3000, 10)
    assert np.mean(blind) == pytest.approx(0.1, abs=0.02)
    for names, count in ((["z"], 2), (["a"], 13)):
        with pytest.raises(DataError, match="too few to choose from"):
            search.choices(seen[:1], names, count)


def test_chance_is_what_blind_search_finds() -> None:
    names = ["a"] * 3 + ["b"] * 2 + list("cdefg")
    search = NameSearch(torch.randn(10, 4), names)
    rng = np.random.default_rng(0)
    for top in (1, 5):
        blind = [any(names[i] == "a" for i in rng.permutation(10)[:top]) for _ in range(20000)]
        assert search.chance(["a"], top) == pytest.approx(np.mean(blind), abs=0.01)
    assert search.chance(["a", "c"], 1) == pytest.approx((0.3 + 0.1) / 2)
    assert search.chance(["z"], 3) == 0


def test_kernel_distance_is_the_plain_loop_and_unbiased() -> None:
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64) + 1

    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within_x = np.mean([k(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    within_y = np.mean([k(y[i], y[j]) for i in range(4) for j in range(4) if i != j])
    between = np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * between)
    assert kernel_distance(y, x) == pytest.approx(kernel_distance(x, y))
    torch.manual_seed(0)
    same = [kernel_distance(torch.randn(20, 8), torch.randn(20, 8)) for _ in range(300)]
    assert abs(np.mean(same)) < 3 * np.std(same) / len(same) ** 0.5
    assert min(same) < 0 < max(same)
    # of pairs: copies of independent draws are at no distance on average, which without `paired` they are below
    first = [torch.randn(20, 8) for _ in range(300)]
    copies = [kernel_distance(each, each.clone(), paired=True) for each in first]
    assert np.mean(copies) == pytest.approx(0, abs=1e-9)
    assert np.mean([kernel_distance(each, each.clone()) for each in first]) < -0.1
    with pytest.raises(ValueError, match="no pairs"):
        kernel_distance(x, y, paired=True)
    with pytest.raises(ValueError, match="at least two"):
        kernel_distance(x[:1], y)


class _Few(ArtworkNames):
    """The first pictures of each split."""

    def __len__(self) -> int:
        return min(super().__len__(), 400 if self.split == "train" else 24)


def colours(_network: object, pictures: Sequence[Tensor]) -> Tensor:
    """Mean colours of 4 x 4 blocks, in place of a network's features."""
    blocks = [picture.unflatten(1, (4, 8)).unflatten(3, (4, 8)) for picture in pictures]
    return torch.stack([block.mean(dim=(2, 4)).flatten() for block in blocks])


@pytest.fixture
def _few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (judges_module, sheet_module):
        monkeypatch.setattr(module, "ArtworkNames", _Few)
        monkeypatch.setattr(module, "pooled_features", colours)


@pytest.mark.usefixtures("_few_pictures")
def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for part in build():
        part.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(perceptual, "load_lite0", torch.nn.Identity)
    figures, sheet = tmp_path / "figures.json", tmp_path / "sheet.png"
    words = ["t2i", "judge", tmp_path / "model", "--limit", 3, "--guidance", 1, "--json", figures, "--sheet", sheet]
    assert main([str(word) for word in [*words, "--shown", 2]]) == 0
    said = capsys.readouterr().out
    assert said.startswith("24 real pictures of split 'validation' are searched")
    assert "choice_of_10  (chance 0.1000)" in said
    values = json.loads(figures.read_text(encoding="utf-8"))
    assert values["rows"]["drawn"]["retrieval_top5"]["num_examples"] == 3
    assert (values["split"], values["seed"], values["sampling"]["guidance"]) == ("validation", 0, 1.0)
    assert len(values["checkpoint_sha256"]) == 64
    assert load_image(sheet).size[1] > 96


@pytest.mark.usefixtures("_few_pictures")
def test_final_figures_search_all_held_out_pictures_too() -> None:
    model, processor = build()
    network: Any = None
    found = judge_drawings(model, processor, network, "pair", limit=3, sampling=ImageSampling(guidance=1.0))
    assert (found.gallery, found.heldout_gallery) == (24, 72)
    names = [ArtworkNames(split).facts(i)["name"] for split in ("pair", "style", "concept") for i in range(24)]
    asked = [names[index] for index in found.wanted]
    missed = [np.prod([1 - names.count(name) / (72 - drawn) for drawn in range(5)]) for name in asked]
    assert found.chance["heldout_top5"] == pytest.approx(1 - np.mean(missed))
    assert found.chance["heldout_top5"] < found.chance["retrieval_top5"]
    for row in found.rows.values():
        assert row["heldout_top1"].value <= row["heldout_top5"].value
        assert row["heldout_top5"].num_examples == row["retrieval_top5"].num_examples
    validation = judge_drawings(model, processor, network, limit=2, sampling=ImageSampling(guidance=1.0))
    assert validation.heldout_gallery == 0
    assert "heldout_top1" not in validation.rows["drawn"]


@pytest.mark.usefixtures("_few_pictures")
def test_a_whole_judgement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With mean colours for features: reconstructions of a tokenizer that changes nothing are found, all of them."""

    model, processor = build()
    monkeypatch.setattr(type(model.vision_tokenizer), "tokenize", lambda _, pixels: pixels)
    plain = type(model.vision_tokenizer).detokenize
    monkeypatch.setattr(
        type(model.vision_tokenizer), "detokenize", lambda self, x: x if x.is_floating_point() else plain(self, x)
    )
    network: Any = None
    tokens: list[int] = []
    kept_seeds: list[list[int]] = []
    draw = judges_module.draw

    def noted(model: Any, processor: Any, requests: Any, *rest: Any, **named: Any) -> Any:
        kept_seeds.append([request.seed for request in requests])
        return draw(model, processor, requests, *rest, **named)

    monkeypatch.setattr(judges_module, "draw", noted)
    found = judge_drawings(
        model, processor, network, "validation", limit=5, sampling=ImageSampling(guidance=1.0), on_token=tokens.append
    )
    assert (found.gallery, sum(tokens)) == (24, 5 * 64)
    assert set(found.rows) >= {"drawn", "reconstructed"}
    assert kept_seeds == [[0, 1, 2, 3, 4]], "equal prompts get different pictures"
    kept = found.rows["reconstructed"]
    assert kept["retrieval_top1"].value == kept["retrieval_top5"].value == 1
    assert kept["frechet_distance"].value == pytest.approx(0, abs=1e-6)
    assert 0 < found.chance["retrieval_top1"] < found.chance["retrieval_top5"] < 1
    assert kept["choice_of_10"].value == 1
    row = found.to_json()["rows"]["drawn"]
    assert row["retrieval_top5"]["num_examples"] == 5
    assert row["frechet_distance"]["value"] > 0
    source = ArtworkNames("train")
    copied = torch.from_numpy(processor.image_processor.fit(source[7].images[0])[0])
    compared = compare_drawings(replace(found, drawn=[copied, *found.drawn[1:]]), processor, network, 3)
    assert [each.prompt for each in compared] == list(found.prompts[:3])
    facts = source.facts(7)
    assert compared[0].nearest_name == f"{facts['name']}, {facts['style']}"
    assert compared[0].nearest.tobytes() == compared[0].drawn.tobytes()
    write_sheet(compared, tmp_path / "sheet.png")
    image = load_image(tmp_path / "sheet.png")
    assert image.size[0] > 6 * 96
    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 100
    with pytest.raises(DataError, match="cannot be written"):
        write_sheet(compared, tmp_path / "none" / "sheet.png")
    with pytest.raises(DataError, match="two at least"):
        judge_drawings(model, processor, network, "validation", limit=1)
