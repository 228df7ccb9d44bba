"""The plug-in for lmms-eval: requests and answers as its interface has them, and its own command where it is installed."""

from __future__ import annotations

import abc
import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.ImageFile
import pytest
import yaml

from ett.data.artwork import ArtworkNames
from ett.data.manifest import Manifest, question_and_reference
from ett.data.mixture import Limited
from ett.errors import DataError, ModelError, UserError
from ett.evaluate.lmms import CHAT_CLASS, SIMPLE_CLASS, adapter, manifest
from ett.evaluate.lmms.tasks import UTILS_NAME, write_tasks
from ett.evaluate.run import evaluate
from ett.types import Example
from tests.evaluate.conftest import Listed, Toy, picture

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
GREEDY = {"max_new_tokens": 6, "do_sample": False, "temperature": 0, "until": []}


class _Base(abc.ABC):
    """The part of ``lmms_eval.api.model.lmms`` (0.7.3) that its evaluator relies on."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)

    @abc.abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]: ...

    @abc.abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: list[Any]) -> list[str]: ...


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`ett.evaluate.lmms.models` on lmms-eval's base class, or on what stands for it where that is not installed."""
    if not INSTALLED:
        module = types.ModuleType("lmms_eval.api.model")
        module.lmms = _Base  # type: ignore[attr-defined]
        for name in ("lmms_eval", "lmms_eval.api"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "lmms_eval.api.model", module)
    monkeypatch.delitem(sys.modules, "ett.evaluate.lmms.models", raising=False)
    yield importlib.import_module("ett.evaluate.lmms.models")
    sys.modules.pop("ett.evaluate.lmms.models", None)


@pytest.fixture
def folder(toy: Toy, tmp_path: Path) -> Path:
    model, processor = toy
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def docs(examples: Sequence[Example]) -> list[dict[str, Any]]:
    found = []
    for example in examples:
        question, answer = question_and_reference(example)
        found.append({"images": list(example.images), "question": question or "", "answer": answer})
    return found


def request(*arguments: Any) -> Any:
    return types.SimpleNamespace(args=arguments)


def messages_of(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]


def test_both_classes_say_what_our_own_evaluation_hears(
    models: Any, toy: Toy, folder: Path, examples: list[Example]
) -> None:
    ours = evaluate(*toy, [("listed", Listed(examples))], ["answers"], batch_size=2, max_new_tokens=6)
    expected = [each.prediction for each in ours.predictions]
    assert len(set(expected)) > 1, "equal answers would show nothing"
    listed = docs(examples)
    chat, simple = (
        cls(pretrained=str(folder), batch_size="2", device="cpu") for cls in (models.EttChat, models.EttSimple)
    )
    for each in (chat, simple):
        each.task_dict = {"t": {"test": listed}}
    assert not models.EttChat.is_simple
    assert models.EttSimple.is_simple
    # one request asks for less: its neighbours are answered with what they ask for
    short = {**GREEDY, "max_new_tokens": 1}
    settings = [GREEDY, short, *[GREEDY] * (len(listed) - 2)]
    in_chat = [request("", messages_of, settings[i], i, "t", "test") for i in range(len(listed))]
    plainly = [
        request(doc["question"], settings[i], lambda doc: doc["images"], i, "t", "test") for i, doc in enumerate(listed)
    ]
    said = chat.generate_until(in_chat)
    assert said == simple.generate_until(plainly)
    assert [*said[:1], *said[2:]] == [*expected[:1], *expected[2:]]
    assert expected[1].startswith(said[1])
    with pytest.raises(NotImplementedError, match="force_simple"):
        chat.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        simple.generate_until_multi_round([])


def test_likelihoods_are_mean_losses_that_choose_as_our_task_does(
    models: Any, toy: Toy, folder: Path, examples: list[Example]
) -> None:
    choices = [str(question_and_reference(example)[1]) for example in examples]
    simple = models.EttSimple(pretrained=str(folder), batch_size=3)
    simple.task_dict = {"t": {"test": docs(examples)}}
    asked = [
        request(doc["question"], f" {choice}", lambda doc: doc["images"], i, "t", "test")
        for i, doc in enumerate(docs(examples))
        for choice in choices
    ]
    found = simple.loglikelihood(asked)
    size = len(choices)
    best = [min(range(size), key=lambda c, i=i: found[i * size + c][0]) for i in range(len(examples))]
    posed = [Example(e.id, e.messages, e.images, {"choices": choices}) for e in examples]
    ours = evaluate(*toy, [("listed", Listed(posed))], ["choices", "loss"])
    assert [float(choice == i) for i, choice in enumerate(best)] == [
        hit for hit, _ in ours.metrics["choice_accuracy"].parts
    ]
    for i, (nats, tokens) in enumerate(ours.metrics["caption_loss"].parts):
        assert found[i * size + i][0] == pytest.approx(nats / tokens, rel=1e-5)
    hits = ours.metrics["caption_token_accuracy"].parts
    assert [found[i * size + i][1] for i in range(size)] == [hit == tokens for hit, tokens in hits]


def test_what_is_not_ours_to_answer_is_refused(models: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_pixels"):
        models.EttChat(pretrained=str(folder), max_pixels=3)
    with pytest.raises(UserError, match="'auto'"):
        models.EttChat(pretrained=str(folder), batch_size="auto")
    with pytest.raises(ModelError, match="no folder"):
        models.EttChat(pretrained=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="greedily"):
        adapter.refuse_sampling({"do_sample": True, "temperature": 0.7})
    with pytest.raises(UserError, match="greedily"):
        adapter.refuse_sampling({"num_beams": 3})
    with pytest.raises(UserError, match="greedily"):
        adapter.refuse_sampling({"do_sample": True})
    adapter.refuse_sampling({"do_sample": True, "temperature": 0})
    adapter.refuse_sampling({"do_sample": False, "temperature": 0.7})
    with pytest.raises(UserError, match="video"):
        adapter.asked_in_chat([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "one")
    with pytest.raises(UserError, match="shows a dict"):
        adapter.asked_simply("", [{"bytes": b""}], "one")


def test_answers_end_where_the_task_says() -> None:
    assert adapter.cut("a cat\n\nand", ["\n\n"]) == "a cat"
    assert adapter.cut("a cat. b", [".", "cat", ""]) == "a"
    assert adapter.cut(" a ", None) == "a"


def test_half_a_picture_is_no_picture_whatever_the_process_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = io.BytesIO()
    picture(3, 64, 64).save(whole, "png")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[:4000])
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError):
        adapter.asked_simply("", [str(tmp_path / "half.png")], "one")
    assert PIL.ImageFile.LOAD_TRUNCATED_IMAGES
    assert adapter.asked_simply("", [picture(3)], "one").images[0].size == (40, 30)


def test_too_few_names_make_no_choices_and_no_answers_leave_nothing(tmp_path: Path) -> None:
    names = Limited(ArtworkNames("pair"), 8)
    assert [task.kind for task in write_tasks([("names", names)], tmp_path / "few", limit=3)] == ["answers"]
    silent = tmp_path / "silent.jsonl"
    asked = {"conversations": [{"from": "human", "value": "What?"}]}
    silent.write_text(json.dumps(asked) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="no answers"):
        write_tasks([("names", names), ("silent", Manifest(silent))], tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_a_task_folder_is_a_manifest_and_a_task(tmp_path: Path) -> None:
    names = Limited(ArtworkNames("pair"), 8)
    written = write_tasks([("names.pair", names)], tmp_path / "tasks", limit=6)
    assert [(task.name, task.kind) for task in written] == [
        ("ett_names_pair_answers", "answers"),
        ("ett_names_pair_choices", "choices"),
    ]
    for task in written:
        manifest = Manifest(task.data)
        assert len(manifest) == task.num_examples == 6
        for mine, theirs in zip(manifest, (names[i * 8 // 6] for i in range(6)), strict=True):
            assert question_and_reference(mine) == question_and_reference(theirs)
            assert mine.images[0].tobytes() == theirs.images[0].convert("RGB").tobytes()
        lines = [json.loads(line) for line in task.data.read_text(encoding="utf-8").splitlines()]
        spec = importlib.util.spec_from_file_location("utils", task.data.parent / UTILS_NAME)
        assert spec is not None
        assert spec.loader is not None
        utils = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(utils)
        assert utils.pictures(lines[0])[0].tobytes() == manifest[0].images[0].tobytes()
        assert utils.compared(lines[0], [lines[0]["answer"].upper() + "."]) == {"exact_match": 1.0}
        assert utils.compared(lines[0], ["something else"]) == {"exact_match": 0.0}
        text = (task.data.parent / f"{task.name}.yaml").read_text(encoding="utf-8")
        given = yaml.safe_load("\n".join(line for line in text.splitlines() if "!function" not in line))
        assert given["task"] == task.name
        assert Path(given["dataset_kwargs"]["data_files"]["test"]) == task.data
        if task.kind == "choices":
            assert all(line["choices"][utils.right(line)] == line["answer"] for line in lines)
            assert all(len(set(line["choices"])) == 4 for line in lines)
            place = utils.right(lines[0])
            losses = [(1.0 if i == place else 2.0, False) for i in range(4)]
            assert (
                utils.likeliest(lines[0], losses) == utils.likeliest(lines[0], list(map(str, losses))) == {"acc": 1.0}
            )
            assert utils.likeliest(lines[0], [(1.0, True)] * 4) == {"acc": 0.0}, "a tie is no choice"
            # the right one is not always in the same place
            assert len({utils.right(line) for line in lines}) > 1
    with pytest.raises(DataError, match="not an empty folder"):
        write_tasks([("names", names)], tmp_path / "tasks")


def test_the_entry_point_names_what_exists() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    groups = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["entry-points"]
    assert groups["lmms_eval.models"] == {"ett": "ett.evaluate.lmms:manifest"}
    assert callable(manifest)
    module, _, name = CHAT_CLASS.rpartition(".")
    assert f"{module}.EttSimple" == SIMPLE_CLASS
    source = importlib.util.find_spec(module)
    assert source is not None
    assert source.origin is not None
    assert f"class {name}(" in Path(source.origin).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed; tools/lmms_eval_check.py sets it up and runs it")
def test_lmms_eval_itself_agrees_to_the_last_sample(toy: Toy, folder: Path, tmp_path: Path) -> None:
    (task,) = write_tasks([("names", Limited(ArtworkNames("pair"), 4))], tmp_path / "tasks")[:1]
    command = [sys.executable, "-m", "lmms_eval", "--model", "ett", "--model_args", f"pretrained={folder}"]
    command += ["--include_path", str(tmp_path / "tasks"), "--tasks", task.name, "--device", "cpu", "--log_samples"]
    command += ["--output_path", str(tmp_path / "out")]
    subprocess.run(command, check=True, env={**os.environ, "HF_HOME": str(tmp_path / "cache")}, capture_output=True)
    (samples,) = (tmp_path / "out").rglob(f"*_samples_{task.name}.jsonl")
    theirs = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    ours = evaluate(*toy, [("m", Manifest(task.data))], ["answers"], batch_size=1)
    assert [each["filtered_resps"] for each in sorted(theirs, key=lambda each: each["doc_id"])] == [
        each.prediction for each in ours.predictions
    ]
