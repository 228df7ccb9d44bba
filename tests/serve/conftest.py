"""A live server around a toy model, in a thread of the tests' process or as `ett serve` starts it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
import yaml

from ett.config import from_mapping
from ett.model.build import ModelSpec, build_model, build_vision_tokenizer
from ett.serve.app import create_app
from ett.serve.limits import Limits
from ett.serve.served import Served
from ett.serve.server import address, bind
from tests.conftest import LANGUAGE_MODELS, TOKENIZER
from tests.evaluate.conftest import Toy, build_toy, picture


@contextmanager
def served_at(served: Served, limits: Limits | None = None, **options: Any) -> Iterator[str]:
    """The address of a live server."""
    bound = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        create_app(served, limits or Limits(), **options), http="h11", ws="none", log_level="warning"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield address(bound)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive()


@contextmanager
def command(*words: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`ett serve` with a free port: (process, address)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ett.cli", "serve", *map(str, words), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://[\w.:\[\]]+", line)
        assert found, line
        yield process, found.group()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture(scope="session")
def toy() -> Toy:
    return build_toy()


@pytest.fixture(scope="session")
def served(toy: Toy) -> Served:
    """The toy, and another one as the tokenizer before tuning."""
    model, processor = toy
    return Served("toy", model, model.vision_tokenizer, processor, build_toy(1)[0].vision_tokenizer)


def build_drawing(positions: int) -> Toy:
    """A toy that draws, whose language model reads so many tokens."""
    spec = from_mapping(
        ModelSpec,
        {
            "image_size": 32,
            "vision_tokenizer": dict(TOKENIZER),
            "language_model": {"config": {**LANGUAGE_MODELS["llama"], "max_position_embeddings": positions}},
            "image_head": {"kind": "tied"},
        },
    )
    torch.manual_seed(0)
    model, processor = build_model(spec, build_vision_tokenizer(spec))
    return model.eval(), processor


@pytest.fixture(scope="session")
def drawing() -> Served:
    model, processor = build_drawing(128)
    return Served("drawing", model, model.vision_tokenizer, processor)


@pytest.fixture(scope="module")
def live(served: Served) -> Iterator[str]:
    with served_at(served) as url:
        yield url


@pytest.fixture
def client(live: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as made:
        yield made


class Comparing:
    """A comparison's folder, two arms with two seeds of 12 steps, whose arms' logs grow as a test says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        arms = {"frozen": {"stages.0.trains": ["projector", "language_model"]}, "tuned": {}}
        recipe = {
            "name": "two arms",
            "arms": arms,
            "seeds": [0, 1],
            "reference": "tuned",
            "model": {"init": "reader_64px", "image_size": 64},
            "data": [{"source": "names"}],
            "stages": [{"stage": "semantic", "steps": 12, "batch_size": 2}],
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        (folder / "comparison.json").write_text("{}", encoding="utf-8")

    def train(self, key: str, steps: int) -> None:
        """The log of an arm after so many steps."""
        name, _, seed = key.partition(":")
        run = self.folder / name / f"seed-{seed}"
        run.mkdir(parents=True, exist_ok=True)
        events = [
            {"event": event, "stage": "semantic", "step": step, "losses": {"caption_loss": 9.0 / step + len(name)}}
            for step in range(1, steps + 1)
            for event in ("step", "validation")
        ]
        (run / "log.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in events), encoding="utf-8")


@pytest.fixture
def comparing(tmp_path: Path) -> Comparing:
    return Comparing(tmp_path / "comparing")


def data_url(seed: int = 0, width: int = 40, height: int = 30) -> str:
    buffer = io.BytesIO()
    picture(seed, width, height).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def question(text: str | None = "what?", seed: int = 0) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(seed)}}]
    if text is not None:
        content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]
