"""What tests of data at addresses put there."""

from __future__ import annotations

import io
import json
import tarfile
from typing import Any

import PIL.Image

from ett.data.mixture import Mixture, SourceConfig, encode_draw
from ett.model import EttImageProcessor, EttProcessor
from ett.model.text import CHAT_TEMPLATES, byte_tokenizer


def picture(shade: int, size: int = 20) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (size, size), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(start: int, stop: int, padding: int = 0) -> bytes:
    """Samples ``{number}.png``, whose red is the number, and ``{number}.txt``; with so many bytes more in each text."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for number in range(start, stop):
            for name, content in (("png", picture(number)), ("txt", b"number %d" % number + b" " * padding)):
                member = tarfile.TarInfo(f"{number:03}.{name}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def shards(path: str, **options: Any) -> SourceConfig:
    return SourceConfig(source="shards", path=path, **options)


def encoded(mixture: Mixture, draws: int) -> list[Any]:
    processor = EttProcessor(EttImageProcessor(8, 8), byte_tokenizer(), 4, CHAT_TEMPLATES["plain"])
    return [encode_draw(mixture, draw, processor, None) for draw in range(draws)]


def manifest(images: list[str]) -> bytes:
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "red"}]
    lines = [json.dumps({"id": f"p{k}", "image": image, "conversations": turns}) for k, image in enumerate(images)]
    return "\n".join(lines).encode()
