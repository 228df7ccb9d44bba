"""What scripts and terminals rely on: quiet, JSON, colour, progress, completion, the report of the environment, export."""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import RepoUrl

from ett.cli import build_parser, main
from ett.environment import PACKAGES, describe
from ett.errors import UserError
from ett.export.hub import push_folder
from tests.conftest import CommandLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_errors_are_red_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, run: CommandLine) -> None:
    wrong, message = ["train", "nowhere.yaml"], "There is no recipe"

    def on_a_terminal(**environment: str) -> str:
        with monkeypatch.context() as patch:
            for name, value in {"NO_COLOR": "", "TERM": "xterm", **environment}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stderr", Terminal())
            assert main(wrong) == 2
            return str(sys.stderr.getvalue())  # type: ignore[attr-defined]  # a Terminal

    assert on_a_terminal().startswith(f"\033[1;31mett:\033[0m {message}")
    assert on_a_terminal(NO_COLOR="1").startswith(f"ett: {message}")
    assert on_a_terminal(TERM="dumb").startswith(f"ett: {message}")
    assert run(*wrong)[2].startswith(f"ett: {message}")


def test_help_takes_less_than_a_second() -> None:
    """Of processor time: others may be using the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "ett.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_quiet_leaves_results_and_errors(toy_run: Path, tmp_path: Path, run: CommandLine) -> None:
    """In a pipe there is no progress bar; with --quiet there is nothing but the result."""
    recipe = toy_run / "recipe.yaml"
    only = ["stages=[{stage: align, steps: 2, batch_size: 2, log_every: 1}]", f"model.init={toy_run}"]
    rest = ["model.vision_tokenizer={}", "model.language_model=null", "model.projector={}"]
    code, out, err = run("train", recipe, *only, *rest, "--out", tmp_path / "loud")
    assert code == 0
    assert "align 2/2" in err
    assert "\r" not in err, "no progress bar"
    code, out, err = run("train", recipe, *only, *rest, "--quiet", "--out", tmp_path / "quiet")
    assert (code, err) == (0, "")
    assert out.strip() == str(tmp_path / "quiet" / "stages" / "0-align")
    code, out, err = run("train", "nowhere.yaml", "-q")
    assert (code, out) == (2, "")
    assert err.startswith("ett: There is no recipe")


def test_every_command_can_be_quiet() -> None:
    """Those of groups too (`ett data check`), the option before the command's name or behind."""

    def commands(parser: argparse.ArgumentParser, *names: str) -> Iterator[tuple[str, ...]]:
        (subs,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)] or [None]
        if subs is None:
            assert "--quiet" in parser._option_string_actions, names
            yield names
        else:
            for name, sub in subs.choices.items():
                yield from commands(sub, *names, name)

    parser = build_parser()
    grouped = [names for names in commands(parser) if len(names) > 1]
    assert ("data", "check") in grouped
    for words in (["data", "-q", "check", "x"], ["data", "check", "x", "-q"], ["t2i", "scenes", "x", "--quiet"]):
        assert parser.parse_args(words).quiet
    assert not parser.parse_args(["data", "check", "x"]).quiet


def test_results_as_json(toy_run: Path, tmp_path: Path, run: CommandLine) -> None:
    picture = toy_run.parent / "pictures" / "3.png"
    code, out, _ = run("chat", toy_run, picture, "Which?", "--json", "--max-new-tokens", 3)
    assert code == 0
    assert set(json.loads(out)) == {"model", "image", "question", "answer"}
    code, out, _ = run("reconstruct", toy_run, picture, "--json", "--out", tmp_path / "rec")
    (found,) = json.loads(out)
    assert Path(found["path"]).is_file()
    assert found["psnr"] > 0


def test_the_environment_is_told_without_names(run: CommandLine) -> None:
    code, out, _ = run("env", "--json")
    found = json.loads(out)
    assert code == 0
    assert found == describe()
    assert set(PACKAGES) | {"ett", "python", "system", "cpu"} <= set(found)
    assert found["torch"] is not None
    assert str(Path.home()) not in out
    code, out, _ = run("env")
    assert f"{found['torch']}" in out
    assert len(out.splitlines()) == len(found)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_commands(shell: str, run: CommandLine) -> None:
    pytest.importorskip("shtab", reason="shell completion needs shtab: pip install 'ett-tuning[completion]'")
    code, out, _ = run("completion", shell)
    assert code == 0
    assert "tokenizer-report" in out
    assert "--max-new-tokens" in out or shell == "tcsh", "tcsh has no completion for options of subcommands"
    if shell == "bash":
        checked = subprocess.run(["bash", "-n"], input=out, text=True, check=False, capture_output=True)
        assert checked.returncode == 0, checked.stderr


def test_export_writes_a_folder_or_says_why_not(toy_run: Path, tmp_path: Path, run: CommandLine) -> None:
    code, out, _ = run("export", toy_run, tmp_path / "out", "--license", "mit")
    assert (code, out.strip()) == (0, str(tmp_path / "out"))
    assert {"README.md", "modeling_ett.py", "processing_ett.py", "model.safetensors"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    code, _, err = run("export", toy_run / "stages" / "0-tokenizer", tmp_path / "third")
    assert code == 2
    assert err.startswith("ett: ")


class Hub:
    """Records what a client of the hub would do."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, list[tuple[str, dict[str, Any]]]()

    def create_repo(self, repository: str, **kwargs: Any) -> Any:
        self.calls.append(("create_repo", {"repository": repository, **kwargs}))
        return RepoUrl(f"https://huggingface.co/me/{repository}")

    def upload_folder(self, **kwargs: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("upload_folder", kwargs))


def test_a_folder_is_pushed_whole(tmp_path: Path) -> None:
    hub = Hub()
    assert push_folder(tmp_path, "mine", private=True, api=hub) == "https://huggingface.co/me/mine"  # type: ignore[arg-type]
    (_, made), (_, sent) = hub.calls
    assert made == {"repository": "mine", "private": True, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("me/mine", tmp_path)
    refused = Hub(OSError("no route"))
    with pytest.raises(UserError, match="not uploaded to 'mine': no route"):
        push_folder(tmp_path, "mine", api=refused)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="hf auth login"):
        push_folder(tmp_path, "mine")  # tests are offline
