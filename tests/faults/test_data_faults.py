"""Bad samples in the stream: skipped, counted, named and capped; loaders that die end with a message."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from ett.config import from_mapping
from ett.data.check import check
from ett.data.mixture import STAND_INS, Mixture, SourceConfig, build_mixture, encode_draw
from ett.data.sources import Source
from ett.errors import DataError, RecipeError, UserError
from ett.experiments.recipe import Recipe, load_recipe
from ett.experiments.run import Run
from ett.model import EttImageProcessor, EttProcessor
from ett.model.text import byte_tokenizer
from ett.train import loop as loop_module
from ett.train.log import read_log
from ett.types import Example
from tests.conftest import killed_at
from tests.faults.test_ranks import write


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims any size, with data for none of it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def picture(kind: str = "PNG", size: int = 40) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.radial_gradient("L").resize((size, size)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def turns(answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": answer}]


def spoil(folder: Path) -> dict[int, str]:
    """Spoil lines of the toy manifest and pictures that it names; returns line -> what is said about it."""
    manifest = folder / "manifest.jsonl"
    lines: list[bytes] = manifest.read_bytes().splitlines()
    (folder / "0.jpg").write_bytes(picture("JPEG", 200)[:2000])
    (folder / "1.png").write_bytes(png(50_000, 50_000))
    (folder / "2.png").write_bytes(png(40, 40))
    (folder.parent / "outside.png").write_bytes(picture())
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    fields = [json.loads(line) for line in lines]
    fields[0]["image"] = "0.jpg"
    fields[3]["conversations"] = turns("")
    fields[5]["image"] = "gone.png"
    fields[6]["image"] = "link.png"
    fields[7]["image"] = "../outside.png"
    lines = [json.dumps(each).encode() for each in fields]
    lines[4] = lines[4].replace(b"number 4", b"number \xff4")
    lines[8] = lines[8][:-9]
    manifest.write_bytes(b"\n".join(lines) + b"\n")
    return {
        1: "truncated",
        2: "too large to decode",
        3: "is damaged",
        4: "turn 2 is empty",
        5: "is not UTF-8",
        6: "does not exist",
        7: "leads out of the manifest's folder",
        8: "leads out of the manifest's folder",
        9: "this is not JSON",
    }


@pytest.fixture
def recipe(toy_recipe: dict[str, Any]) -> dict[str, Any]:
    """One stage that sees each of its twelve examples, good or bad, twice."""
    toy_recipe["stages"] = [{**toy_recipe["stages"][1], "steps": 6}]
    return toy_recipe


def bad_samples(run: Path) -> list[str]:
    events = read_log(run / "log.jsonl")
    return [event["message"] for event in events if event["event"] == "warning" and event["kind"] == "bad_sample"]


class Ids:
    """The ids of every finished step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps: dict[int, list[str]] = {}
        plain = loop_module.Stage._train_step

        def step(stage: Any, batches: Any) -> Any:
            taken = plain(stage, batches)
            ids = [each for batch in batches for each in batch.ids]
            assert self.steps.setdefault(stage.step, ids) == ids
            return taken

        patch.setattr(loop_module.Stage, "_train_step", step)


def test_bad_samples_are_skipped_counted_once_and_named(
    recipe: dict[str, Any], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = spoil(pictures)
    recipe["max_bad_samples"] = len(expected)
    given = from_mapping(Recipe, recipe)
    ids = Ids(monkeypatch)
    Run(given, tmp_path / "whole").train()
    told = bad_samples(tmp_path / "whole")
    assert len(told) == len(expected), "each once, though drawn twice"
    for line, reason in expected.items():
        (message,) = [each for each in told if f"manifest.jsonl:{line}: " in each]
        assert reason in message
    seen = [each for step in ids.steps.values() for each in step]
    assert len(seen) == 24
    assert set(seen) == {"p9", "p10", "p11"}
    assert min(seen.count(each) for each in set(seen)) >= 2, "good examples keep their own draws"
    # killed and resumed, it skips, replaces and counts the same
    with killed_at(4):
        Run(given, tmp_path / "killed").train()
    Run(given, tmp_path / "killed", resume=True).train()
    assert digest_of_align(tmp_path / "killed") == digest_of_align(tmp_path / "whole")
    assert sorted(bad_samples(tmp_path / "killed")) == sorted(told)


def digest_of_align(run: Path) -> bytes:
    return (run / "stages" / "0-align" / "model.safetensors").read_bytes()


def test_the_cap_stops_the_run_and_can_be_raised(recipe: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    expected = spoil(pictures)
    recipe["max_bad_samples"] = 4
    with pytest.raises(DataError, match=r"\d examples cannot be used; max_bad_samples = 4 ") as caught:
        Run(from_mapping(Recipe, recipe), tmp_path / "run").train()
    assert str(caught.value).count("manifest.jsonl:") == 5
    recipe["max_bad_samples"] = len(expected)
    Run(from_mapping(Recipe, recipe), tmp_path / "run", resume=True).train()
    assert len(set(bad_samples(tmp_path / "run"))) >= len(expected)


def test_without_the_option_the_first_one_ends_the_run(recipe: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    spoil(pictures)
    with pytest.raises(DataError, match=r"manifest\.jsonl:4: turn 2 is empty"):
        Run(from_mapping(Recipe, recipe), tmp_path / "run")
    recipe["stages"][0]["cached_codes"] = True
    with pytest.raises(RecipeError, match="cached_codes needs data in which nothing is wrong"):
        from_mapping(Recipe, {**recipe, "max_bad_samples": 1})


class Rotten(Source):
    name = "rotten"

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Example:
        raise DataError(f"example {index} is rotten.")


def test_a_source_of_nothing_but_bad_samples_is_told_from_bad_luck() -> None:
    mixture = Mixture([Rotten()], [1.0], 0, tolerant=True)
    with pytest.raises(DataError, match=rf"'rotten': {STAND_INS + 1} examples in a row .*example \d is rotten"):
        encode_draw(mixture, 3, None, None)  # type: ignore[arg-type]  # nothing gets as far as the processor


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_refuses_an_example_is_no_end(tmp_path: Path) -> None:
    """Of Gemma's and Mistral's kind: users who ask twice are refused, and so are system turns."""
    lines = []
    for k, roles in enumerate(
        (("human", "gpt"), ("human", "human", "gpt"), ("human", "gpt"), ("system", "human", "gpt"))
    ):
        lines.append(json.dumps({"id": str(k), "conversations": [{"from": role, "value": "x"} for role in roles]}))
    (tmp_path / "m.jsonl").write_text("\n".join(lines), encoding="utf-8")
    processor = EttProcessor(EttImageProcessor(8, 8), byte_tokenizer(), 4, ALTERNATING)
    config = SourceConfig(source="manifest", path=str(tmp_path / "m.jsonl"))
    source = config.build(tolerant=True)
    drawn = [encode_draw(Mixture([source], [1.0], 0, tolerant=True), draw, processor, None) for draw in range(4)]
    assert {each.item.id for each in drawn} == {"0", "2"}
    assert {skipped.position for each in drawn for skipped in each.skipped} == {1, 3}
    refusal = r"Example '1': the chat template refuses its turns \(user, user, assistant\): roles must alternate\. Mend"
    with pytest.raises(DataError, match=refusal):
        processor.encode(config.build()[1])
    with pytest.raises(DataError, match="refuses its turns"):
        processor.prompt([config.build()[1]])
    assert (
        "refuses its turns" in check(tmp_path / "m.jsonl", processor=processor)["problems"]["not_encodable"]["first"][1]
    )


def write_shard(path: Path, number: int, samples: int = 4, **members: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for k in range(samples):
            parts = {f"s{number}{k}.png": picture(), f"s{number}{k}.txt": f"shard {number}".encode()}
            for name, content in {**parts, **(members if k == 0 else {})}.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three good shards, one cut short, one with a member that leads out, one that is a link to a file elsewhere."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        write_shard(folder / f"{number}.tar", number)
    os.truncate(write_shard(folder / "3.tar", 3), 3000)
    write_shard(folder / "4.tar", 4, **{"../../etc/passwd.txt": b"x"})
    (folder / "5.tar").symlink_to(write_shard(tmp_path / "5.tar", 5))
    return folder


def test_bad_shards_are_left_out_whole_and_named(
    recipe: dict[str, Any], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["data"] = [{"source": "shards", "path": str(shards)}]
    with pytest.raises(DataError, match=r"3\.tar.*truncated or damaged"):
        Run(from_mapping(Recipe, recipe), tmp_path / "run")
    recipe["max_bad_samples"] = 3
    ids = Ids(monkeypatch)
    Run(from_mapping(Recipe, recipe), tmp_path / "run").train()
    told = bad_samples(tmp_path / "run")
    reasons = ["truncated or damaged", "is unsafe", "symbolic link"]
    assert len(told) == 3
    assert all(any(reason in each for each in told) for reason in reasons)
    good = {f"s{number}{k}" for number in range(3) for k in range(4)}
    first_epoch = [each for step in range(3) for each in ids.steps[step]]
    assert sorted(first_epoch) == sorted(good), "every good sample exactly once an epoch"
    write_shard(shards / "0.tar", 9)
    with pytest.raises(RecipeError, match=r"shards has changed"):
        Run(from_mapping(Recipe, recipe), tmp_path / "run", resume=True)


def test_a_pattern_names_shards(shards: Path) -> None:
    source = build_mixture([SourceConfig(source="shards", path=str(shards / "[01].tar"))], 0).sources[0]
    assert [example.id for example in source] == [f"s{number}{k}" for number in range(2) for k in range(4)]
    with pytest.raises(DataError, match="names no shards"):
        SourceConfig(source="shards", path=str(shards / "9*.tar")).build()
    with pytest.raises(RecipeError, match="needs a path"):
        SourceConfig(source="shards")


LOADER_KILLED = """
import multiprocessing, sys
from ett.cli import main
from ett.train import loop

plain = loop.Stage._train_step

def step(self, batches):
    if self.step == 4:
        for loader in multiprocessing.active_children():
            print("killed", flush=True)
            loader.kill()
    return plain(self, batches)

loop.Stage._train_step = step
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_loader_ends_with_a_message_and_the_run_goes_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    """In a process of its own: torch raises a loader's death wherever its main thread is at that moment."""
    recipe["stages"][0] |= {"steps": 14, "checkpoint_every": 2}
    recipe["num_workers"] = 1
    path = write(recipe, tmp_path / "recipe.yaml")
    words = [sys.executable, "-c", LOADER_KILLED, "train", str(path), "--out", str(tmp_path / "run")]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert ended.stdout.split() == ["killed"], ended
    assert ended.returncode == 2, ended
    assert re.search(r"reads pictures ended by itself .*Continue with --resume", ended.stderr), ended.stderr
    recipe["num_workers"] = 0
    given = load_recipe(write(recipe, path))
    Run(given, tmp_path / "run", resume=True).train()
    Run(given, tmp_path / "whole").train()
    assert digest_of_align(tmp_path / "run") == digest_of_align(tmp_path / "whole")


def test_a_nan_batch_ends_as_the_recipe_says(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Stop, or leave the step out and go on at a lower rate; both tell it, neither moves a weight by it."""
    plain = loop_module.JointObjective.forward

    def poisoned(self: Any, batch: Any, *arguments: Any) -> Any:
        output = plain(self, batch, *arguments)
        return output._replace(loss=output.loss * float("nan")) if "p3" in batch.ids else output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module.JointObjective, "forward", poisoned)
        with pytest.raises(UserError, match="the gradient norm is nan"):
            Run(from_mapping(Recipe, recipe), tmp_path / "stop").train()
        recipe["stages"][0]["health"] = {"on_non_finite": "back_off"}
        Run(from_mapping(Recipe, recipe), tmp_path / "on").train()
    events = read_log(tmp_path / "on" / "log.jsonl")
    assert [event["kind"] for event in events if event["event"] == "warning"].count("non_finite") == 2
