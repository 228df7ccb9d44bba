"""The lines of docs/serving.md run, and say what they claim."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import openai
import PIL.Image
import pytest
import torch
from transformers import AutoModelForCausalLM

import ett
from ett.cli import build_parser
from ett.generate.chat import answer, stop_ids
from ett.serve.served import Served
from tests.evaluate.conftest import Toy
from tests.serve.conftest import served_at

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
CLIENT, ENGINE = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_client(served: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with served_at(served) as url:

        class Here(openai.OpenAI):
            def __init__(self, base_url: str, **options: Any) -> None:
                assert base_url == "http://127.0.0.1:8000/v1"
                super().__init__(base_url=f"{url}/v1", **options)

        monkeypatch.setattr(openai, "OpenAI", Here)
        names: dict[str, Any] = {}
        exec(compile(CLIENT, "serving.md", "exec"), names)
        names["client"].close()
    said = capsys.readouterr().out
    model, processor = served.model, served.processor
    assert model is not None
    assert said == answer(model, processor, "docs/figures/example.png", "What is this?", max_new_tokens=128) + "\n"


def test_an_engine_says_the_same(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ett, "load_model", lambda _: toy, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    names: dict[str, Any] = {}
    exec(compile(ENGINE, "serving.md", "exec"), names)
    engine: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "engine").eval()
    embeds = names["prompt_embeds"][None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
    ids = engine.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=stop_ids(*toy),
        pad_token_id=toy[1].pad_token_id,
        suppress_tokens=[toy[1].image_token_id],
    )
    said = toy[1].tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert said == answer(*toy, ROOT / "docs" / "figures" / "example.png", "What is this?", max_new_tokens=20)


def test_every_tab_has_its_pictures() -> None:
    """At both widths, in the documents and by the tool that takes them."""
    page = (ROOT / "ett" / "serve" / "page" / "index.html").read_text(encoding="utf-8")
    tool = (ROOT / "tools" / "screenshots.py").read_text(encoding="utf-8")
    tabs = re.findall(r'role="tab" id="tab-(\w+)"', page)
    assert len(tabs) >= 4
    for tab in tabs:
        assert re.search(rf'^        "{tab}": \(', tool, flags=re.MULTILINE), (
            f"tools/screenshots.py does not take {tab}"
        )
        for width in (1200, 390):
            name = f"figures/serve-{tab}-{width}.png"
            assert name in TEXT, f"docs/serving.md does not show {name}"
            with PIL.Image.open(ROOT / "docs" / name) as shown:
                assert shown.width == width


def test_options_and_links_exist() -> None:
    (commands,) = [a for a in build_parser()._actions if isinstance(a.choices, dict)]
    known = {option for action in commands.choices["serve"]._actions for option in action.option_strings}  # type: ignore[index]
    limits = re.findall(r"^\| `(--[\w-]+)`", TEXT, flags=re.MULTILINE)
    assert len(limits) == 8
    for option in re.findall(r"(--[a-z][\w-]+)", TEXT):
        assert option in known or option == "--enable-prompt-embeds", option
    for link in re.findall(r"\]\(((?!http|#)[^)]+)\)", TEXT):
        assert (ROOT / "docs" / link.partition("#")[0]).exists(), link
