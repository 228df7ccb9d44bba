"""The process: its socket, keys and names, the command, and an end that loses no request."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from ett.cli import build_parser, main, serving
from ett.errors import ModelError, UserError
from ett.serve.limits import Limits
from ett.serve.run_report import RunReport
from ett.serve.served import load_served
from ett.serve.server import address, bind, host_names, is_loopback, read_keys
from ett.tokenizers import VisionTokenizer
from tests.conftest import TOKENIZER
from tests.evaluate.conftest import Toy
from tests.serve.conftest import Comparing, command, question, served_at


@pytest.fixture(scope="module")
def saved(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "toy"
    for part in toy:
        part.save_pretrained(folder)
    return folder


def test_a_stop_loses_no_request_in_flight(saved: Path) -> None:
    count = 8
    with command(saved, "--max-batch", 3, ETT_API_KEY="the-key-of-this-test") as (process, url):
        sent = {"Authorization": "Bearer the-key-of-this-test"}

        def ask(seed: int) -> httpx.Response:
            body = {"messages": question("what?", seed), "max_tokens": 150, "temperature": 2.0, "seed": 1}
            return httpx.post(f"{url}/v1/chat/completions", json=body, headers=sent, timeout=120)

        with httpx.Client(headers=sent) as idle, ThreadPoolExecutor(count) as pool:
            asked = [pool.submit(ask, seed) for seed in range(count)]
            while f"ett_requests_in_flight {count + 1}.0" not in idle.get(f"{url}/metrics").text:
                assert not any(each.done() for each in asked), (
                    "the model is too fast for this test: ask for more tokens"
                )
            process.send_signal(signal.SIGTERM)
            answers = [each.result() for each in asked]
        assert [each.status_code for each in answers] == [200] * count
        assert all(each.json()["usage"]["completion_tokens"] for each in answers)
        assert process.wait(timeout=60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_what_cannot_be_served_is_said_before_anything_is_loaded(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / "keys").write_text("# none\n\n", encoding="utf-8")
        (tmp_path / "short").write_text("secret\n", encoding="utf-8")
        cases: list[tuple[list[object], str]] = [
            ([tmp_path / "nothing"], "There is no folder"),
            ([saved, "--port", port], f"127.0.0.1 port {port} cannot be used"),
            ([saved, "--port", 0, "--host", "no such host"], "There is no address 'no such host'"),
            ([saved, "--port", 0, "--api-key-file", tmp_path / "missing"], "cannot be read"),
            ([saved, "--port", 0, "--api-key-file", tmp_path / "keys"], "holds no key"),
            ([saved, "--port", 0, "--api-key-file", tmp_path / "short"], "at least 16"),
            ([saved, "--port", 0, "--run", tmp_path], "not a run's folder"),
            ([saved, "--port", 0, "--device", "abacus"], "There is no device 'abacus'"),
        ]
        for words, said in cases:
            assert main(["serve", *map(str, words)]) == 2
            assert said in capsys.readouterr().err
        monkeypatch.setattr(serving, "_PARTS", ("fastapi", "a_part_that_is_missing"))
        assert main(["serve", str(saved)]) == 2
        assert 'needs a_part_that_is_missing: pip install "ett-tuning[serve]"' in capsys.readouterr().err
    for port in ("-1", "65536", "http"):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["serve", "x", "--port", port])
    with pytest.raises(ValueError, match="max_batch"):
        Limits(max_batch=0)


def test_addresses_and_names() -> None:
    with bind("127.0.0.1", 0) as here:
        assert is_loopback(here)
        assert address(here) == f"http://127.0.0.1:{here.getsockname()[1]}"
        assert set(host_names(here, ["Demo.Example"]) or ()) == {"localhost", "127.0.0.1", "[::1]", "demo.example"}
    with bind("0.0.0.0", 0) as everywhere:
        assert not is_loopback(everywhere)
        assert host_names(everywhere, []) is None
        assert host_names(everywhere, ["demo.example"]) == {"demo.example"}
    if socket.has_ipv6:
        with bind("::1", 0) as six:
            assert address(six).startswith("http://[::1]:")


def test_keys_from_file_and_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of this server\n0123456789abcdef\n\n  fedcba9876543210 \n", encoding="utf-8")
    assert read_keys(path, "from-the-environment") == ["from-the-environment", "0123456789abcdef", "fedcba9876543210"]
    assert read_keys(None, None) == []
    for wrong in ("a key with its spaces", "schlüssel-schlüssel"):
        with pytest.raises(UserError, match="ASCII"):
            read_keys(None, wrong)


def test_what_is_loaded(saved: Path, toy_run: Path, tmp_path: Path) -> None:
    served = load_served(saved, toy_run / "stages" / "0-tokenizer", device="cpu")
    assert served.name == "toy"
    assert served.model is not None
    assert served.initial is not None
    assert load_served(toy_run, name="mine").name == "mine"
    assert load_served(toy_run / "stages" / "0-tokenizer").model is None
    other = VisionTokenizer.from_config({**TOKENIZER, "channel_multipliers": [1, 2]})
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="only tokens of one size"):
        load_served(saved, tmp_path / "other")


def test_the_report_of_a_run_that_trains(served: Any, toy_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = (toy_run / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "recipe.yaml").write_text((toy_run / "recipe.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "log.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
    with served_at(served, run=RunReport(folder)) as url:
        first = httpx.get(f"{url}/run/report")
        assert first.status_code == 200
        assert "<svg" in first.text
        known = {"If-None-Match": first.headers["etag"]}
        assert httpx.get(f"{url}/run/report", headers=known).status_code == 304
        with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.writelines(lines[3:])
        later = httpx.get(f"{url}/run/report", headers=known)
        assert later.status_code == 200
        assert len(later.text) > len(first.text)
        (folder / "recipe.yaml").write_text("a: [", encoding="utf-8")
        assert httpx.get(f"{url}/run/report").json()["error"]["code"] == "report_unavailable"
    with served_at(served) as url:
        assert httpx.get(f"{url}/run/report").status_code == 404


def test_a_report_of_a_comparison(tmp_path: Path) -> None:
    proof = Path(__file__).parents[2] / "docs" / "results" / "demo-proof" / "report.html"
    (tmp_path / "comparison.json").write_text("{}", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="must hold a mapping"):
        RunReport(tmp_path)
    (tmp_path / "report.html").write_bytes(proof.read_bytes())
    started = time.monotonic()
    assert RunReport(tmp_path).current()[1] == proof.read_text(encoding="utf-8")
    assert time.monotonic() - started < 10


def test_the_arms_of_a_comparison_while_they_train(served: Any, comparing: Comparing) -> None:
    """All curves in one chart, as far as each arm is, until the report is there."""
    folder = comparing.folder
    with served_at(served, run=RunReport(folder)) as url:
        first = httpx.get(f"{url}/run/report")
        assert first.text.count("waits: 0 of 12") == 4
        assert "No arm has logged a step yet" in first.text
        comparing.train("frozen:0", 3)
        comparing.train("tuned:0", 5)
        later = httpx.get(f"{url}/run/report", headers={"If-None-Match": first.headers["etag"]})
        assert later.status_code == 200
        assert later.text.count("waits: 0 of 12") == 2
        assert "3 of 12" in later.text
        assert "5 of 12" in later.text
        charts = re.findall(r"<figure.*?</figure>", later.text, flags=re.DOTALL)
        assert any("frozen" in each and "tuned" in each for each in charts), "one chart for both"
        known = {"If-None-Match": later.headers["etag"]}
        assert httpx.get(f"{url}/run/report", headers=known).status_code == 304
        assert "<summary>Seed 0</summary>" not in later.text
        comparing.train("tuned:1", 12)
        (folder / "tuned" / "seed-1" / "evaluation.json").write_text("{}", encoding="utf-8")
        second = httpx.get(f"{url}/run/report", headers=known).text
        assert "12, measured" in second
        assert "<summary>Seed 0</summary>" in second, "the seed before is folded away"
        # the report is written last, and shown until an arm goes on
        (folder / "report.html").write_text("<main>the report</main>", encoding="utf-8")
        assert httpx.get(f"{url}/run/report").text == "<main>the report</main>"
        comparing.train("frozen:0", 4)
        os.utime(folder / "frozen" / "seed-0" / "log.jsonl", (time.time() + 10,) * 2)
        assert "4 of 12" in httpx.get(f"{url}/run/report").text


@pytest.mark.slow
def test_the_load_script(saved: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "serve.py"
    words = [sys.executable, script, "--model", saved, "--clients", "5", "--seconds", "4", "--warm-up", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["exit_code"] == 0
    assert found["requests"] > 5
    # memory needs longer to settle
    assert done.returncode == (0 if found["good"] else 1)
