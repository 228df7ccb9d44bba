"""Data from a web server: what it answers, refuses, or keeps to itself."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ett.data import entries as entries_module
from ett.data import far as far_module
from ett.data import once as once_module
from ett.data import places as places_module
from ett.data.far import BrokenSource, Far
from ett.data.manifest import Manifest
from ett.data.mixture import SourceConfig, build_mixture
from ett.errors import DataError
from tests.data.addresses import encoded, manifest, picture, shards, tar

pytest.importorskip("aiohttp")


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_module, "PAUSES", (0.0, 0.0))
    entries_module._scanned_before.cache_clear()
    once_module.forget()


@contextmanager
def served(
    files: dict[str, bytes], *, ranges: bool, status: int = 404, asked: list[str] | None = None
) -> Iterator[tuple[str, list[int]]]:
    """(the address of a server with `files`, the sizes of what it was made to send); it notes what it is asked for."""
    sent: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path)
            if asked is not None:
                asked.append(f"{self.command} {self.path}")
            if content is None:
                self.send_error(status)
                return
            wanted = self.headers.get("Range")
            if ranges and wanted:
                first, last = map(int, wanted.removeprefix("bytes=").split("-"))
                if first >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
                content = content[first : last + 1]
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"1"')
            self.end_headers()
            if self.command == "GET":
                try:
                    for start in range(0, len(content), 2**16):
                        sent.append(self.wfile.write(content[start : start + 2**16]))
                except OSError:
                    self.close_connection = True

        do_HEAD = do_GET  # noqa: N815 - http.server's name

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_shards_and_a_manifest_from_a_web_server() -> None:
    files = {
        "/0.tar": tar(0, 4, padding=300_000),
        "/1.tar": tar(4, 8),
        "/m.jsonl": manifest(["a%20b.png"]),
        "/a%2520b.png": picture(9),
    }
    with served(files, ranges=True) as (address, sent):
        source = shards(f"{address}/{{0..1}}.tar").build()
        sent.clear()
        assert [source[k].images[0].getpixel((0, 0))[0] for k in range(8)] == list(range(8))
        assert sum(sent) < len(files["/0.tar"]) + len(files["/1.tar"])
        assert Manifest(f"{address}/m.jsonl")[0].images[0].getpixel((0, 0)) == (9, 0, 0)
        with pytest.raises(DataError, match=r"/2\.tar does not exist"):
            shards(f"{address}/2.tar").build()


def test_a_web_server_that_sends_whole_files_is_refused_unread() -> None:
    files = {"/0.tar": tar(0, 100, padding=400_000)}
    with served(files, ranges=False) as (address, sent):
        with pytest.raises(DataError, match=r"0\.tar.* cannot be read .*range requests"):
            shards(f"{address}/0.tar").build()
        assert sum(sent) < len(files["/0.tar"]) / 2


def test_a_web_server_in_trouble_is_not_a_missing_file() -> None:
    with served({}, ranges=True, status=503) as (address, _), pytest.raises(BrokenSource, match="does not answer"):
        shards(f"{address}/0.tar").build(tolerant=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(BrokenSource, match="does not answer"):
        Manifest(f"http://127.0.0.1:{port}/m.jsonl")


def test_an_empty_picture_at_a_web_server_is_a_bad_sample() -> None:
    asked: list[str] = []
    files = {"/m.jsonl": manifest(["0.png", "1.png"]), "/0.png": b"", "/1.png": picture(1)}
    with served(files, ranges=True, asked=asked) as (address, _):
        source = Manifest(f"{address}/m.jsonl")
        with pytest.raises(DataError, match=r"m\.jsonl:1: ") as caught:
            source[0]
        assert not isinstance(caught.value, BrokenSource)
        assert asked.count("GET /0.png") == 1
        assert source[1].id == "p1"


@pytest.mark.parametrize("status", [401, 403])
def test_missing_rights_are_told_at_once(status: int) -> None:
    asked: list[str] = []
    with served({"/m.jsonl": manifest(["0.png"])}, ranges=True, status=status, asked=asked) as (address, _):
        with pytest.raises(BrokenSource, match=r"no right to read .*/0\.tar .*credentials"):
            shards(f"{address}/0.tar").build(tolerant=True)
        assert asked.count("GET /0.tar") == 1
        mixture = build_mixture([SourceConfig(source="manifest", path=f"{address}/m.jsonl")], 0, tolerant=True)
        with pytest.raises(BrokenSource, match=r"no right to read .*/0\.png"):
            encoded(mixture, 1)
        assert asked.count("GET /0.png") == 1


def test_a_server_that_keeps_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_module, "SILENCE", 0.3)
    monkeypatch.setattr(far_module, "PATIENCE", 0.5)
    monkeypatch.setattr(far_module, "PAUSES", (0.01,) * 50)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        with pytest.raises(BrokenSource, match=r"does not answer after [23] tries \("):
            Far(f"http://127.0.0.1:{silent.getsockname()[1]}/0.png").read(0, 10)
        assert time.monotonic() - begun < 5


def test_whether_ranges_work_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places_module, "LOOK_AGAIN", 0.0)
    asked: list[str] = []
    with served({"/0.tar": tar(0, 4, padding=300_000)}, ranges=True, asked=asked) as (address, _):
        source = shards(f"{address}/0.tar").build()
        asked.clear()
        assert source[0].id == "000"
        # the picture and the text
        assert asked == 2 * ["HEAD /0.tar", "GET /0.tar"]
