"""Many clients at once, some of them wrong: codes, latency and memory of `ett serve`.

    python benchmarks/serve.py                              # fifty clients for a minute, 30 % malformed, a toy model of its own
    python benchmarks/serve.py --model runs/mine --seconds 20

Starts the server as a process of its own and asks it as strangers would: chats with pictures of different sizes, streamed or
whole, pictures through the tokenizer, and, in the given share, requests that must be refused with one certain status. The same
load warms it up first, uncounted but for wrong answers. Ends with 1 if any request had another status than expected, if the
server's resident memory grew by more than 5 % (medians of the last and the first third of the time), or if it did not stop
with 0. Clients and server share the machine: latencies are of both.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import PIL.Image

MAX_GROWTH = 0.05
"""Of the server's resident memory: the median of the last third of the time over that of the first, a share."""

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Case:
    """One request and the status that it must have."""

    name: str
    path: str
    content: bytes
    status: int
    headers: dict[str, str] = field(default_factory=lambda: JSON)


@dataclass
class Tally:
    """What came back: (case, status) -> number of times; seconds of good requests; bytes resident, once a second."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: list[float] = field(default_factory=list)


def data_url(width: int, height: int, rng: np.random.Generator) -> str:
    buffer = io.BytesIO()
    values = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    PIL.Image.fromarray(values).resize((width, height)).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def good_cases(max_tokens: int) -> list[Case]:
    rng = np.random.default_rng(0)
    cases = []
    for width, height in ((32, 32), (64, 48), (200, 300), (640, 480), (1024, 1024)):
        url = data_url(width, height, rng)
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
        chat = {"messages": [{"role": "user", "content": parts}], "max_tokens": max_tokens}
        for name, body in (("chat", chat), ("stream", {**chat, "stream": True, "temperature": 1.0})):
            cases.append(Case(name, "/v1/chat/completions", json.dumps(body).encode(), 200))
        cases.append(Case("reconstruction", "/v1/images/reconstructions", json.dumps({"image": url}).encode(), 200))
    return cases


def bad_cases() -> list[Case]:
    chats = "/v1/chat/completions"

    def chat(content: object, **more: object) -> bytes:
        return json.dumps({"messages": [{"role": "user", "content": content}], **more}).encode()

    def showing(url: str) -> bytes:
        return chat([{"type": "image_url", "image_url": {"url": url}}])

    half = data_url(64, 64, np.random.default_rng(1))
    return [
        Case("no JSON", chats, b'{"messages": [', 400),
        Case("nested", chats, b"[" * 50_000, 400),
        Case("no messages", chats, b"{}", 400),
        Case("unknown parameter", chats, chat("hi", tempreature=1), 400),
        Case("wrong type", chats, chat("hi", max_tokens="many"), 400),
        Case("other model", chats, chat("hi", model="gpt-4o"), 404),
        Case("remote picture", chats, showing("http://127.0.0.1:9/"), 400),
        Case("no picture", chats, showing("data:image/png;base64,aGVsbG8="), 400),
        Case("half a picture", chats, showing(half[: len(half) // 2 // 4 * 4 + 1]), 400),
        Case("long text", chats, chat("a" * 100_000), 400),
        Case("large body", chats, chat("a" * 9_000_000), 413),
        Case("a form", chats, b"messages=hi", 415, {"Content-Type": "application/x-www-form-urlencoded"}),
        Case("unknown path", "/v1/nothing", b"{}", 404),
        Case("bad picture", "/v1/images/reconstructions", b'{"image": "data:image/png;base64,@@"}', 400),
    ]


async def client(url: str, good: Sequence[Case], bad: Sequence[Case], share: float, until: float, tally: Tally) -> None:
    choose = random.Random(id(asyncio.current_task()))
    async with httpx.AsyncClient(base_url=url, timeout=180) as connection:
        while time.monotonic() < until:
            case = choose.choice(bad if choose.random() < share else good)
            started = time.monotonic()
            response = await connection.post(case.path, content=case.content, headers=case.headers)
            tally.statuses[case.name, response.status_code] += 1
            if problem := wrong(case, response):
                tally.wrong.append(f"{case.name}: {problem}")
            if case.status == 200:
                tally.seconds.setdefault(case.name, []).append(time.monotonic() - started)


def wrong(case: Case, response: Any) -> str:
    """What is not as it must be about a response; empty where all is."""
    if response.status_code != case.status:
        return f"status {response.status_code}, not {case.status}: {response.text[:200]}"
    if case.status != 200:
        return "" if response.json()["error"]["message"] else "no message"
    if case.name == "stream":
        return (
            ""
            if response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text
            else response.text[-200:]
        )
    return "" if "error" not in response.json() else response.text[:200]


async def watch(url: str, until: float, tally: Tally) -> None:
    """The server's resident memory, once a second."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as connection:
        while True:
            text = (await connection.get("/metrics")).text
            resident = re.search(r"^process_resident_memory_bytes (\S+)$", text, flags=re.MULTILINE)
            assert resident, "the server shows no memory: is this Linux?"
            tally.memory.append(float(resident.group(1)))
            if time.monotonic() >= until:
                return
            await asyncio.sleep(1)


async def load(url: str, arguments: argparse.Namespace) -> Tally:
    good, bad = good_cases(arguments.max_tokens), bad_cases()
    wrong_before: list[str] = []
    tally = Tally()
    for seconds in (arguments.warm_up, arguments.seconds):
        tally = Tally(wrong=wrong_before)
        until = time.monotonic() + seconds
        clients = [client(url, good, bad, arguments.malformed, until, tally) for _ in range(arguments.clients)]
        await asyncio.gather(watch(url, until, tally), *clients)
        wrong_before = tally.wrong
    return tally


def toy(folder: Path) -> Path:
    """A small model with random weights over pictures of 64 x 64 pixels."""
    from ett.cli.common import quiet_libraries
    from ett.config import from_mapping
    from ett.model.build import ModelSpec, build_model, build_vision_tokenizer

    quiet_libraries()
    language_model = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 264, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257,
    }  # fmt: skip
    tokenizer = {"channels": 32, "channel_multipliers": [1, 1, 2, 2], "num_res_blocks": 1, "z_channels": 32,
                 "codebook_size": 1024, "codebook_dim": 16, "norm_groups": 8}  # fmt: skip
    given = {"image_size": 64, "vision_tokenizer": tokenizer, "language_model": {"config": language_model}}
    spec = from_mapping(ModelSpec, given)
    for part in build_model(spec, build_vision_tokenizer(spec)):
        part.save_pretrained(folder)
    return folder


def summary(tally: Tally, arguments: argparse.Namespace, exit_code: int) -> dict[str, Any]:
    third = max(1, len(tally.memory) // 3)
    early, late = statistics.median(tally.memory[:third]), statistics.median(tally.memory[-third:])
    growth = late / early - 1
    latencies = {
        name: {
            "count": len(seconds),
            **{f"p{q}": round(statistics.quantiles(seconds, n=100)[q - 1], 3) for q in (50, 95, 99)},
        }
        for name, seconds in tally.seconds.items()
        if len(seconds) > 1
    }
    return {
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        "warm_up": arguments.warm_up,
        "requests": sum(tally.statuses.values()),
        "statuses": {f"{name}: {status}": count for (name, status), count in sorted(tally.statuses.items())},
        "latency_seconds": latencies,
        "memory_MiB": {
            "first_third": round(early / 2**20, 1),
            "last_third": round(late / 2**20, 1),
            "most": round(max(tally.memory) / 2**20, 1),
            "growth": round(growth, 4),
        },
        "exit_code": exit_code,
        "wrong": tally.wrong[:10],
        "good": not tally.wrong and growth <= MAX_GROWTH and exit_code == 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: a toy of its own")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm-up", type=float, default=30, help="seconds (default: %(default)s)")
    parser.add_argument("--malformed", type=float, default=0.3, help="share of requests (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model = arguments.model or toy(Path(work) / "toy")
        words = ["serve", str(model), "--port", "0", "--max-requests", str(arguments.clients), "--seconds", "120"]
        server = subprocess.Popen([sys.executable, "-m", "ett.cli", *words], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.search(r"http://[\w.:]+", line)
            assert found, f"the server did not start: {line}"
            tally = asyncio.run(load(found.group(), arguments))
            server.send_signal(signal.SIGTERM)
            result = summary(tally, arguments, server.wait(timeout=120))
        finally:
            server.kill()
            server.wait()
    print(json.dumps(result, indent=1))
    return 0 if result["good"] else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
