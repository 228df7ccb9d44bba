"""What `push_to_hub` uploads: the folder that `ett export` writes, seen through a hub that only remembers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import RepoUrl
from safetensors.torch import save_file
from transformers import AutoProcessor

from ett.errors import DataError
from ett.export.portable import export_model
from ett.model.ett import EttForConditionalGeneration
from ett.model.loading import load_model
from ett.model.processing import EttProcessor
from ett.tokenizers.layout_discriminator import DISCRIMINATOR_NAME
from tests.model.test_ett import build

OUTSIDE = """
import sys
sys.modules["ett"] = None  # every import of it fails
from transformers import AutoModelForImageTextToText, AutoProcessor
for auto in (AutoModelForImageTextToText, AutoProcessor):
    print(type(auto.from_pretrained(sys.argv[1], trust_remote_code=True)).__module__)
"""


class Hub:
    """A stand-in for `HfApi` that keeps what is sent, in a folder."""

    folder: Path
    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, token: str | None = None) -> None:
        self.calls.append(("login", {"token": token}))

    def create_repo(self, repository: str, **kwargs: Any) -> RepoUrl:
        self.calls.append(("create_repo", {"repository": repository, **kwargs}))
        return RepoUrl(f"https://huggingface.co/{repository if '/' in repository else f'me/{repository}'}")

    def create_branch(self, **kwargs: Any) -> None:
        self.calls.append(("create_branch", kwargs))

    def upload_folder(self, *, folder_path: Path, **kwargs: Any) -> str:
        self.calls.append(("upload_folder", kwargs))
        shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)
        return "a commit"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    class Here(Hub):
        folder = tmp_path / "hub"
        calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012  # of this test alone

    monkeypatch.setattr("ett.export.hub.HfApi", Here)
    return Here


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_is_pushed_as_it_is_exported(toy_run: Path, tmp_path: Path, hub: type[Hub]) -> None:
    """Weights, processor, code and card, byte for byte."""
    source = toy_run / "stages" / "3-chat"
    metrics = tmp_path / "figures.json"
    figure = {"value": 0.5, "interval": None, "num_examples": 12}
    metrics.write_text(json.dumps({"metrics": {"exact_match": figure}}), encoding="utf-8")
    exported = export_model(source, tmp_path / "exported", license_name="mit", metrics=metrics)
    model, _ = load_model(source)
    options: dict[str, Any] = {"private": True, "token": "secret", "revision": "new", "commit_message": "Done"}
    assert model.push_to_hub("mine", license_name="mit", metrics=metrics, **options) == "a commit"
    assert files(hub.folder) == files(exported)
    said = dict(hub.calls)
    assert said["login"] == {"token": "secret"}
    assert said["create_repo"] == {"repository": "mine", "private": True, "exist_ok": True}
    assert said["create_branch"] == {"repo_id": "me/mine", "branch": "new", "exist_ok": True}
    assert (said["upload_folder"]["commit_message"], said["upload_folder"]["revision"]) == ("Done", "new")
    with pytest.raises(DataError, match="ett evaluate"):
        model.push_to_hub("mine", metrics=source / "config.json")


def test_saving_can_push(toy_run: Path, tmp_path: Path, hub: type[Hub]) -> None:
    """What is saved stays as it was; what is sent is whole, and nothing else of the folder goes along."""
    source = toy_run / "stages" / "3-chat"
    model, _ = load_model(source)
    model.save_pretrained(tmp_path / "plain")
    assert not hub.calls
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "notes.txt").write_text("mine", encoding="utf-8")
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, max_shard_size="20KB", tags="letters", token="secret")
    assert dict(hub.calls)["create_repo"]["repository"] == "saved"
    assert "README.md" not in files(tmp_path / "saved")
    sent = files(hub.folder)
    assert "notes.txt" not in sent
    assert "model.safetensors.index.json" in sent, "more than one file of weights"
    assert {"processor_config.json", "modeling_ett.py", "processing_ett.py"} <= set(sent)
    _, header, body = sent["README.md"].decode().split("---\n", 2)
    assert "letters" in yaml.safe_load(header)["tags"]
    assert "| semantic | vision_tokenizer, projector, language_model | 3 | 4 |" in body, "as in the file it came from"
    model.save_pretrained(tmp_path / "other", push_to_hub=True, is_main_process=False, repo_id="other")
    assert "other" not in [options.get("repository") for _, options in hub.calls], "one process pushes"


def test_a_discriminator_stays_at_home(toy_run: Path, tmp_path: Path, hub: type[Hub]) -> None:
    """It lies beside a stage's model, and is no part of it: not uploaded, and the weights count as the run's."""
    run = tmp_path / "run"
    shutil.copytree(toy_run, run)
    stage = run / "stages" / "3-chat"
    save_file({"discriminator.main.0.bias": torch.zeros(4)}, stage / DISCRIMINATOR_NAME)
    model, _ = load_model(stage)
    model.save_pretrained(stage, push_to_hub=True, repo_id="mine")
    sent = files(hub.folder)
    assert "model.safetensors" in sent
    assert DISCRIMINATOR_NAME not in sent
    assert "Not known" not in sent["README.md"].decode()


def test_a_card_tells_nothing_of_weights_that_changed(toy_run: Path, hub: type[Hub]) -> None:
    """Trained further since they were loaded: recipe and losses of the folder are not theirs. Rounded ones are still."""
    model, _ = load_model(toy_run / "stages" / "3-chat")
    model.push_to_hub("same")
    assert "The whole recipe" in (hub.folder / "README.md").read_text(encoding="utf-8")
    model.to(torch.bfloat16).push_to_hub("rounded")
    assert "The whole recipe" in (hub.folder / "README.md").read_text(encoding="utf-8")
    with torch.no_grad():
        model.projector.layers[0].weight.add_(1)
    model.push_to_hub("me/changed", private=False)
    card = (hub.folder / "README.md").read_text(encoding="utf-8")
    assert "# changed\n" in card
    assert "## Training\n\nNot known" in card
    assert "The whole recipe" not in card


def test_adapters_are_merged_in_what_is_pushed_alone(hub: type[Hub]) -> None:
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model, processor = build("qwen2", lora=lora)
    model.push_to_hub("mine", processor=processor)
    assert model.config.lora is not None, "it can be trained on"
    plain = load_model(hub.folder)[0]
    assert plain.config.lora is None
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model.eval()(ids).logits, atol=1e-5)


def test_model_and_processor_pushed_apart(tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    """As is the habit with transformers, in either order: together they are whole, and the model's card stays."""
    model, processor = build("llama")
    model.push_to_hub("mine")
    assert "| pictures |" not in (hub.folder / "README.md").read_text(encoding="utf-8")
    assert "processor_config.json" not in files(hub.folder)
    card = files(hub.folder)["README.md"]
    assert processor.push_to_hub("mine", commit_message="words") == "a commit"
    assert files(hub.folder)["README.md"] == card
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    done = subprocess.run([sys.executable, "-c", OUTSIDE, hub.folder], capture_output=True, text=True, check=True)
    assert all(line.startswith("transformers_modules") for line in done.stdout.splitlines())
    processor.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="again")
    assert dict(hub.calls)["create_repo"]["repository"] == "again"
    assert "processing_ett.py" not in files(tmp_path / "saved")
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "saved"), EttProcessor)


def test_a_processor_takes_what_transformers_methods_take(toy_run: Path, tmp_path: Path, hub: type[Hub]) -> None:
    _, processor = load_model(toy_run / "stages" / "3-chat")
    processor.push_to_hub("mine", tags=["small"], max_shard_size="1GB", private=True)
    processor.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="mine", tags="small")
    assert [options["commit_message"] for name, options in hub.calls if name == "upload_folder"] == [
        "Processor and code"
    ] * 2


def test_generated_code_leaves_sharing_to_transformers(toy_run: Path, hub: type[Hub]) -> None:
    model, _ = load_model(toy_run / "stages" / "3-chat")
    model.push_to_hub("mine")
    for name in ("modeling_ett.py", "processing_ett.py"):
        assert "push_to_hub" not in (hub.folder / name).read_text(encoding="utf-8")
    assert EttForConditionalGeneration.push_to_hub.__doc__ is not None
