"""The API as OpenAI's own client meets it: answers, streams, pictures, and errors in the shape it knows."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import PIL.Image
import pytest

from ett.generate.chat import answer
from ett.generate.reconstruct import reconstruct
from ett.images import from_array
from ett.model.image_sampling import ImageSampling
from ett.serve.limits import Limits
from ett.serve.served import Served
from tests.evaluate.conftest import Toy, picture
from tests.serve.conftest import data_url, question, served_at

KEY = "a-key-of-the-tests-0123456789"


def opened(encoded: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")


def metric(live: str, name: str) -> float:
    """The sum over labels of one metric."""
    lines = httpx.get(f"{live}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition(" ")[0].partition("{")[0] == name)


def raw(live: str, sent: str) -> int:
    """The status of the answer to these characters."""
    host, port = live.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(sent.encode())
        return int(connection.recv(1000).split()[1])


# -- answers -----------------------------------------------------------------------------------------------------------


def test_the_client_chats_with_a_picture(client: openai.OpenAI, toy: Toy) -> None:
    found = client.chat.completions.create(model="toy", messages=question(), max_completion_tokens=12)  # type: ignore[arg-type]
    assert found.choices[0].message.content == answer(*toy, picture(0), "what?", max_new_tokens=12)
    assert found.choices[0].finish_reason in ("stop", "length")
    assert found.usage is not None
    assert found.usage.prompt_tokens == 16 + len("what?\n")
    assert found.usage.completion_tokens <= 12
    wordless = client.chat.completions.create(model="toy", messages=question(None), max_tokens=12)  # type: ignore[arg-type]
    assert wordless.choices[0].message.content == answer(*toy, picture(0), max_new_tokens=12)


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": "toy", "messages": question(), "max_tokens": 30, "temperature": 1.5, "seed": 5}
    whole = client.chat.completions.create(**given)
    chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(map(bool, pieces)) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stop_text_ends_the_answer(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": "toy", "messages": question(), "max_tokens": 30, "temperature": 1.5, "seed": 5}
    whole = client.chat.completions.create(**given).choices[0].message.content
    assert whole
    stop = next(char for char in whole[3:] if char.strip())
    cut = client.chat.completions.create(**given, stop=[stop]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)].rstrip()
    assert cut.finish_reason == "stop"


def test_requests_that_arrive_together_are_answered_together(live: str, client: openai.OpenAI, toy: Toy) -> None:
    before, batches = metric(live, "ett_batch_size_sum"), metric(live, "ett_batch_size_count")

    def ask(seed: int) -> str | None:
        given: Any = question("what?", seed)
        return client.chat.completions.create(model="toy", messages=given, max_tokens=10).choices[0].message.content

    with ThreadPoolExecutor(12) as pool:
        said = list(pool.map(ask, range(12)))
    assert said == [answer(*toy, picture(seed), "what?", max_new_tokens=10) for seed in range(12)]
    assert metric(live, "ett_batch_size_sum") - before == 12
    assert metric(live, "ett_batch_size_count") - batches < 12


def test_neutral_parameters_change_nothing(client: openai.OpenAI, toy: Toy) -> None:
    found = client.chat.completions.create(
        model="toy", messages=question(), max_tokens=8, n=1, user="somebody", frequency_penalty=0, logprobs=False,  # type: ignore[arg-type]
        presence_penalty=0.0, response_format={"type": "text"}, store=False, metadata={"a": "b"},
    )  # fmt: skip
    assert found.choices[0].message.content == answer(*toy, picture(0), "what?", max_new_tokens=8)


def test_models_health_and_metrics(live: str, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("toy").id == "toy"
    assert model.model_extra is not None
    assert model.model_extra["ett"]["codebook_size"] == 64
    with pytest.raises(openai.NotFoundError, match="'toy' is"):
        client.models.retrieve("other")
    assert httpx.get(f"{live}/health").json()["status"] == "ok"
    metrics = httpx.get(f"{live}/metrics")
    assert 'ett_requests_total{route="/health",status="200"}' in metrics.text
    assert "process_resident_memory_bytes" in metrics.text


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_a_picture_through_the_tokenizer(live: str, served: Served) -> None:
    found = httpx.post(f"{live}/v1/images/reconstructions", json={"image": data_url(3), "initial": True}).json()
    size = served.processor.image_processor
    (after,) = reconstruct(served.tokenizer, size, [picture(3)])
    assert served.initial is not None
    (before,) = reconstruct(served.initial, size, [picture(3)])
    assert (found["width"], found["height"], found["codebook_size"]) == (32, 24, 64)
    assert np.array_equal(opened(found["original"]["b64_json"]), after.original)
    for given, expected in ((found["data"][0], after), (found["initial"], before)):
        assert np.array_equal(opened(given["b64_json"]), expected.image)
        assert given["indices"] == expected.indices.tolist()
        assert given["psnr"] == pytest.approx(expected.psnr, abs=1e-3)
    alone = httpx.post(f"{live}/v1/images/reconstructions", json={"image": data_url(3)}).json()
    assert alone["data"] == found["data"]
    assert "initial" not in alone


def test_a_model_without_image_head_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="has no image head") as caught:
        client.images.generate(model="toy", prompt="a cat")
    assert caught.value.status_code == 501


def test_the_client_draws(drawing: Served) -> None:
    assert drawing.model is not None
    wanted = drawing.model.generate_images(
        **drawing.processor.drawing_inputs(["a cat"] * 2), grid=(8, 8), seeds=[5, 6], sampling=ImageSampling()
    )
    with served_at(drawing) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        found = client.images.generate(model="drawing", prompt="a cat", n=2, size="auto", extra_body={"seed": 5})
        assert found.data is not None
        for each, pixels in zip(found.data, wanted.pixel_values, strict=True):
            assert each.b64_json is not None
            assert np.array_equal(opened(each.b64_json), from_array(pixels.numpy()))
        wide = client.images.generate(model="drawing", prompt="a cat", size="32x16")
        assert wide.data is not None
        assert wide.data[0].b64_json is not None
        assert opened(wide.data[0].b64_json).size == (32, 16)
        plain = {"guidance": 1.0, "temperature": 0.0}
        twice = client.images.generate(model="drawing", prompt="a cat", n=2, extra_body=plain)
        assert twice.data is not None
        assert twice.data[0].b64_json == twice.data[1].b64_json
        for wrong, said in (
            ({"prompt": ""}, "prompt"),
            ({"prompt": "a" * 100}, "the language model has 128"),
            ({"prompt": "<|ett_image|>"}, "reserved"),
            ({"n": 9}, "at most 8"),
            ({"prompt": " "}, "no words"),
            ({"size": "1024x1024"}, "the language model has 128"),
            ({"size": "32x33"}, "multiples of 4"),
            ({"size": "large"}, "size"),
            ({"response_format": "url"}, "response_format"),
            ({"extra_body": {"guidance": -1}}, "guidance"),
        ):
            with pytest.raises(openai.BadRequestError, match=said):
                client.images.generate(**{"model": "drawing", "prompt": "a cat", **wrong})
        said = client.chat.completions.create(**{**chat(max_tokens=3), "model": "drawing"})
        assert said.choices[0].finish_reason


def test_a_tokenizer_alone_reconstructs(served: Served) -> None:
    alone = Served("alone", None, served.tokenizer, served.processor)
    with served_at(alone) as url:
        found = httpx.post(f"{url}/v1/images/reconstructions", json={"image": data_url()})
        assert found.status_code == 200
        refused = httpx.post(f"{url}/v1/images/reconstructions", json={"image": data_url(), "initial": True})
        assert refused.json()["error"]["param"] == "initial"
        refused = httpx.post(f"{url}/v1/chat/completions", json={"messages": question()})
        assert refused.status_code == 501
        assert "vision tokenizer alone" in refused.json()["error"]["message"]


# -- what is refused ---------------------------------------------------------------------------------------------------

TEXT = {"type": "text", "text": "hi"}


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, **changes}


def showing(url: object) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, TEXT]}])


BAD_CHATS: dict[str, tuple[dict[str, Any], int, str]] = {
    "no messages": ({"model": "toy"}, 400, "messages"),
    "empty messages": (chat(messages=[]), 400, "messages"),
    "messages of another type": (chat(messages="hi"), 400, "messages"),
    "a role that is unknown": (chat(messages=[{"role": "boss", "content": "hi"}]), 400, "messages.0.role"),
    "no content": (chat(messages=[{"role": "user"}]), 400, "messages.0.content"),
    "null content": (chat(messages=[{"role": "user", "content": None}]), 400, "messages.0.content"),
    "a part of unknown kind": (chat(messages=[{"role": "user", "content": [{"type": "video"}]}]), 400, "content.0"),
    "a part without text": (chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), 400, "content.0.text"),
    "a drawn answer": (
        chat(messages=[{"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]),
        400,
        "messages.0",
    ),
    "nothing to answer": (chat(messages=[{"role": "assistant", "content": "hi"}]), 400, "messages"),
    "half of a surrogate pair": (chat(messages=[{"role": "user", "content": "\ud800"}]), 400, "text"),
    "the placeholder": (chat(messages=[{"role": "user", "content": "<|ett_image|>"}]), 400, "reserved"),
    "another model": (chat(model="gpt-4o"), 404, "model"),
    "an unknown parameter": (chat(tempreature=1), 400, "tempreature"),
    "an unsupported parameter": (chat(n=2), 400, "n is not supported"),
    "tools": (chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools"),
    "JSON mode": (chat(response_format={"type": "json_object"}), 400, "response_format"),
    "a temperature below 0": (chat(temperature=-1), 400, "temperature"),
    "a temperature that is text": (chat(temperature="hot"), 400, "temperature"),
    "a top_p above 1": (chat(top_p=1.1), 400, "top_p"),
    "no tokens": (chat(max_tokens=0), 400, "max_tokens"),
    "half a token": (chat(max_tokens=1.5), 400, "max_tokens"),
    "too many tokens": (chat(max_tokens=10**6), 400, "at most 1024"),
    "two lengths": (chat(max_completion_tokens=2), 400, "not both"),
    "a huge seed": (chat(seed=10**30), 400, "seed"),
    "five stops": (chat(stop=["a", "b", "c", "d", "e"]), 400, "stop"),
    "an empty stop": (chat(stop=""), 400, "stop"),
    "too many words": (chat(messages=[{"role": "user", "content": "a" * 40_000}]), 400, "40000 characters"),
    "a prompt longer than the model": (chat(messages=[{"role": "user", "content": "a" * 3_000}]), 400, "positions"),
    "too many pictures": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}] * 9}]),
        400,
        "9 pictures",
    ),
    "a remote picture": (showing("https://example.com/cat.png"), 400, "not fetched"),
    "a picture of this machine": (showing("http://127.0.0.1:1/secret"), 400, "not fetched"),
    "a file": (showing("file:///etc/passwd"), 400, "not a data URL"),
    "a path": (showing("/etc/passwd"), 400, "not a data URL"),
    "an empty URL": (showing(""), 400, "not a data URL"),
    "a number for a URL": (showing(5), 400, "messages.0.content.0.image_url.url"),
    "a data URL of text": (showing("data:text/plain,hello"), 400, "base64"),
    "damaged base64": (showing("data:image/png;base64,@@@@"), 400, "not valid base64"),
    "an empty picture": (showing("data:image/png;base64,"), 400, "empty"),
    "no picture": (showing("data:image/png;base64," + base64.b64encode(b"hello").decode()), 400, "not a picture"),
    "half a picture": (showing(data_url()[: len("data:image/png;base64,") + 400]), 400, "damaged"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_malformed_chats_are_refused(live: str, name: str) -> None:
    body, status, said = BAD_CHATS[name]
    sent = json.dumps(body).encode()
    found = httpx.post(f"{live}/v1/chat/completions", content=sent, headers={"Content-Type": "application/json"})
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in f"{error['param']}: {error['message']}"
    assert error["type"] == "invalid_request_error"
    assert error["code"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"text"', 400),
        (b"\xff\xfe\x00", 400),
        (b"[" * 100_000, 400),
        (b'{"messages": NaN}', 400),
        (b'{"temperature": ' + b"9" * 5000 + b', "messages": [{"role": "user", "content": "hi"}]}', 400),
        (json.dumps(chat()).encode() + b"}", 400),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_bodies_that_are_no_request(live: str, content: bytes, status: int) -> None:
    found = httpx.post(f"{live}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert found.status_code == status, found.text
    assert found.json()["error"]["message"]


def test_the_client_reads_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not fetched") as caught:
        client.chat.completions.create(**showing("https://example.com/a.png"))
    assert caught.value.code == "remote_picture"
    assert caught.value.param == "messages.0.content.0.image_url.url"


def test_large_pictures_by_header_alone(served: Served) -> None:
    with served_at(served, Limits(max_pixels=1000)) as url:
        found = httpx.post(f"{url}/v1/chat/completions", json=showing(data_url(0, 40, 30)))
        assert found.status_code == 400
        assert "Allowed: 1000 pixels" in found.json()["error"]["message"]
        assert httpx.post(f"{url}/v1/chat/completions", json=showing(data_url(0, 40, 25))).status_code == 200


def test_large_bodies(served: Served) -> None:
    with served_at(served, Limits(max_body=5000, body_seconds=1)) as url:
        large = json.dumps(chat(user="a" * 6000)).encode()
        kind = {"Content-Type": "application/json"}
        for content in (large, (large[i : i + 100] for i in range(0, len(large), 100))):
            found = httpx.post(f"{url}/v1/chat/completions", content=content, headers=kind)
            assert found.status_code == 413
            assert found.json()["error"]["code"] == "request_too_large"
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        assert raw(url, head + "Content-Length: 50\r\n\r\n{") == 408
        assert raw(url, head + "Content-Length: 999999999999\r\n\r\n{") == 413
        assert raw(url, head + "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n") == 408
        assert httpx.post(f"{url}/v1/chat/completions", json=chat()).status_code == 200


def test_other_ways_to_ask(live: str) -> None:
    assert httpx.post(f"{live}/v1/nothing", json={}).json()["error"]["code"] == "not_found"
    assert httpx.get(f"{live}/v1/chat/completions").status_code == 405
    form = httpx.post(f"{live}/v1/chat/completions", data={"messages": "hi"})
    assert (form.status_code, form.json()["error"]["code"]) == (415, "unsupported_media_type")
    for length in ("-1", "abc", "9" * 30):
        assert (
            raw(live, f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n")
            == 400
        )


def test_keys(served: Served) -> None:
    with served_at(served, keys=[KEY, "another-key-of-the-tests"]) as url:
        for key in ("wrong", KEY[:-1], KEY + "x"):
            wrong = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
            with wrong, pytest.raises(openai.AuthenticationError, match="No valid API key"):
                wrong.models.list()
        for key in (KEY, "another-key-of-the-tests"):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as client:
                assert client.models.list().data[0].id == "toy"
        for path in ("/v1/models", "/metrics", "/run/report", "/openapi.json"):
            assert httpx.get(f"{url}{path}").status_code == 401
        for path in ("/", "/health", "/page/page.js"):
            assert httpx.get(f"{url}{path}").status_code == 200


def test_hosts(served: Served) -> None:
    with served_at(served, hosts={"127.0.0.1", "demo.example"}) as url:
        for host, status in (("demo.example", 200), ("demo.example:443", 200), ("evil.example", 421), ("", 421)):
            assert httpx.get(f"{url}/health", headers={"Host": host}).status_code in (
                status,
                400 if not host else status,
            )


def test_more_requests_than_allowed_come_back_later(served: Served) -> None:
    with served_at(served, Limits(max_requests=2, max_batch=1)) as url, ThreadPoolExecutor(12) as pool:
        body = chat(max_tokens=40)
        found = list(pool.map(lambda _: httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60), range(12)))
        codes = [each.status_code for each in found]
        assert set(codes) == {200, 429}
        refused = found[codes.index(429)]
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"


@contextlib.contextmanager
def slow_model(served: Served, seconds: float = 0.02) -> Iterator[None]:
    """A model that takes this long for each token at least, however fast the machine."""
    assert served.model is not None
    hook = served.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        hook.remove()


def test_nobody_waits_for_ever(served: Served) -> None:
    with (
        slow_model(served),
        served_at(served, Limits(seconds=1)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        long: dict[str, Any] = {**chat(max_tokens=1000), "temperature": 2.0, "seed": 1}
        started = time.monotonic()
        with pytest.raises(openai.InternalServerError, match="No answer within 1 seconds"):
            client.chat.completions.create(**long)
        with pytest.raises(openai.APIError, match="No answer within 1 seconds"):
            for _ in client.chat.completions.create(**long, stream=True):
                pass
        # neither was tried again, and neither row goes on
        assert time.monotonic() - started < 30
        assert client.chat.completions.create(**chat()).choices[0].finish_reason


def leave_after_a_moment(url: str, body: dict[str, Any], path: str = "/v1/chat/completions") -> None:
    host, port = url.removeprefix("http://").split(":")
    sent = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n"
    with socket.create_connection((host, int(port))) as leaving:
        leaving.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + sent)
        time.sleep(0.5)


def test_clients_that_leave_do_not_keep_the_model(served: Served) -> None:
    with slow_model(served), served_at(served) as url:
        for stream in (False, True):
            leave_after_a_moment(url, {**chat(max_tokens=1000), "temperature": 2.0, "seed": 1, "stream": stream})
        deadline = time.monotonic() + 30
        while metric(url, "ett_requests_in_flight") > 1 and time.monotonic() < deadline:  # the question itself is one
            time.sleep(0.05)
        assert metric(url, "ett_requests_in_flight") == 1
        assert httpx.post(f"{url}/v1/chat/completions", json=chat(), timeout=20).status_code == 200
        assert metric(url, "ett_completion_tokens_total") < 1000


def test_a_drawing_ends_where_its_client_leaves(drawing: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawing.model is not None
    drawn: list[int] = []

    def slowly(*_: Any, on_token: Any, **__: Any) -> None:
        for token in range(600):
            time.sleep(0.05)
            drawn.append(token)
            on_token(token)

    with monkeypatch.context() as patch, served_at(drawing) as url:
        patch.setattr(drawing.model, "generate_images", slowly)
        leave_after_a_moment(url, {"prompt": "a cat"}, "/v1/images/generations")
        assert httpx.post(f"{url}/v1/chat/completions", json=chat(model="drawing"), timeout=25).status_code == 200
    assert 0 < len(drawn) < 600
