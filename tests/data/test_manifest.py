"""Manifests: both dialects, every refusal with its file and line, and what worker processes need."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch.utils.data

from ett.data import manifest as module
from ett.data.entries import Lines, Refused, open_entries
from ett.data.far import BrokenSource
from ett.data.manifest import Manifest, question_and_reference
from ett.errors import DataError
from ett.types import Example

IMAGE = {"type": "image"}
COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def llava(*values: str, image: Any = "red.png", **more: Any) -> dict[str, Any]:
    """A line whose turns alternate, the human first."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"image": image, "conversations": turns, **more}


GOOD = llava("<image>\nWhat is it?", "Red.")


class Folder:
    """A folder of pictures, each of one colour, in which manifests are written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "sub").mkdir(parents=True)
        for name, colour in COLOURS.items():
            PIL.Image.new("RGB", (4, 2), colour).save(path / f"{name}.png")
        PIL.Image.new("RGB", (4, 2), COLOURS["blue"]).save(path / "sub" / "deep.png")

    def write(self, *lines: Any) -> Path:
        """A manifest; texts and bytes go in as they are, the rest as JSON."""
        path = self.path / "some.jsonl"
        raw = [x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines]
        path.write_bytes(b"\n".join(raw) + b"\n")
        return path

    def refusal(self, *lines: Any, **options: Any) -> str:
        """The message with which a manifest of these lines is refused, without the path in front."""
        path = self.write(*lines)
        with pytest.raises(DataError) as caught:
            Manifest(path, **options)
        message = str(caught.value)
        assert message.startswith(str(path))
        assert "\n" not in message
        message.encode("utf-8")
        return message.removeprefix(str(path))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "data")


def colours(example: Example) -> list[str]:
    names = {colour: name for name, colour in COLOURS.items()}
    return [names[image.getpixel((0, 0))] for image in example.images]  # type: ignore[index]


# What is read.


def test_llava(folder: Folder) -> None:
    source = Manifest(folder.write({"id": "a", "split": "train", **GOOD}))
    assert source.name == "some"
    assert len(source) == 1
    example = source[0]
    assert example.id == "a"
    assert example.messages == [
        {"role": "user", "content": [IMAGE, text("What is it?")]},
        {"role": "assistant", "content": [text("Red.")]},
    ]
    assert colours(example) == ["red"]
    assert example.images[0].mode == "RGB"
    assert example.metadata == {"split": "train"}


def test_markers_become_parts_in_place(folder: Folder) -> None:
    value = "Is <image> lighter than <image>?\n<image>\nOr this\n"
    source = Manifest(
        folder.write(llava(value, "No.", "And <image>?", "Yes.", image=["red.png", "green.png", "blue.png", "red.png"]))
    )
    example = source[0]
    assert example.messages[0]["content"] == [
        text("Is "), IMAGE, text(" lighter than "), IMAGE, text("?"), IMAGE, text("Or this"),
    ]  # fmt: skip
    assert example.messages[2]["content"] == [text("And "), IMAGE, text("?")]
    assert len(example.messages) == 4
    assert colours(example) == ["red", "green", "blue", "red"]


def test_pictures_without_a_marker_come_first_in_the_first_human_turn(folder: Folder) -> None:
    line = {
        "images": ["green.png", "red.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "gpt", "value": "Hello."},
            {"from": "human", "value": "Compare."},
            {"from": "gpt", "value": "Fine."},
            {"from": "human", "value": "More."},
        ],
    }
    example = Manifest(folder.write(line))[0]
    assert [message["role"] for message in example.messages] == ["system", "assistant", "user", "assistant", "user"]
    assert [len(message["content"]) for message in example.messages] == [1, 1, 3, 1, 1]
    assert example.messages[2]["content"] == [IMAGE, IMAGE, text("Compare.")]
    assert colours(example) == ["green", "red"]


@pytest.mark.parametrize("image", [None, [], "absent"])
def test_text_only(folder: Folder, image: Any) -> None:
    line = llava("Hi", "Hello", image=image)
    if image == "absent":
        del line["image"]
    example = Manifest(folder.write(line))[0]
    assert example.images == []
    assert example.messages[0]["content"] == [text("Hi")]


def test_an_answer_can_be_a_picture_or_be_missing(folder: Folder) -> None:
    source = Manifest(folder.write(llava("Draw red.", "<image>"), llava("What is it?")))
    assert source[0].messages[1]["content"] == [IMAGE]
    assert question_and_reference(source[0]) == ("Draw red.", None)
    assert question_and_reference(source[1]) == ("What is it?", None)


def openai(*contents: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)], **more}


def embedded(colour: str) -> str:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 2), COLOURS[colour]).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_url(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def test_openai(folder: Folder) -> None:
    parts = [
        text("First "),
        image_url("green.png"),
        {**IMAGE, "text": None},
        text("\nor "),
        image_url(embedded("blue")),
    ]
    source = Manifest(
        folder.write(
            openai("<image>\nWhat?", "Red.", image="red.png"),
            openai(parts, [text("None")], image=["red.png"]),
            {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "images": ["red.png"]},
            openai([image_url("sub/deep.png")], [image_url("green.png")]),
        )
    )
    assert source[0].messages[0] == {"role": "user", "content": [IMAGE, text("What?")]}
    assert source[1].messages[0]["content"] == [text("First "), IMAGE, IMAGE, text("\nor"), IMAGE]
    assert [colours(example) for example in source] == [["red"], ["green", "red", "blue"], ["red"], ["blue", "green"]]
    assert source[2].messages[1]["content"] == [IMAGE, text("Q")]


def test_listed_pictures_keep_their_place_behind_an_earlier_answers_own(folder: Folder) -> None:
    messages = [
        {"role": "assistant", "content": [image_url("green.png")]},
        {"role": "user", "content": [text("Q"), image_url("blue.png")]},
    ]
    example = Manifest(folder.write({"messages": messages, "image": "red.png"}))[0]
    assert example.messages[1]["content"] == [IMAGE, text("Q"), IMAGE]
    assert colours(example) == ["green", "red", "blue"]


def test_ids(folder: Folder) -> None:
    lines = [{"id": "x", **GOOD}, GOOD, "", {"id": 7, **GOOD}, {"id": None, **GOOD}]
    assert [example.id for example in Manifest(folder.write(*lines))] == ["x", "2", "7", "5"]


def test_blank_lines_crlf_bom_and_no_last_newline(folder: Folder) -> None:
    path = folder.path / "odd.jsonl"
    line = json.dumps({**GOOD, "note": "grün \u2028"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n   \n" + line + b"\n\n" + line)
    source = Manifest(path)
    assert [example.id for example in source] == ["1", "4", "6"]
    assert source[2].metadata == {"note": "grün \u2028"}


def test_limit(folder: Folder) -> None:
    path = folder.write(GOOD, "", GOOD, "rubbish")
    assert [example.id for example in Manifest(path, limit=2)] == ["1", "3"]
    assert len(Manifest(folder.write(GOOD), limit=5)) == 1
    with pytest.raises(ValueError, match="limit is 0"):
        Manifest(path, limit=0)


def test_index_errors(folder: Folder) -> None:
    source = Manifest(folder.write(GOOD))
    for index in (1, -1):
        with pytest.raises(IndexError, match="has 1 examples"):
            source[index]


# What is refused: before anything is decoded, with the line.


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "this is not JSON"),
        ('{"id": 1,}', "this is not JSON"),
        ("[" * 100_000, "this is not JSON"),
        ("9" * 5_000, "this is not JSON"),
        ("[]", "JSON array, not an object"),
        ("null", "JSON null, not an object"),
        ("3", "JSON number, not an object"),
        (b'{"id": "\xff"}', "byte 9 of the line (0xff) is not UTF-8"),
        ({"id": "a"}, "neither 'conversations' nor 'messages' among its fields ('id')"),
        ({}, "neither 'conversations' nor 'messages' among its fields (none)"),
        ({**GOOD, "messages": []}, "both 'conversations' and 'messages'"),
        ({**GOOD, "images": []}, "both 'image' and 'images'"),
        ({"conversations": []}, "'conversations' is []"),
        ({"conversations": "hi"}, "'conversations' is \"hi\""),
        ({"conversations": ["hi"]}, "turn 1 is a JSON string"),
        ({"conversations": [{"value": "x"}]}, "turn 1 lacks 'from' (it has 'value')"),
        ({"conversations": [{"from": "human"}]}, "turn 1 lacks 'value'"),
        ({"messages": [{"role": "user"}]}, "turn 1 lacks 'content'"),
        ({"messages": [{"from": "human", "value": "x"}]}, "turn 1 lacks 'role'"),
        ({"conversations": [{"from": "humane", "value": "x"}]}, "Unknown 'from' 'humane'. Did you mean 'human'?"),
        ({"conversations": [{"from": 3, "value": "x"}]}, "Unknown 'from' 3."),
        ({"messages": [{"role": "gpt", "content": "x"}]}, "Allowed: user, assistant, system"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 1 has a JSON number as its content"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 1 has a JSON null as its content"),
        (llava("a", "b", "c", " \n"), "turn 4 is empty"),
        (llava("", "b", image=[]), "turn 1 is empty"),
        ({"conversations": [*GOOD["conversations"], {"from": "system", "value": "x"}]}, "turn 3 is a system turn"),
        (
            {"conversations": [{"from": "system", "value": "<image>"}], "image": "red.png"},
            "system turn holds a picture",
        ),
        ({"conversations": [{"from": "gpt", "value": "x"}], "image": "red.png"}, "no human turn to hold the pictures"),
        (llava("<image><image>", "b"), "mark 2 pictures (<image>), but 1 are listed"),
        (llava("<image>", "b", image=["red.png", "blue.png"]), "mark 1 pictures (<image>), but 2 are listed"),
        (llava("<image>", "b", image=None), "mark 1 pictures (<image>), but 0 are listed"),
        (openai([IMAGE, text("x")]), "mark 1 pictures (<image>), but 0 are listed"),
        (openai(["x"]), "turn 1 holds a JSON string as a part"),
        (openai([{"type": "text"}]), "text part whose 'text' is null"),
        (openai([{"type": "video"}]), "Unknown part type 'video'"),
        (openai([{"type": ["image"]}]), "Unknown part type ['image']"),
        (openai([{"type": "image", "image": "red.png"}]), "an image part with other fields ('image')"),
        (openai([{"type": "image_url"}]), "an image_url part without a url"),
        (openai([{"type": "image_url", "image_url": "red.png"}]), "an image_url part without a url"),
        (openai([image_url(None)]), "a picture is given as null"),
        (openai([image_url("data:text/plain;base64,aGk=")]), "no data URL of a picture"),
        (openai([image_url("data:image/png;base64,a*b=")]), "is not valid base64"),
        (openai([image_url("data:image/png;base64,ä")]), "is not valid base64"),
        (openai([image_url("data:image/png;base64,")]), "holds no bytes"),
        (llava("x", image=3), "a picture is given as 3"),
        (llava("x", image=["red.png", None]), "a picture is given as null"),
        (llava("x", image=""), 'a picture is given as ""'),
        (llava("x", image="https://example.org/a.png"), "is a https address. Nothing is fetched"),
        (openai([image_url("http://example.org/a.png")]), "is a http address. Nothing is fetched"),
        (llava("x", image="file:///etc/passwd"), "is a file address"),
        (llava("x", image="missing.png"), 'the picture "missing.png" does not exist'),
        (llava("x", image="sub"), 'the picture "sub" is a folder'),
        (llava("x", image="a\0.png"), "null character"),
        (llava("x", image="x" * 5000), "(5002 characters) does not exist"),
        ('{"conversations": [{"from": "human", "value": "\\ud800"}]}', 'half a character ("\\ud800"'),
        ('{"image": "\\ud800.png", "conversations": [{"from": "human", "value": "x"}]}', "half a character"),
        ('{"id": "\\udfff", "conversations": [{"from": "human", "value": "x"}]}', "half a character"),
        ({"conversations": [{"from": "\ud800", "value": "x"}]}, "Unknown 'from'"),
        ('{"id": "a", "id": "b"}', 'the key "id" is there twice'),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', 'the key "content" is there twice'),
        ('{"\\ud800": 1, "\\ud800": 2}', 'the key "\\ud800" is there twice'),
        ({**GOOD, "id": ""}, "'id' is \"\""),
        ({**GOOD, "id": True}, "'id' is true"),
        ({**GOOD, "id": 1.5}, "'id' is 1.5"),
        ({**GOOD, "id": ["a"]}, "'id' is [\"a\"]"),
    ],
)
def test_bad_lines(folder: Folder, line: Any, reason: str) -> None:
    message = folder.refusal(GOOD, "", line)
    assert message.startswith(":3: ")
    assert reason in message
    assert len(message) < 400


def test_values_that_are_barely_shallow_enough_to_be_read_are_shown(folder: Folder) -> None:
    for depth in range(700, 1000):
        assert folder.refusal(f'{{"image": {"[" * depth}{"]" * depth}, "messages": []}}').startswith(":1: ")


def test_a_json_array_is_told_apart(folder: Folder) -> None:
    assert "It looks like one JSON array" in folder.refusal("[", json.dumps(GOOD), "]")
    assert "JSONL has no array around its lines" in folder.refusal([GOOD])


def test_twins(folder: Folder) -> None:
    message = folder.refusal({"id": "a", **GOOD}, {"id": "b", **GOOD}, "", {"id": "a", **GOOD})
    assert message.startswith(":4: the id 'a' is that of line 1 too")
    assert folder.refusal({"id": "2", **GOOD}, GOOD).startswith(":2: the id '2' is that of line 1 too")
    assert folder.refusal({"id": 5, **GOOD}, {"id": "5", **GOOD}).startswith(":2: ")


def test_equal_digests_are_not_twins(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant:
        def __init__(self, data: bytes, digest_size: int) -> None:
            self._size = digest_size

        def digest(self) -> bytes:
            return bytes(self._size)

    monkeypatch.setattr(module, "blake2b", Constant)
    lines = [{"id": name, **GOOD} for name in "abcd"]
    assert len(Manifest(folder.write(*lines))) == 4
    assert folder.refusal(*lines, {"id": "b", **GOOD}).startswith(":5: the id 'b' is that of line 2 too")


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for opened in (Manifest, Lines, open_entries):
        with pytest.raises(DataError, match=r"pipe\.jsonl is not a file"):
            opened(tmp_path / "pipe.jsonl")


def test_files_that_are_no_manifest(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is empty" in folder.refusal("", "  ")
    (folder.path / "zero.jsonl").touch()
    for name, reason in (
        ("zero.jsonl", "is empty"),
        ("none.jsonl", "does not exist"),
        ("sub", "is not a file"),
        ("red.png", ":1: "),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            Manifest(folder.path / name)
        assert name in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        Manifest(folder.path / ("x" * 300))
    monkeypatch.setattr("ett.data.json_lines.MAX_LINE_BYTES", 1000)
    assert ":2: the line is longer than" in folder.refusal(GOOD, {**GOOD, "note": "x" * 1000})


# The fence around the manifest's folder.


def test_paths_out_of_the_folder(folder: Folder, tmp_path: Path) -> None:
    other = Folder(tmp_path / "other")
    (folder.path / "link.png").symlink_to(other.path / "green.png")
    (folder.path / "linked").symlink_to(other.path)
    for image in ("../other/green.png", "link.png", "linked/green.png", "../missing.png", ".."):
        message = folder.refusal(llava("x", image=image))
        assert "leads out of the manifest's folder" in message, "whether it exists is not told"
        assert "image_root=" in message
    absolute = str(other.path / "green.png")
    assert "is an absolute path and no image_root is given" in folder.refusal(llava("x", image=absolute))
    assert "is an absolute path and no" in folder.refusal(llava("x", image=str(folder.path / "red.png")))
    lines = [llava("x", image=image) for image in ("../other/green.png", "link.png", "linked/green.png", absolute)]
    source = Manifest(folder.write(*lines, llava("x", image="sub/../green.png")), image_root=other.path)
    assert [colours(example) for example in source] == [["green"]] * 5
    assert "it is not in image_root" in folder.refusal(llava("x", image="/etc/passwd"), image_root=other.path)
    sibling = Folder(tmp_path / "other2")
    outside = llava("x", image=str(sibling.path / "red.png"))
    assert "it is not in image_root" in folder.refusal(outside, image_root=other.path), "not a prefix of the text"
    with pytest.raises(DataError, match=r"image_root .*absent is not a folder"):
        Manifest(folder.write(GOOD), image_root=tmp_path / "absent")


def test_links_within_the_folder_are_fine(folder: Folder, tmp_path: Path) -> None:
    (folder.path / "sub" / "link.png").symlink_to("../green.png")
    (tmp_path / "alias").symlink_to(folder.path)
    folder.write(llava("x", image="sub/link.png"))
    assert colours(Manifest(tmp_path / "alias" / "some.jsonl")[0]) == ["green"]


# Access.


def test_a_damaged_picture_is_named_with_its_line(folder: Folder) -> None:
    (folder.path / "green.png").write_bytes((folder.path / "green.png").read_bytes()[:50])
    source = Manifest(
        folder.write(GOOD, "", llava("x", image="green.png"), openai([image_url("data:image/png;base64,aGk=")]))
    )
    assert colours(source[0]) == ["red"]
    for index, line, what in ((1, 3, "green.png"), (2, 4, "the given 2 bytes")):
        with pytest.raises(DataError) as caught:
            source[index]
        assert str(caught.value).startswith(f"{source.path}:{line}: ")
        assert what in str(caught.value)


def test_a_picture_removed_after_the_check(folder: Folder) -> None:
    source = Manifest(folder.write(GOOD))
    (folder.path / "red.png").unlink()
    with pytest.raises(DataError, match=r":1: .*does not exist"):
        source[0]


def test_a_manifest_changed_in_use(folder: Folder) -> None:
    source, tolerant = Manifest(folder.write(GOOD)), Lines(folder.write(GOOD))
    folder.write(llava("Another text", "of another length."))
    with pytest.raises(DataError, match="was changed while in use"):
        source[0]
    with pytest.raises(DataError, match="was changed while in use") as caught:
        tolerant.read(0)
    assert not isinstance(caught.value, Refused), "no bad sample, which would be passed over"
    source.path.unlink()
    with pytest.raises(BrokenSource, match=r"was there and is out of reach now \(No such file"):
        source[0]


def numbers(source: Manifest) -> list[tuple[str, bytes]]:
    return [(example.id, np.asarray(example.images[0]).tobytes()) for example in source]


class Ids(torch.utils.data.Dataset[str]):
    def __init__(self, source: Manifest) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> str:
        return self.source[index].id


def test_pickled_and_in_workers(folder: Folder) -> None:
    lines = [llava("x", image=f"{name}.png") for name in COLOURS for _ in range(4)]
    source = Manifest(folder.write(*lines))
    assert numbers(pickle.loads(pickle.dumps(source))) == numbers(source)
    loader = torch.utils.data.DataLoader(Ids(source), batch_size=4, num_workers=1)
    assert [name for batch in loader for name in batch] == [str(i + 1) for i in range(12)]


def test_lines_are_not_kept(folder: Folder) -> None:
    source = Manifest(folder.write(*({**GOOD, "note": "x" * 1000} for _ in range(500))))
    assert len(pickle.dumps(source)) < 500 * 16 + 1000


# What evaluations ask.


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (lambda: llava("<image>\nWhat?", "Red.", "Sure?", "Yes."), ("What?", "Red.")),
        (lambda: llava("<image>\n", "Red."), (None, "Red.")),
        (lambda: llava("", "Red."), (None, "Red.")),
        (lambda: llava("a\n<image>\nb", "c"), ("a b", "c")),
        (lambda: openai([text("a "), image_url("red.png"), text(" b")], [text("c"), text("d")]), ("a b", "c d")),
        (lambda: {"conversations": [{"from": "gpt", "value": "Hello."}]}, (None, "Hello.")),
    ],
)
def test_question_and_reference(
    folder: Folder, line: Callable[[], dict[str, Any]], expected: tuple[str | None, str | None]
) -> None:
    assert question_and_reference(Manifest(folder.write(line()))[0]) == expected
