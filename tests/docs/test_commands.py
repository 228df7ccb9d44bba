"""The shell blocks of the pages run, line by line as they stand, in a bash whose `ett` is this process.

Each page gets a desk: a folder with what it takes for granted (a run called runs/mine, pictures, a manifest, a checkpoint of
another project). Commands are made small by what is appended to them (`SMALL`), never by leaving words out. What does not
really run is in `STANDS_IN` and `PUT_ASIDE`, each with its reason; of these, the words are checked as far as they can be.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser
from transformers import AutoConfig, AutoModelForCausalLM

from ett.cli import main
from ett.experiments import ablate
from ett.experiments.recipe import read_values
from ett.model.text import byte_tokenizer
from ett.tokenizers import IBQConfig, IBQTokenizer, layouts
from tests.conftest import LANGUAGE_MODELS
from tests.docs.test_docs import DOCS, PAGES, ROOT, SKIPPED, blocks
from tests.evaluate.conftest import picture
from tests.export.test_hub import Hub

STANDS_IN = {
    "git": "clones nothing: the desk is the clone",
    "make": "sets up an environment, or is this very suite: the target must exist",
    "pip": "installs nothing: extras and files must exist",
    "torchrun": "one process in place of several (the tests of ett.train have several); its own parser reads its words",
    "vllm": "is not installed here: an engine that takes the same folder and embeddings is tested (tests/serve)",
    "scontrol": "no cluster here: names one machine",
    "srun": "no cluster here: runs the command once",
}
"""Programs that are replaced: name -> why."""
PUT_ASIDE = {
    "examples/deepspeed_zero.py": "needs DeepSpeed (tests/examples/test_trainers.py runs it where that is installed)",
    "-m lmms_eval": "needs lmms-eval (tests/evaluate runs the model class without it)",
    "tools/lmms_eval_check.py": "needs lmms-eval",
    "ett plan qwen2_5_1_5b": "reads a language model's configuration on the hub (tests/experiments plan it from a copy)",
}
"""Commands that are parsed and not run: how they are known -> why."""
REPLACED = {
    "<this repository>": "repository",
    "/shared/": "shared/",
    "--only ett:1": "--only ett:0",
    "Qwen/Qwen2.5-0.5B-Instruct": "smollm2-135m",
}
"""Words of the pages that stand for something of the reader's own."""
QUICK = {
    "CONTRIBUTING.md", "command_line.md", "data.md", "lmms_eval.md", "own_loss.md", "reliability.md", "serving.md",
    "share.md", "trainers.md",
}  # fmt: skip
"""Pages whose commands take a few seconds together; those of the others are for the nights."""

SHIM = """#!{python} -SE
import json, os, socket, sys
asked = socket.create_connection(("127.0.0.1", {port}))
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
asked.sendall(json.dumps(dict(words=words, cwd=os.getcwd())).encode() + b"\\n")
answer = json.loads(asked.makefile().readline())
sys.stdout.write(answer["out"]), sys.stderr.write(answer["err"])
sys.exit(answer["code"])
"""
PROGRAMS = ("ett", "python", "python3", *(name for name in STANDS_IN if name != "srun"))


SHORT = {"steps": 2, "batch_size": 2, "micro_batch_size": None, "validate_every": 2, "checkpoint_every": None}
"""Of a stage at toy size."""


# -- commands at toy size ----------------------------------------------------------------------------------------------


def small_recipe(name: str, words: Sequence[str]) -> list[str]:
    """Overrides after which a recipe takes two steps of two pictures, with a language model of a few thousand weights."""
    given = read_values(name, [])
    found = ["evaluation.limit=2", "num_workers=0", "trackers=[]"]
    arm = next((word.partition("=")[2] for word in words if word.startswith("arm=")), None)
    stages = (given.get("arms") or {}).get(arm, {}).get("stages") or given["stages"]
    for i, stage in enumerate(stages):
        short: dict[str, Any] = {key: "null" if value is None else value for key, value in SHORT.items()}
        short |= {"health.pictures": 2} if stage["stage"] in ("semantic", "tokenizer", "joint") else {}
        short |= {"quantize_after": 1} if stage.get("quantize_after") else {}
        found += [f"stages.{i}.{key}={value}" for key, value in short.items()]
    if "codebook_size" in given["model"].get("vision_tokenizer", {}):
        found.append("model.vision_tokenizer.codebook_size=64")
    return [*found, "precision=fp32"]


def small_comparison(name: str) -> list[str]:
    """One seed of the reference, what it starts from, and the first other arm, measured on two examples of each source."""
    given = read_values(name, [])
    arms = given["arms"]
    reference = given.get("reference", "ett" if "ett" in arms else next(reversed(arms)))
    starts = {arm: set(re.findall(r"arm:(\w+)", str(own))) for arm, own in arms.items()}
    wanted = {reference, next(arm for arm in arms if arm != reference and not starts[arm])}
    while before := {each for arm in wanted for each in starts[arm]} - wanted:
        wanted |= before
    chosen = {arm: dict(own) for arm, own in arms.items() if arm in wanted}
    for own in chosen.values():
        # overrides reach the recipe's own stages, not those that an arm has in their place
        if "stages" in own:
            own["stages"] = [{**stage, **SHORT, "cached_codes": False} for stage in own["stages"]]
    kept = yaml.safe_dump(chosen, default_flow_style=True, sort_keys=False, width=10**6)
    drawings = ["evaluation.drawings.limit=2"] if (given.get("evaluation") or {}).get("drawings") else []
    return [f"arms={kept.strip()}", "seeds=[0]", "evaluation.report_limit=2", "evaluation.report_pictures=2", *drawings]


def small(words: list[str]) -> list[str]:
    """What is appended to the words of an `ett` command."""
    name = words[1] if len(words) > 1 else ""
    if words[0] == "train":
        return small_recipe(name, words)
    if words[0] == "ablate":
        searched = ["--search-with", "stages.0.steps=2"] if "--search" in words else []
        return [] if "--only" in words else [*small_recipe(name, words), *small_comparison(name), *searched]
    if words[0] == "serve":
        return ["--port", "0"]
    fixed = {
        "chat": ["--max-new-tokens", "3"],
        "evaluate": ["--limit", "2"],
        "report": [] if "--kept" in words else ["--limit", "2"],
        "tokenizer-report": ["--limit", "2"],
        "lmms-tasks": ["--limit", "2"],
        "t2i judge": ["--limit", "2", "--judges", "scenes"],
    }
    return fixed.get(" ".join(words[:2]), fixed.get(words[0], []))


# -- a desk ------------------------------------------------------------------------------------------------------------


@dataclass
class Desk:
    """A folder to work in, and the answers of the programs there.

    Attributes:
        folder: where the blocks begin. provided: folders that were laid there, or made by an earlier block, which a block
            may make itself. made: by this one.
        done: the words of every command that ran. aside: those of `PUT_ASIDE` and `STANDS_IN`.
    """

    folder: Path
    provided: set[Path] = field(default_factory=set)
    made: set[Path] = field(default_factory=set)
    done: list[str] = field(default_factory=list)
    aside: set[str] = field(default_factory=set)

    def run(self, block: str) -> None:
        """A block in bash, which ends at the first command that fails; raises AssertionError then."""
        self.provided |= self.made
        self.made.clear()
        for old, new in REPLACED.items():
            block = block.replace(old, new)
        with socket.create_server(("127.0.0.1", 0)) as server:
            programs = self.folder / "home" / "programs"
            shutil.rmtree(programs, ignore_errors=True)
            programs.mkdir(parents=True)
            for name in PROGRAMS:
                write_program(programs / name, SHIM.format(python=sys.executable, port=server.getsockname()[1]))
            write_program(programs / "srun", '#!/bin/bash\nexec "$@"\n')
            environment = {
                "PATH": f"{programs}:/usr/bin:/bin",
                "HOME": str(self.folder / "home"),
                **{f"SLURM_{name}": "1" for name in ("JOB_NODELIST", "NNODES", "JOB_ID")},
            }
            said = self.folder / "home" / "said.txt"
            with said.open("w", encoding="utf-8") as output:
                shell = subprocess.Popen(
                    ["bash", "-euo", "pipefail", "-c", block],
                    cwd=self.folder,
                    env=environment,
                    stdout=output,
                    stderr=output,
                )
                server.settimeout(0.05)
                try:
                    while shell.poll() is None:
                        with contextlib.suppress(TimeoutError):
                            self.serve(server.accept()[0])
                finally:
                    shell.kill()
                    shell.wait()
            assert shell.returncode == 0, f"{block}\n{said.read_text(encoding='utf-8')[-2000:]}"

    def serve(self, asked: socket.socket) -> None:
        with asked, asked.makefile("rw") as lines:
            given = json.loads(lines.readline())
            out, err = io.StringIO(), io.StringIO()
            with contextlib.chdir(given["cwd"]), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = self.call(*given["words"])
                except SystemExit as end:
                    code = end.code if isinstance(end.code, int) else 1
                except AssertionError as error:
                    code = 3
                    print(f"{shlex.join(given['words'])}: {error!r}", file=err)
            lines.write(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}) + "\n")

    def call(self, program: str, *words: str) -> int:
        """One command; returns its exit code."""
        spoken = shlex.join([program, *words])
        reason = next((known for known in PUT_ASIDE if known in " ".join([program, *words])), None)
        if reason is not None:
            self.aside.add(reason)
            for script in [word for word in words if word.endswith(".py")]:
                assert (ROOT / script).is_file(), script
            return 0
        if program in STANDS_IN:
            self.aside.add(program)
        else:
            self.done.append(spoken)
        return int(getattr(self, f"_{program}")(list(words)) or 0)

    def _ett(self, words: list[str]) -> int:
        if words[0] in ("train", "ablate", "import-tokenizer") and "--resume" not in words:
            for out in {Path(word).resolve() for word in words[1:]} & self.provided:
                self.provided.remove(out)
                shutil.rmtree(out)
        missing = [path for word in words[1:] if not (path := Path(word).resolve()).exists()]
        code = main([*words, *small(words)])
        self.made |= {path for path in missing if path.is_dir()}
        return code

    def _python(self, words: list[str]) -> None:
        if words[:2] == ["-m", "venv"]:
            programs = Path(words[2]) / "bin"
            programs.mkdir(parents=True)
            (programs / "activate").write_text("", encoding="utf-8")
            (programs / "pip").symlink_to(self.folder / "home" / "programs" / "pip")
            return
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trainer's, about the machine
            patch.setattr(sys, "argv", [words[0], *(word.replace("1000", "2") for word in words[1:])])
            runpy.run_path(words[0], run_name="__main__")

    _python3 = _python

    def _torchrun(self, words: list[str]) -> int:
        found = get_args_parser().parse_args(words)
        assert (found.module, found.training_script) == (True, "ett.cli"), words
        return self._ett(found.training_script_args)

    def _git(self, words: list[str]) -> None:
        assert words[0] == "clone"
        Path(words[-1]).mkdir()
        for path in self.folder.iterdir():
            if path.name != words[-1]:
                (Path(words[-1]) / path.name).symlink_to(path)

    def _make(self, words: list[str]) -> None:
        for target in words:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target

    def _pip(self, words: list[str]) -> None:
        import tomllib

        known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for word in words[1:]:
            name, _, extras = word.rstrip("]").partition("[")
            assert name in ("-e", ".", "-c", "constraints.txt", known["name"], "deepspeed"), word
            assert set(filter(None, extras.split(","))) <= set(known["optional-dependencies"]), word

    def _vllm(self, words: list[str]) -> None:
        assert words[0] == "serve"

    def _scontrol(self, words: list[str]) -> None:
        print("node-1")


def write_program(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What desks are laid with: a trained run of the quickstart, pictures, manifests, checkpoints of others, prompts."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "mine").mkdir()
    lines = []
    for i, name in enumerate(("red-bicycle.jpg", "cat.png", "a.png", "b.jpg")):
        picture(i, 60 + i, 50).save(folder / name)
        shutil.copy(folder / name, folder / "mine" / name)
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": name[:3]}]
        lines.append(json.dumps({"id": name, "image": name, "conversations": turns}) + "\n")
    for place in (folder, folder / "mine"):
        (place / "mine.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
        for held in ("held.jsonl", "final.jsonl"):
            (place / held).write_text("".join(lines[2:]), encoding="utf-8")
    words = ["train", "quickstart", "arm=ett", "--quiet", "--out", str(folder / "run")]
    assert main([*words, *small(words)]) == 0
    recipe = yaml.safe_load((folder / "run" / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["stages"][0] |= {"batch_size": 8}
    for name in ("recipe.yaml", "mine.yaml"):
        (folder / name).write_text(yaml.safe_dump(recipe), encoding="utf-8")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LANGUAGE_MODELS["llama"])).save_pretrained(folder / SMOLLM2)
    words = byte_tokenizer()
    words.chat_template = CHAT
    words.save_pretrained(folder / SMOLLM2)
    figures = {"metrics": {"exact_match": {"value": 0.5, "interval": None, "num_examples": 2}}}
    (folder / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    (folder / "evaluation_metadata.jsonl").write_text(
        json.dumps(
            {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
        )
        + "\n",
        encoding="utf-8",
    )
    (folder / "DPG-Bench" / "prompts").mkdir(parents=True)
    (folder / "DPG-Bench" / "prompts" / "0.txt").write_text("a bench", encoding="utf-8")
    (folder / "color_val.txt").write_text("a red bench\n", encoding="utf-8")
    tokenizer = IBQTokenizer(IBQConfig(**PUBLIC))
    tokenizer.save_pretrained(folder / "tokenizers" / "emu")
    for layout, name in CHECKPOINTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        layouts.export_tokenizer(tokenizer, folder / name, layout)
    (folder / "tiny.yaml").write_text(blocks(DOCS / "recipes.md", "yaml")[0], encoding="utf-8")
    return folder


PUBLIC: dict[str, Any] = {"channels": 32, "channel_multipliers": (1, 1, 1, 2), "num_res_blocks": 1, "z_channels": 32}
PUBLIC |= {"codebook_size": 64, "codebook_dim": 8}
CHECKPOINTS = {
    "emu3.5": "Emu3.5-VisionTokenizer",
    "diffusers": "URSA-1.7B-IBQ1024/vae",
    "seed-voken": "imagenet256_262144.ckpt",
}
"""Public tokenizers that pages name, here of a few weights."""
SMOLLM2 = "smollm2-135m"
"""Folder of a language model of a few thousand weights that stands in for those of pages and recipes."""
CHAT = (
    "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{% if turn.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Its chat template."""
RUNS = ("runs/mine", "runs/demo/ett", "runs/big")
"""Names under which pages speak of a run that the reader has."""


@pytest.fixture
def desk(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    made = Desk(tmp_path / "desk")
    shutil.copytree(parts, made.folder, ignore=shutil.ignore_patterns("run"))
    for name in ("docs", "examples", "constraints.txt"):
        (made.folder / name).symlink_to(ROOT / name)
    made.provided.add(made.folder / "tokenizers" / "emu")
    for name in RUNS:
        shutil.copytree(parts / "run", made.folder / name)
        made.provided.add(made.folder / name)

    def in_this_process(pending: Sequence[Any], out: Path, jobs: int) -> None:
        waiting = list(pending)
        while (job := ablate._next(waiting, [])) is not None:
            ablate.run_only(out, job.key)

    for place in ("smollm2", "loading"):
        monkeypatch.setattr(f"ett.model.{place}.prepare_smollm2", lambda *_: made.folder / SMOLLM2)
    monkeypatch.setattr(ablate, "_run_all", in_this_process)
    monkeypatch.setattr("ett.serve.server.serve", lambda app, bound, limits, **options: None)
    monkeypatch.setattr("ett.export.hub.HfApi", type("Here", (Hub,), {"folder": tmp_path / "hub", "calls": []}))
    for name in ("ETT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    return made


# -- the pages ---------------------------------------------------------------------------------------------------------

COMMANDED = [page for page in PAGES if page.name not in SKIPPED and blocks(page, "bash")]


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.name, marks=[] if p.name in QUICK else [pytest.mark.slow]) for p in COMMANDED]
)
def test_the_commands_of_a_page_run(page: Path, desk: Desk) -> None:
    for block in blocks(page, "bash"):
        desk.run(block)


def test_what_does_not_run_is_known_and_needed() -> None:
    """No page has a program that is neither run nor excused, and no excuse outlives its page."""
    lines = "\n".join(block for page in COMMANDED for block in blocks(page, "bash"))
    for excused in (*STANDS_IN, *PUT_ASIDE):
        assert excused in lines, f"{excused} is on no page any more"
    known = {*PROGRAMS, "srun", "openssl", "chmod", "mkdir", "export", "exec", "cd", ".", "head", "git", "bash"}
    for line in lines.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|\|", re.sub(r"#.*|^\w+=\$\(|'[^']*'|\"[^\"]*\"", "", line)):
            program = next(iter(command.split()), "")
            first = program.rpartition("/")[2]
            assert not first or first in known or "=" in first or first.startswith("--"), f"{line}: {program}"


def test_a_command_that_fails_is_found(desk: Desk) -> None:
    """And so is a wrong word of a program that is replaced."""
    desk.run('folder=$(ett env --json)\ntest -n "$folder"')
    for wrong in (
        "ett env --jsonn",
        "ett chat nowhere cat.png",
        "make nothing",
        "pip install 'ett-tuning[nothing]'",
        "git pull",
    ):
        with pytest.raises(AssertionError, match=re.escape(wrong.split()[0])):
            desk.run(f"{wrong}\nett env")
