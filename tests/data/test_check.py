"""The check of a data set: everything is counted, everything wrong is named once and stops nothing else."""

from __future__ import annotations

import base64
import io
import json
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from ett.cli import main
from ett.data import entries as module
from ett.data.check import NAMED, _twins, check
from ett.data.check_text import PROBLEMS, as_text
from ett.data.entries import Kind, open_entries
from ett.data.histogram import ASPECT_NAMES, Lengths, Resolutions
from ett.data.mixture import SourceConfig
from ett.errors import DataError
from ett.evaluate.data_page import render_data, write_data_page
from ett.model import EttImageProcessor, EttProcessor
from ett.model.text import CHAT_TEMPLATES, byte_tokenizer
from tests.evaluate.test_report import HOSTILE, Page


def png(width: int = 4, height: int = 2, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return encoded(PIL.Image.fromarray(pixels), "PNG")


def encoded(image: PIL.Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def lying_png() -> bytes:
    """Its header claims 60,000 x 60,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))


def line(answer: str = "Red.", image: Any = "good.png", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns, **more}


def write(folder: Path, *lines: Any) -> Path:
    """A manifest beside ``good.png``; bytes go in as they are, the rest as JSON."""
    (folder / "good.png").write_bytes(png())
    path = folder / "some.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def tar(path: Path, members: dict[str, bytes], *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        for info in extra:
            file.addfile(info)
    return path


@pytest.fixture(scope="module")
def processor() -> EttProcessor:
    """Bytes are tokens, and a picture takes 4 positions."""
    return EttProcessor(EttImageProcessor(8, 8), byte_tokenizer(), 4, CHAT_TEMPLATES["plain"])


def test_every_kind_of_problem_is_counted_and_named_by_line(tmp_path: Path) -> None:
    whole = encoded(PIL.Image.new("RGB", (64, 64), (9, 99, 200)), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bomb.png").write_bytes(lying_png())
    (tmp_path / "text.png").write_bytes(b"no picture")
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "inside" / "link.png").symlink_to(tmp_path / "secret.png")
    embedded = "data:image/png;base64," + base64.b64encode(png()).decode()
    expected: list[tuple[Kind | None, Any]] = [
        (None, line("fine")),
        ("not_utf8", b'{"id": "\xff"}'),
        ("not_json", b"{"),
        ("not_json", [1, 2]),
        ("missing_field", {"id": "a", "image": "good.png"}),
        ("missing_field", {"image": "good.png", "conversations": [{"from": "human"}]}),
        ("wrong_field", {"image": "good.png", "conversations": [{"from": "robot", "value": "x"}]}),
        ("wrong_field", line("<image><image> twice")),
        ("empty_text", line("")),
        ("empty_text", {"messages": [{"role": "user", "content": [{"type": "text", "text": " "}]}]}),
        ("unsafe_path", line(image="../secret.png")),
        ("unsafe_path", line(image=str(tmp_path / "secret.png"))),
        ("unsafe_path", line(image="link.png")),
        ("missing_picture", line(image="none.png")),
        ("missing_picture", line(image="https://example.org/a.png")),
        ("broken_picture", line(image="cut.jpg")),
        ("broken_picture", line(image="text.png")),
        ("broken_picture", line(image="data:image/png;base64,!!!")),
        ("huge_picture", line(image="bomb.png")),
        (None, line("the last", image=[embedded, "good.png"], id="last")),
        ("duplicate_id", line(id="last")),
    ]
    for name in ("cut.jpg", "bomb.png", "text.png"):
        (tmp_path / name).rename(tmp_path / "inside" / name)
    path = write(tmp_path / "inside", *(given for _, given in expected))
    summary = check(path)

    found = [
        (int(text.removeprefix(f"{path}:").split(":")[0]), kind)
        for kind, problem in summary["problems"].items()
        for text in problem["first"]
    ]
    assert sorted(found) == [(number, kind) for number, (kind, _) in enumerate(expected, 1) if kind]
    assert all(problem["count"] == len(problem["first"]) for problem in summary["problems"].values())
    assert (summary["examples"], summary["usable"]) == (len(expected), 2)
    assert summary["problems"]["duplicate_id"]["first"] == [
        f"{path}:21: its id is that of {path}:20 too. Make the ids unique."
    ]
    assert "60000" in summary["problems"]["huge_picture"]["first"][0]
    assert set(summary["problems"]) | {"refused_shard", "too_long", "not_encodable"} == set(PROBLEMS)
    text = as_text(summary)
    assert all(f"{PROBLEMS[kind]}: {problem['count']}" in text for kind, problem in summary["problems"].items())


def test_a_line_that_is_too_long_ends_where_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ett.data.json_lines.MAX_LINE_BYTES", 300)
    path = write(tmp_path, line(), line("x" * 2000), b"  ", line(), line("x" * 300), line())
    summary = check(path)
    (found,) = summary["problems"].values()
    assert [text.split(": ")[0] for text in found["first"]] == [f"{path}:2", f"{path}:5"]
    assert (summary["examples"], summary["usable"]) == (5, 3)


def test_counts_lengths_and_sizes(tmp_path: Path) -> None:
    for name, width, height in (("wide", 90, 20), ("tall", 20, 90), ("large", 300, 300)):
        (tmp_path / f"{name}.png").write_bytes(png(width, height))
    text_only = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}
    no_answer = {"image": "wide.png", "conversations": [{"from": "human", "value": "What?"}]}
    path = write(tmp_path, line("abcd", ["wide.png", "large.png"]), line("abc", "tall.png"), text_only, no_answer)
    summary = check(path)
    assert summary["problems"] == {}
    assert (summary["pictures"], summary["without_picture"], summary["without_answer"]) == (4, 1, 1)
    assert summary["characters"] == {
        "count": 3,
        "smallest": 3,
        "median": 3,
        "p95": 4,
        "largest": 4,
        "mean": 10 / 3,
        "buckets": [[2, 3, 2], [4, 7, 1]],
    }
    sizes = summary["resolutions"]
    assert (sizes["smallest"], sizes["largest"]) == ([90, 20, f"{path}:1"], [300, 300, f"{path}:1"])
    assert sizes["longer_side"] == [[64, 127, 3], [128, 255, 0], [256, 511, 1]]
    assert {name: n for name, n in sizes["aspects"].items() if n} == {
        "below 1:3": 1,
        "3:4 to 4:3": 1,
        "3:1 and above": 2,
    }
    assert check(path, limit=2)["examples"] == 2
    assert summary["budget"] is None
    assert json.loads(json.dumps(summary)) == summary
    assert "smallest 90 x 20" in as_text(summary)


def test_lengths_and_resolutions_agree_with_plain_loops() -> None:
    rng = np.random.default_rng(0)
    given = rng.integers(0, 5000, 300).tolist()
    lengths = Lengths()
    for each in given:
        lengths.add(each)
    values = lengths.values()
    assert sum(n for *_, n in values["buckets"]) == 300
    assert all(n == sum(low <= each <= high for each in given) for low, high, n in values["buckets"])
    assert values["p95"] == sorted(given)[284]
    resolutions = Resolutions()
    for width, height in zip(given, reversed(given), strict=True):
        resolutions.add(width + 1, height + 1, "")
    cells = resolutions.values()["cells"]
    for x, y, n in cells:
        inside = [
            0.99 * x <= w + 1 < 1.01 * x * 2**0.25 and 0.99 * y <= h + 1 < 1.01 * y * 2**0.25
            for w, h in zip(given, reversed(given), strict=True)
        ]
        assert 1 <= n <= sum(inside)
    assert sum(n for *_, n in cells) == 300
    assert list(resolutions.values()["aspects"]) == list(ASPECT_NAMES)


def test_twins_are_found_by_their_first() -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 20, 60).tolist()
    digests = np.array([[value % 4, value] for value in values], np.uint64)
    plain = [(values.index(value), i) for i, value in enumerate(values) if values.index(value) < i]
    assert _twins(digests) == plain
    assert len(plain) > 30


def test_positions_are_those_of_training(tmp_path: Path, processor: EttProcessor) -> None:
    reserved = line(f"say {processor.image_token}")
    path = write(tmp_path, line("ab"), line("a" * 40), line("ab", ["good.png"] * 9), reserved)
    summary = check(path, processor=processor, max_length=36)
    budget = summary["budget"]
    # picture, "What?", line break, answer and what ends it
    assert (budget["positions"]["smallest"], budget["positions"]["largest"]) == (4 + 5 + 1 + 2 + 1, 4 + 5 + 1 + 40 + 1)
    assert (budget["answer_tokens"]["count"], budget["answer_tokens"]["largest"]) == (3, 41)
    assert (budget["over_max_length"], budget["image_positions"]) == (2, 4)
    # the second is cut, the third would lose pictures, the fourth holds the placeholder
    found = summary["problems"]["not_encodable"]
    assert [text.split(": ")[0] for text in found["first"]] == [f"{path}:3", f"{path}:4"]
    assert "Tokens of the answers" in as_text(summary)


def test_workers_change_nothing(tmp_path: Path, processor: EttProcessor) -> None:
    path = write(tmp_path, *(line("x" * i, "good.png" if i % 5 else "none.png") for i in range(1, 80)))
    alone = check(path, processor=processor)
    assert check(path, processor=processor, workers=2) == alone
    (found,) = alone["problems"].values()
    assert (found["count"], len(found["first"])) == (15, NAMED)
    assert "and 10 more" in as_text(alone)


def test_shards_and_what_is_wrong_in_them(tmp_path: Path) -> None:
    caption = json.dumps({"id": "7", "style": "flat"}).encode()
    two = {"conversations": [{"from": "human", "value": "<image>or<image>?"}, {"from": "gpt", "value": "Or."}]}
    outside = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]}
    tar(
        tmp_path / "a.tar",
        {
            "good.png": png(),
            "good.txt": "Grün.".encode(),
            "good.json": caption,
            "two.1.png": png(4, 4, 1),
            "two.0.png": png(8, 8, 2),
            "two.json": json.dumps(two).encode(),
            "blank.png": png(),
            "blank.txt": b" \n",
            "latin.png": png(),
            "latin.txt": "Grün".encode("latin-1"),
            "only.png": png(),
            "cut.png": png(64, 64)[:200],
            "cut.txt": b"cut",
            "list.json": b"[]",
            "out.json": json.dumps(outside).encode(),
            "esc\x1b[2J.png": b"",
            "esc\x1b[2J.txt": b"x",
        },
    )
    tar(tmp_path / "b.tar", {"good.png": png(), "good.txt": b"again", "c.json": b"{}"})
    tar(tmp_path / "evil.tar", {"../../evil.png": png()})
    link = tarfile.TarInfo("passwd.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar(tmp_path / "linked.tar", {"a.txt": b"x"}, link)
    (tmp_path / "far").mkdir()
    tar(tmp_path / "far" / "away.tar", {"a.png": png(), "a.txt": b"x"})
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("a", "b", "evil", "linked"):
        (tmp_path / f"{name}.tar").rename(folder / f"{name}.tar")
    (folder / "zz.tar").symlink_to(tmp_path / "far" / "away.tar")
    summary = check(folder)
    named = {
        kind: [text.removeprefix(str(folder) + "/")[:18] for text in problem["first"]]
        for kind, problem in summary["problems"].items()
    }
    assert named == {
        "refused_shard": ["evil.tar: the memb", "linked.tar: passwd", "zz.tar: " + f"{folder}/zz.tar"[:10]],
        "not_utf8": ["a.tar: latin: byte"],
        "not_json": ["a.tar: list: .json"],
        "missing_field": ["a.tar: only: its m", "b.tar: c: its memb"],
        "empty_text": ["a.tar: blank: turn"],
        "missing_picture": ["a.tar: out: the pi"],
        "broken_picture": ["a.tar: cut: pictur", "a.tar: 'esc\\x1b[2J"],
    }
    assert (summary["format"], summary["examples"], summary["usable"]) == ("shards", 11, 3)
    # the ids are "7" and the key, which comes again in another shard without being the same
    assert summary["pictures"] == 6
    assert "\x1b" not in as_text(summary)


TURNS = {"conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a cat"}]}


@pytest.mark.parametrize(
    ("image", "members", "said"),
    [
        ("a.png", (), 'named in its .json: 1 ("a.png"); among its members: 0 (none)'),
        ("a.heic", ("heic",), "members: 0 (none; not read: .heic)"),
        ("a.png", ("image.png",), "members: 0 (none; not read: .image.png)"),
        (["a.png", "b.png"], ("png",), "named in its .json: 2 "),
        (["a.png", "b.png"], ("0.png", "1.heic"), "members: 1 (.0.png; not read: .1.heic)"),
        ("a.png", ("0.png", "1.png"), "named in its .json: 1 "),
        (None, ("image.png",), "look like pictures (.image.png) are not read"),
        (None, ("heic",), "look like pictures (.heic) are not read"),
    ],
)
def test_a_sample_whose_picture_is_not_found_is_no_text(tmp_path: Path, image: Any, members: Any, said: str) -> None:
    fields = TURNS if image is None else {**TURNS, "image": image}
    pictures = {f"a.{name}": png() for name in members}
    path = tar(
        tmp_path / "miss.tar", {"a.json": json.dumps(fields).encode(), **pictures, "b.png": png(), "b.txt": b"x"}
    )
    summary = check(path)
    assert (summary["examples"], summary["usable"]) == (2, 1)
    (message,) = summary["problems"]["missing_picture"]["first"]
    assert message.startswith(f"{path}: a: ")
    assert said in message
    assert "Pictures of a sample are {key}.png" in message
    source = SourceConfig(source="shards", path=str(path)).build()
    with pytest.raises(DataError, match="Pictures of a sample are"):
        source[0]


def test_members_that_are_no_pictures_of_the_sample_are_left_out(tmp_path: Path) -> None:
    embedded = "data:image/png;base64," + base64.b64encode(png(8, 8)).decode()
    fields = {"a": {"image": "cats/1.jpg"}, "b": {}, "c": {"images": ["x.png", embedded]}, "d": {}}
    members = {f"{key}.json": json.dumps({**TURNS, **more}).encode() for key, more in fields.items()}
    pictures = {name: png() for name in ("a.png", "a.mask.png", "b.png", "b.depth.tiff", "c.png")}
    entries = open_entries(tar(tmp_path / "a.tar", members | pictures))
    assert [len(entries.read(index).pictures) for index in range(4)] == [1, 1, 2, 0]
    assert entries.read(2).pictures == [png(), png(8, 8)]


def test_keys_that_are_there_twice_make_no_example(tmp_path: Path) -> None:
    twice = b'{"id": "a", "conversations": [], ' + json.dumps(line()).encode()[1:]
    path = write(tmp_path, line(), twice)
    (message,) = check(path)["problems"]["wrong_field"]["first"]
    assert message == f'{path}:2: the key "conversations" is there twice in one object. Keep one of them.'
    shard = tar(tmp_path / "a.tar", {"a.png": png(), "a.json": twice})
    (message,) = check(shard)["problems"]["wrong_field"]["first"]
    assert message.startswith(f'{shard}: a: the key "conversations" is there twice')


def test_a_shard_with_headers_that_lie_is_a_finding(tmp_path: Path) -> None:
    info = tarfile.TarInfo("b.txt")
    info.pax_headers = {"GNU.sparse.map": "x"}
    tar(tmp_path / "good.tar", {"a.png": png(), "a.txt": b"x"})
    summary = check(tar(tmp_path / "pax.tar", {"a.png": png(), "a.txt": b"x"}, info).parent)
    assert (summary["usable"], summary["problems"]["refused_shard"]["count"]) == (1, 1)


def test_equal_keys_in_two_shards_are_twins(tmp_path: Path) -> None:
    for name in "ab":
        tar(tmp_path / f"{name}.tar", {"0.png": png(), "0.txt": b"x"})
    (found,) = check(tmp_path)["problems"]["duplicate_id"]["first"]
    assert found.startswith(f"{tmp_path}/b.tar: 0: its id is that of {tmp_path}/a.tar: 0")


def test_large_members_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEMBER_BYTES", 1000)
    path = tar(tmp_path / "a.tar", {"0.png": png(), "0.txt": b"x" * 1001, "1.png": png(), "1.txt": b"x" * 1000})
    assert list(check(path)["problems"]) == ["too_long"]


def test_gzipped_shards_are_kept_one_at_a_time(tmp_path: Path) -> None:
    for name in "ab":
        plain = tar(tmp_path / f"{name}.tar", {f"{name}.png": png(), f"{name}.txt": b"x" * 100_000})
        with tarfile.open(plain) as source, tarfile.open(f"{plain}.gz", "w:gz") as target:
            for member in source:
                target.addfile(member, source.extractfile(member))
        plain.unlink()
    opened = open_entries(tmp_path)
    assert [opened.read(i).id for i in (0, 1, 0)] == ["a", "b", "a"]
    assert len(pickle.dumps(opened)) < 3000


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no shards .* and 0 manifests"):
        check(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        check(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is empty"):
        check(write(tmp_path))
    with pytest.raises(DataError, match="image_root is for manifests"):
        check(tar(tmp_path / "a.tar", {"a.txt": b"x"}), image_root=tmp_path)


def test_page_is_self_contained_and_safe(tmp_path: Path) -> None:
    path = write(tmp_path, line(), line(image=f"{HOSTILE.encode('ascii', 'replace').decode()}.png"))
    summary = {**check(path), "path": HOSTILE}
    page = Page(write_data_page(summary, tmp_path / "out").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not page.addresses
    assert "alert(" in page.text
    assert "missing pictures" in page.text
    assert page.tags.count("figure") == 4
    nothing = {**summary, "resolutions": {"count": 0}, "characters": {"count": 0}, "problems": {}}
    assert "Nothing is wrong." in Page(render_data(nothing)).text
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write_data_page(summary, tmp_path / "file")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, line("abc"))
    assert main(["data", "check", str(path), "--model", "reader_64px", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "1 examples, 1 usable" in out
    assert "a picture takes 16 positions" in out
    assert out.strip().endswith("data.html")
    path = write(tmp_path, line("abc"), line(""))
    assert main(["data", "check", str(path), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["problems"]["empty_text"]["count"] == 1
    assert main(["data", "check", str(path), "--max-length", "9"]) == 2
    assert "give --model too" in capsys.readouterr().err
