"""An exported model loads, and computes the same, in a process that cannot import this package."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ett.errors import DataError, ModelError
from ett.export.bundle import Bundle, Shape
from ett.export.card import model_card
from ett.export.portable import export_model, modeling_source, processing_source
from ett.generate.chat import answer
from ett.images import load_image
from ett.model.loading import find_weights, load_model
from ett.tokenizers import VisionTokenizer
from tests.conftest import TOKENIZER
from tests.model.test_ett import build

OUTSIDE = """
import sys
sys.modules["ett"] = None  # every import of it fails
import torch
from pathlib import Path
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
picture = sys.argv[1]
chat = [{"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": "What?"}]}]
for folder in map(Path, sys.argv[2:]):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    assert type(processor.image_processor).__module__.startswith("transformers_modules")
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=[processor.image_token_id])
    indices = model.vision_tokenizer.tokenize(inputs["pixel_values"])
    found = {
        **inputs,
        "logits": logits,
        "indices": indices,
        "pixels": model.vision_tokenizer.detokenize(indices),
        "words": processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True),
    }
    torch.save(found, folder / "found.pt")
pipeline("image-text-to-text", model=model, processor=processor)(text=chat, max_new_tokens=2)
assert not any(name.split(".")[0] == "ett" and module is not None for name, module in sys.modules.items())
"""

LIBRARIES = {"diffusers", "huggingface_hub", "numpy", "peft", "PIL", "tokenizers", "torch", "transformers"}
LFQ = {key: value for key, value in TOKENIZER.items() if key != "codebook_dim"} | {"tokenizer_type": "lfq"}
FSQ = {key: value for key, value in LFQ.items() if key != "codebook_size"} | {
    "tokenizer_type": "fsq",
    "levels": [5, 5, 3],
}
CASES: dict[str, dict[str, Any]] = {
    "ibq_index_lora": {
        "visual_input": "index",
        "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False},
    },
    "fsq": {"vision_tokenizer": FSQ},
    "lfq": {"vision_tokenizer": LFQ},
}


def run_outside(folders: list[Path], picture: Path, tmp_path: Path) -> None:
    """A process without this package loads each folder and leaves ``found.pt`` in it."""
    result = subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(picture), *map(str, folders)],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr


def check_equal(source: Path, exported: Path, picture: Path) -> None:
    model, processor = load_model(source)
    found = torch.load(exported / "found.pt", weights_only=True)
    inputs = {key: found[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    ours = processor.image_processor(load_image(picture), return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], ours)
    with torch.no_grad():
        # merged adapters round otherwise
        exact = {"rtol": 1e-4, "atol": 1e-5} if model.config.lora else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found["logits"], model(**inputs).logits, **exact)
    indices = model.vision_tokenizer.tokenize(ours)
    assert torch.equal(found["indices"], indices)
    assert torch.equal(found["pixels"], model.vision_tokenizer.detokenize(indices))
    assert found["words"].strip() == answer(model, processor, load_image(picture), "What?", max_new_tokens=6)


def test_exports_compute_the_same_without_the_package(toy_run: Path, tmp_path: Path) -> None:
    """A run's model, tokenizers without a table, an index table, and adapters, which are merged."""
    sources = {"run": toy_run / "stages" / "3-chat"}
    for name, changes in CASES.items():
        sources[name] = tmp_path / f"{name}-model"
        for part in build("qwen2", **changes):
            part.save_pretrained(sources[name])
    picture = toy_run.parent / "pictures" / "3.png"
    folders = {name: export_model(source, tmp_path / "new" / name) for name, source in sources.items()}
    assert json.loads((folders["ibq_index_lora"] / "config.json").read_text(encoding="utf-8"))["lora"] is None
    run_outside(list(folders.values()), picture, tmp_path)
    for name, source in sources.items():
        check_equal(source, folders[name], picture)


def test_the_card_tells_what_the_run_knows(toy_run: Path, tmp_path: Path) -> None:
    source = toy_run / "stages" / "3-chat"
    metrics = tmp_path / "figures.json"
    figure = {"value": 0.5, "interval": [0.25, 0.75], "num_examples": 12}
    metrics.write_text(json.dumps({"metrics": {"exact_match": figure}}), encoding="utf-8")
    out = export_model(source, tmp_path / "out", license_name="apache-2.0", metrics=metrics)
    weights = [load_model(folder)[0].projector.layers[0].weight for folder in (out, source)]
    assert torch.equal(*weights), "the folder is still one of ours"
    _, header, body = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "apache-2.0"
    assert yaml.safe_load(header)["pipeline_tag"] == "image-text-to-text"
    assert "| semantic | vision_tokenizer, projector, language_model | 3 | 4 |" in body
    assert "`manifest.jsonl`" in body
    assert "# run\n" in body, "the run's folder names it"
    assert "started from" not in body, "weights were fresh"
    assert "| exact_match | 0.5000 | [0.2500, 0.7500] | 12 |" in body
    assert str(toy_run.parent) not in body, "of files, the name alone"
    with pytest.raises(ModelError, match="not empty"):
        export_model(source, out)
    with pytest.raises(DataError, match="ett evaluate"):
        export_model(source, tmp_path / "third", metrics=source / "config.json")
    assert not (tmp_path / "third").exists()


def test_the_card_tells_no_folders(toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither absolute ones nor relative ones; a hub's id stays, for its licence counts."""
    run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["data"] = [
        {"source": "manifest", "path": "customers/acme/photos/mine.jsonl", "image_root": "customers/acme/private"},
        {"source": "shards", "path": "customers/acme/shards/train-*.tar", "prompt": "either/or {answer}"},
        {"source": "shards", "path": "https://host/acme/{000..039}.tar?sig=s3cr3t&sv=1#s3cr3t"},
        {"source": "table", "path": "zip://all.csv::s3://acme/rows.zip?key=s3cr3t"},
        {"source": "facts"},
    ]
    recipe["model"] |= {
        "vision_tokenizer": {"path": "customers/acme/tokenizer"},
        "language_model": {"path": "owner/name"},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    model, processor = load_model(run / "stages" / "3-chat")
    card = model_card(run / "stages" / "3-chat", model, processor)
    assert "acme" not in card
    assert "s3cr3t" not in card, "an address may end in its owner's key"
    for told in (
        "`mine.jsonl`",
        "path: mine.jsonl",
        "image_root: private",
        "train-*.tar",
        "`{000..039}.tar`",
        "either/or {answer}",
        "on the names",
    ):
        assert told in card, told
    assert "- vision tokenizer: `tokenizer`\n- language model: `owner/name`" in card
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "owner" not in model_card(run / "stages" / "3-chat", model, processor), "a folder, not a hub's"


def test_the_card_of_a_model_outside_a_run(toy_run: Path, tmp_path: Path) -> None:
    """A shipped model's recipe is known; of any other folder the card says that nothing is."""
    folder = Path(shutil.copytree(toy_run / "stages" / "3-chat", tmp_path / "alone"))
    parts = load_model(folder)
    card = model_card(folder, *parts)
    assert "## Training\n\nNot known" in card
    assert "### Data" not in card
    shipped = find_weights("reader_64px")
    card = model_card(shipped, *load_model(shipped))
    assert "# reader_64px\n" in card
    assert "| align | projector, language_model | 6,000 | 32 |" in card
    assert "### Data\n\n- text drawn in open fonts" in card
    assert "shipped with ett-tuning" in card


@pytest.mark.parametrize("kind", VisionTokenizer.registry)
def test_the_files_need_no_more_than_the_libraries(kind: str) -> None:
    """Every name is defined, nothing is of this package or for training, and few enough lines are there to be read."""
    # the source depends on the class alone: libraries' tokenizers need not be built
    tokenizer = object.__new__(VisionTokenizer.registry[kind])
    for text in (modeling_source(tokenizer), processing_source()):
        tree = ast.parse(text)
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert {module.split(".")[0] for module in modules} <= LIBRARIES | sys.stdlib_module_names
        assert len(text.splitlines()) < 2100
        for word in ("caption_loss(", ".backward()", "index_backprop("):
            assert word not in text
        command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", "-"]
        checked = subprocess.run(command, input=text, text=True, check=False, capture_output=True)
        assert checked.returncode == 0, checked.stdout


def test_two_definitions_of_one_name_are_refused() -> None:
    shape = Shape((("ett.tokenizers.fsq", "_check"), ("ett.tokenizers.lfq", "_check")))
    with pytest.raises(AssertionError, match="_check is defined in"):
        Bundle(shape).text()
