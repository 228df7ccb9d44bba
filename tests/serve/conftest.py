"""A live server around a toy model, in a thread of the tests' process."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
import torch
import uvicorn

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


@pytest.fixture(scope="session")
def toy() -> Toy:
    return build_toy()


@pytest.fixture(scope="session")
def served(toy: Toy) -> Served:
    """The toy, and another one as the tokenizer before tuning."""
    model, processor = toy
    return Served("toy", model, model.vision_tokenizer, processor, build_toy(1)[0].vision_tokenizer)


@pytest.fixture(scope="session")
def drawing() -> Served:
    """A toy that draws."""
    spec = from_mapping(
        ModelSpec,
        {
            "image_size": 32,
            "vision_tokenizer": dict(TOKENIZER),
            "language_model": {"config": {**LANGUAGE_MODELS["llama"], "max_position_embeddings": 128}},
            "image_head": {"kind": "tied"},
        },
    )
    torch.manual_seed(0)
    model, processor = build_model(spec, build_vision_tokenizer(spec))
    return Served("drawing", model.eval(), model.vision_tokenizer, processor)


@pytest.fixture(scope="module")
def live(served: Served) -> Iterator[str]:
    with served_at(served) as url:
        yield url


@pytest.fixture
def client(live: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as made:
        yield made


def data_url(seed: int = 0, width: int = 40, height: int = 30) -> str:
    buffer = io.BytesIO()
    picture(seed, width, height).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def question(text: str | None = "what?", seed: int = 0) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(seed)}}]
    if text is not None:
        content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]
