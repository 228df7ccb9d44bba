"""`ett serve` as its users start it, a process of its own, with OpenAI's own client before it: all that it can, and its end."""

from __future__ import annotations

import base64
import io
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import PIL.Image
import pytest

from ett.generate.chat import answer
from ett.images import from_array
from ett.model.image_sampling import ImageSampling
from tests.evaluate.conftest import Toy, picture
from tests.serve.conftest import build_drawing, command, question


@pytest.fixture(scope="module")
def both() -> Toy:
    """A toy that answers and draws."""
    return build_drawing(512)


@pytest.fixture(scope="module")
def folder(both: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "both"
    for part in both:
        part.save_pretrained(path)
    return path


def opened(drawn: Any) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(drawn.data[0].b64_json))).convert("RGB"), np.int16)


def test_the_client_does_everything_and_a_stop_loses_nothing(both: Toy, folder: Path) -> None:
    model, processor = both
    wanted = model.generate_images(
        **processor.drawing_inputs(["a cat"]), grid=(8, 8), seeds=[5], sampling=ImageSampling()
    )
    right = np.asarray(from_array(wanted.pixel_values[0].numpy()), np.int16)
    said = answer(model, processor, picture(0), "what?", max_new_tokens=12)
    with (
        command(folder, "--max-batch", 2) as (process, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        (served,) = client.models.list().data
        assert served.id == "both"
        asked: dict[str, Any] = {"model": served.id, "messages": question(), "max_completion_tokens": 12}
        assert client.chat.completions.create(**asked).choices[0].message.content == said
        streamed = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
        assert "".join(each.delta.content or "" for each in streamed).strip() == said
        assert streamed[-1].finish_reason in ("stop", "length")

        def draw(seed: int) -> np.ndarray:
            return opened(
                client.images.generate(
                    model=served.id, prompt="a cat", response_format="b64_json", extra_body={"seed": seed}
                )
            )

        # another process may add in another order: less than a step of 8 bits
        assert np.abs(draw(5) - right).max() <= 1

        long: dict[str, Any] = {**asked, "max_completion_tokens": 300, "temperature": 2.0}

        def chat(seed: int) -> str:
            whole = client.chat.completions.create(**long, seed=seed)
            assert whole.usage is not None
            return whole.choices[0].finish_reason

        def stream(seed: int) -> str | None:
            chunks = list(client.chat.completions.create(**long, seed=seed, stream=True))
            return chunks[-1].choices[0].finish_reason

        kinds: list[Callable[[int], Any]] = [chat, stream, draw]
        with httpx.Client() as looking, ThreadPoolExecutor(9) as pool:
            sent = [pool.submit(kinds[i % 3], i) for i in range(9)]
            while "ett_requests_in_flight 10.0" not in looking.get(f"{url}/metrics").text:
                assert not any(each.done() for each in sent), "the model is too fast for this test: ask for more tokens"
            process.send_signal(signal.SIGTERM)
            ends = [each.result() for each in sent]
        assert all(end in ("stop", "length") for i, end in enumerate(ends) if i % 3 < 2)
        assert all(end.shape == (32, 32, 3) for end in ends[2::3])
        assert process.wait(timeout=60) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
