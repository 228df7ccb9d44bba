"""Malformed input of many classes, made from valid seeds: refused in a sentence, whatever it is, and never taken for good."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ett.data.entries import Entries, Lines, Refused, Samples
from ett.data.manifest import Manifest
from ett.data.shards import ShardIndex
from ett.errors import DataError, ModelError, RecipeError
from ett.experiments.recipe import Recipe, load_recipe
from ett.model.build import check_model
from ett.tokenizers import IBQConfig, IBQTokenizer
from ett.tokenizers.layouts import export_tokenizer, read_tokenizer
from tests.conftest import LANGUAGE_MODELS

Tree = dict[str, Any]


def fuzzed(examples: int) -> Callable[[Any], Any]:
    """`examples` inputs, the same ones every time."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


MANY = fuzzed(400)
RANDOM = st.integers(0, 2**32 - 1).map(random.Random)


def flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def not_utf8(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"]) + data[at:]


# -- recipes -----------------------------------------------------------------------------------------------------------

VALID = {
    "name": "seed",
    "model": {
        "image_size": 32,
        "vision_tokenizer": {"channels": 16, "channel_multipliers": [1, 2], "norm_groups": 8, "codebook_size": 64},
        "projector": {"merge_size": 2},
        "language_model": {"config": dict(LANGUAGE_MODELS["llama"])},
    },
    "data": [{"source": "names", "weight": 0.5}, {"source": "drawn_text", "size": 64}],
    "stages": [
        {"stage": "tokenizer", "steps": 20, "batch_size": 8, "losses": {"entropy_weight": 0.05}},
        {"stage": "semantic", "steps": 20, "batch_size": 8, "optimizer": {"learning_rate": 1e-3, "betas": [0.9, 0.95]}},
    ],
    "seed": 3,
}
STRICT = [
    (),
    ("model",),
    ("model", "vision_tokenizer"),
    ("model", "projector"),
    ("data", 0),
    ("stages", 0),
    ("stages", 0, "losses"),
    ("stages", 1, "optimizer"),
]
"""Mappings whose every key is known; a language model's own configuration is transformers' business."""


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        tree = tree[step]
    return tree


def changed(rng: random.Random, change: Callable[[dict[str, Any], random.Random], None]) -> bytes:
    tree = copy.deepcopy(VALID)
    change(at(tree, rng.choice(STRICT)), rng)
    return yaml.safe_dump(tree, sort_keys=False).encode()


def put(value: Any) -> Callable[[random.Random], bytes]:
    """`value` in place of a number of the recipe."""

    def mutate(rng: random.Random) -> bytes:
        tree = copy.deepcopy(VALID)
        paths = [
            ("stages", 0, "steps"),
            ("stages", 1, "batch_size"),
            ("data", 1, "size"),
            ("data", 0, "weight"),
            ("seed",),
        ]
        path = rng.choice(paths)
        at(tree, path[:-1])[path[-1]] = "PUT"
        return yaml.safe_dump(tree, sort_keys=False).replace("PUT", value).encode()

    return mutate


def line_twice(rng: random.Random) -> bytes:
    lines = yaml.safe_dump(VALID, sort_keys=False).splitlines()
    keys = [i for i, line in enumerate(lines) if line.startswith("  ") and not line.endswith(":") and ": " in line]
    # a list's first line starts an entry, not a key
    twice = rng.choice([i for i in keys if "- " not in lines[i]])
    return "\n".join([*lines[: twice + 1], *lines[twice:]]).encode()


def bomb(rng: random.Random) -> bytes:
    levels = rng.randint(7, 12)
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 8)}]" for k in range(1, levels)]
    return ("\n".join(lines) + "\n").encode() + yaml.safe_dump(VALID).encode()


def retyped(mapping: dict[str, Any], rng: random.Random) -> None:
    key = rng.choice(sorted(mapping))
    wrong: list[Any] = ["text that is no number", [[1]], {"a": 1}, True, [None]]
    if isinstance(mapping[key], str):
        wrong = [[[1]], {"a": 1}, 3, True]
    elif isinstance(mapping[key], list | dict):
        wrong = ["text", 3, True, [[["deep"]]]]
    mapping[key] = rng.choice(wrong)


def dropped(rng: random.Random) -> bytes:
    tree = copy.deepcopy(VALID)
    path = rng.choice([("name",), ("model",), ("stages",), ("data",), ("stages", 0, "steps"), ("data", 1, "source")])
    del at(tree, path[:-1])[path[-1]]
    return yaml.safe_dump(tree).encode()


def misspelt(mapping: dict[str, Any], rng: random.Random) -> None:
    key = rng.choice(sorted(mapping))
    mapping[key + rng.choice("sx_ 1")] = mapping.pop(key)


WRONG_TAGS = ["!!int x", "!!int ''", "!!float y", "!!bool z", "!!timestamp z", "!!binary '*'"]

RECIPES: dict[str, Callable[[random.Random], bytes]] = {
    "an unknown key": lambda rng: changed(rng, lambda mapping, r: mapping.update({f"key{r.random()}": 1})),
    "a misspelt key": lambda rng: changed(rng, misspelt),
    "a key that is no text": lambda rng: changed(rng, lambda mapping, r: mapping.update({r.choice([1, None, 0.5]): 1})),
    "a missing key": dropped,
    "a value of another type": lambda rng: changed(rng, retyped),
    "a negative number": put("-1"),
    "a number that is none": lambda rng: put(rng.choice([".nan", ".inf", "-.inf", "1e999", "1:70x"]))(rng),
    "a number of thousands of digits": lambda rng: put(rng.choice(["9" * 5000, "-0x" + "f" * 5000, "1" * 9000]))(rng),
    "a fraction of a whole": lambda rng: put(rng.choice(["[1.5]", "{1.5: 2}", "1.5.5"]))(rng),
    "an impossible date": put("2001-99-99"),
    "a Python object": lambda rng: put(
        rng.choice(
            ['!!python/object/apply:os.system ["true"]', "!!python/name:os.system", "!!python/tuple [1]", "!x 1"]
        )
    )(rng),
    "a tag that does not fit": lambda rng: put(rng.choice(WRONG_TAGS))(rng),
    "a key that is there twice": line_twice,
    "aliases that multiply": bomb,
    "an alias to itself": put("&a [*a]"),
    "an alias to nothing": put("*b"),
    "nesting without end": lambda rng: b"name: " + rng.choice([b"[", b"{a: "]) * rng.randint(3000, 9000),
    "bytes that are no UTF-8": lambda rng: not_utf8(yaml.safe_dump(VALID).encode(), rng),
    "a control character": lambda rng: put(rng.choice(['"\x07"', "\x00", "\x1b[2J"]))(rng),
    "no mapping at all": lambda rng: rng.choice([b"", b"- a\n- b\n", b"text", b"3", b"null", b"--- a\n--- b\n"]),
    "another file": lambda rng: rng.randbytes(rng.randint(1, 3000)) + b"\xff",
}


def read(path: Path) -> Recipe:
    """A recipe as a run takes it: its tokenizer's configuration is checked where the tokenizer is known."""
    recipe = load_recipe(path)
    check_model(recipe.model)
    return recipe


def refuse_recipe(kind: str, rng: random.Random, folder: Path) -> bytes:
    """Returns what was refused."""
    path = folder / "r.yaml"
    path.write_bytes(RECIPES[kind](rng))
    with pytest.raises(RecipeError) as caught:
        read(path)
    assert 10 < len(str(caught.value)) < 2000, kind
    return path.read_bytes()


def test_the_seed_recipe_is_valid(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(VALID), encoding="utf-8")
    assert read(tmp_path / "r.yaml").seed == 3


@pytest.mark.parametrize("kind", RECIPES)
def test_malformed_recipes_are_refused(kind: str, tmp_path: Path) -> None:
    for seed in range(3):
        refuse_recipe(kind, random.Random(f"{kind} {seed}"), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@MANY
@given(kind=st.sampled_from(sorted(RECIPES)), rng=RANDOM)
def test_many_malformed_recipes_are_refused(kind: str, rng: random.Random, tmp_path: Path) -> None:
    refuse_recipe(kind, rng, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@MANY
@given(rng=RANDOM)
def test_a_recipe_with_a_flipped_or_lost_part_is_read_or_refused(rng: random.Random, tmp_path: Path) -> None:
    text = yaml.safe_dump(VALID, sort_keys=False).encode()
    (tmp_path / "r.yaml").write_bytes(rng.choice([flipped, cut])(text, rng))
    with suppress(RecipeError):
        read(tmp_path / "r.yaml")


# -- manifests ---------------------------------------------------------------------------------------------------------

LLAVA: Tree = {
    "id": "a",
    "image": "p.png",
    "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "one"}],
}
OPENAI: Tree = {
    "id": "b",
    "image": ["p.png"],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "two"},
    ],
}


def line(change: Callable[[Tree, random.Random], None]) -> Callable[[random.Random], bytes]:
    def mutate(rng: random.Random) -> bytes:
        fields = copy.deepcopy(rng.choice([LLAVA, OPENAI]))
        change(fields, rng)
        return json.dumps(fields).encode()

    return mutate


def turns_of(fields: Tree) -> tuple[list[Tree], str, str]:
    """(turns, name of the role, name of the text)."""
    if "conversations" in fields:
        return fields["conversations"], "from", "value"
    return fields["messages"], "role", "content"


def role(value: Any) -> Callable[[Tree, random.Random], None]:
    def change(fields: Tree, rng: random.Random) -> None:
        turns, name, _ = turns_of(fields)
        rng.choice(turns)[name] = value

    return change


def text(value: Any) -> Callable[[Tree, random.Random], None]:
    def change(fields: Tree, rng: random.Random) -> None:
        turns, _, name = turns_of(fields)
        turns[1][name] = value

    return change


def image(*values: Any) -> Callable[[random.Random], bytes]:
    def change(fields: Tree, rng: random.Random) -> None:
        value = rng.choice(values)
        fields["image"] = rng.choice([value, [value]]) if not isinstance(value, list) else value

    return line(change)


def without(fields: Tree, rng: random.Random) -> None:
    turns, who, what = turns_of(fields)
    if rng.random() < 0.3:
        del fields["conversations" if "conversations" in fields else "messages"]
    else:
        del rng.choice(turns)[rng.choice([who, what])]


def both(fields: Tree, rng: random.Random) -> None:
    if rng.random() < 0.5:
        fields["images"] = fields["image"]
    else:
        fields.update(copy.deepcopy(LLAVA), messages=[])


def wrong_turns(fields: Tree, rng: random.Random) -> None:
    name = "conversations" if "conversations" in fields else "messages"
    fields[name] = rng.choice([{}, [], "text", 3, None, [1], [None], [[]], ["turn"]])


MANIFESTS: dict[str, Callable[[random.Random], bytes]] = {
    "a line cut short": lambda rng: json.dumps(LLAVA).encode()[: rng.randint(1, 120)],
    "bytes that are no UTF-8": lambda rng: not_utf8(json.dumps(LLAVA).encode(), rng),
    "no object": lambda rng: rng.choice(
        [b"[]", b"3", b'"text"', b"null", b"true", b"[" + json.dumps(LLAVA).encode() + b"]"]
    ),
    "nesting without end": lambda rng: b'{"id": ' + b"[" * rng.randint(50_000, 100_000),
    "a number of thousands of digits": lambda rng: b'{"id": ' + b"9" * 5000 + b"}",
    "turns that are none": line(wrong_turns),
    "a missing field": line(without),
    "two of one field": line(both),
    "an unknown role": line(lambda fields, rng: role(rng.choice(["GPT", "", None, 3, [], "tool"]))(fields, rng)),
    "a late system turn": line(
        lambda fields, _: turns_of(fields)[0].append({turns_of(fields)[1]: "system", turns_of(fields)[2]: "Be brief."})
    ),
    "an empty text": line(lambda fields, rng: text(rng.choice(["", "  ", "\n\t"]))(fields, rng)),
    "a text that is none": line(
        lambda fields, rng: text(rng.choice([3, None, {}, True, [3], [{"type": "audio"}]]))(fields, rng)
    ),
    "half a character": line(lambda fields, rng: text(rng.choice(["\ud800", "a\udfff", "\udc80b"]))(fields, rng)),
    "more markers than pictures": line(lambda fields, rng: text("<image>" * rng.randint(1, 5))(fields, rng)),
    "more pictures than markers": image(["p.png", "p.png"], ["p.png"] * 5),
    "a path that leads out": image("../q.png", "/etc/passwd", "a/../../q.png", "link.png", "linked/q.png"),
    "a path to nothing": image("gone.png", "p.png/", "p.png/x", "dir", ".", "a" * 5000, "p\u0000.png"),
    "an address": image("https://example.org/p.png", "file:///etc/passwd", "s3://bucket/p.png", "gopher://x"),
    "a picture that is no text": image(3, None, {"path": "p.png"}, [["p.png"]], "", True),
    "broken base64": image(
        "data:image/png;base64,@@@", "data:image/png;base64,", "data:text/html;base64,QQ==", "data:,x"
    ),
    "an id that is none": line(lambda fields, rng: fields.update(id=rng.choice([[], {}, True, 1.5, "", "\ud800"]))),
    "a key twice": lambda rng: (
        rng.choice([b'{"id": 1, "id": 1, ', b'{"note": {"\\u0061": 1, "b": 2, "a": 3}, '])
        + json.dumps(rng.choice([LLAVA, OPENAI])).encode()[1:]
    ),
    "an id twice": lambda rng: b"\n".join([json.dumps(rng.choice([LLAVA, {**OPENAI, "id": "a"}])).encode()] * 2),
    "no line at all": lambda rng: rng.choice([b"", b"\n\n", b"   \n", b"\xef\xbb\xbf"]),
    "another file": lambda rng: rng.randbytes(rng.randint(1, 3000)) + b"\xff",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    folder = root / "in"
    (folder / "dir").mkdir(parents=True)
    PIL.Image.new("RGB", (8, 8)).save(folder / "p.png")
    PIL.Image.new("RGB", (8, 8)).save(root / "q.png")
    (folder / "link.png").symlink_to(root / "q.png")
    (folder / "linked").symlink_to(root)
    return folder


def refused(entries: Entries, index: int) -> bool:
    with suppress(Refused):
        entries.read(index)
        return False
    return True


def refuse_manifest(kind: str, rng: random.Random, folder: Path) -> bytes:
    """Returns what was refused."""
    path = folder / "m.jsonl"
    path.write_bytes(MANIFESTS[kind](rng))
    with pytest.raises(DataError) as caught:
        Manifest(path)
    assert str(caught.value).startswith(str(path)), kind
    assert len(str(caught.value)) < 2000, kind
    if kind not in ("an id twice", "no line at all"):
        lines = Lines(path)
        # drawn one by one, as where bad samples are skipped: none is read otherwise either
        assert any(refused(lines, index) for index in range(len(lines))), kind
    return path.read_bytes()


def test_the_seed_manifest_is_valid(folder: Path) -> None:
    (folder / "m.jsonl").write_text(f"{json.dumps(LLAVA)}\n{json.dumps(OPENAI)}\n", encoding="utf-8")
    assert [example.id for example in Manifest(folder / "m.jsonl")] == ["a", "b"]


@pytest.mark.parametrize("kind", MANIFESTS)
def test_malformed_manifests_are_refused(kind: str, folder: Path) -> None:
    for seed in range(4):
        refuse_manifest(kind, random.Random(f"{kind} {seed}"), folder)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@MANY
@given(kind=st.sampled_from(sorted(MANIFESTS)), rng=RANDOM)
def test_many_malformed_manifests_are_refused(kind: str, rng: random.Random, folder: Path) -> None:
    refuse_manifest(kind, rng, folder)


# -- shards ------------------------------------------------------------------------------------------------------------

PICTURE = io.BytesIO()
PIL.Image.effect_noise((48, 48), 90).save(PICTURE, "PNG")
ANSWER: Tree = {"image": "p.png", "conversations": LLAVA["conversations"]}
MEMBERS: dict[str, bytes] = {
    "a.json": json.dumps(ANSWER).encode(),
    "a.png": PICTURE.getvalue(),
    "b.txt": b"a caption",
    "b.png": PICTURE.getvalue(),
}
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def tar(
    members: dict[str, bytes],
    pax: tuple[str, dict[str, str]] = ("", {}),
    everywhere: dict[str, str] | None = None,
    kind: int = tarfile.PAX_FORMAT,
) -> bytes:
    """A tar of `members`, with pax headers before one of them or for them all."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind, pax_headers=everywhere) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if name == pax[0]:
                info.pax_headers = pax[1]
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def plain(rng: random.Random) -> bytes:
    return tar(MEMBERS, kind=rng.choice(FORMATS))


def pax(headers: Callable[[random.Random], dict[str, str]]) -> Callable[[random.Random], bytes]:
    """The seed with pax headers before one of its pictures."""
    return lambda rng: tar(MEMBERS, pax=(rng.choice(["a.png", "b.png"]), headers(rng)))


def headed(change: Callable[[bytearray, random.Random], None], *names: str, sealed: bool = True) -> Any:
    """The seed with another header before one of its members; its checksum fits if it is `sealed`."""

    def mutate(rng: random.Random) -> bytes:
        data = plain(rng)
        with tarfile.open(fileobj=io.BytesIO(data)) as file:
            at = file.getmember(rng.choice(names or tuple(MEMBERS))).offset
        header = bytearray(data[at : at + 512])
        change(header, rng)
        if sealed:
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        return data[:at] + header + data[at + 512 :]

    return mutate


def other(rng: random.Random, *drop: str, **put: bytes) -> bytes:
    """The seed without some members and with others, given as ``a_png``."""
    kept = {name: content for name, content in MEMBERS.items() if name not in drop}
    return tar(kept | {name.replace("_", "."): content for name, content in put.items()}, kind=rng.choice(FORMATS))


def size_of(rng: random.Random) -> bytes:
    """A size field that ends elsewhere than the member: in its own content, behind the file, or nowhere."""
    inside = b"%011o\0" % rng.randrange(len(PICTURE.getvalue()) - 512)
    behind = b"%011o\0" % rng.randrange(10**6, 8**11)
    return rng.choice([inside, behind, b"\x80" + rng.randbytes(11), b"\xff" * 11 + rng.randbytes(1)])


def sparse(rng: random.Random) -> dict[str, str]:
    length = str(rng.randrange(1, 1000))
    old = {"GNU.sparse.size": length, "GNU.sparse.numblocks": "0"}
    map_of = {"GNU.sparse.map": f"0,{length}", "GNU.sparse.size": length}
    new = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": length}
    return rng.choice([old, map_of, new, {"GNU.sparse.name": f"c{length}.png"}, {"GNU.sparse.realsize": length}])


def raw_pax(rng: random.Random) -> bytes:
    """Records that are no records, in front of the seed."""
    body = rng.choice(
        [
            b"9" * rng.randint(4400, 5000) + b" a=b\n",
            b"19 hdrcharset=\xff%d\n" % rng.randint(100, 999),
            b"0 a=%d\n" % rng.randint(0, 99),
            b"22 GNU.sparse.map=%d,\n" % rng.randint(10, 99),
        ]
    )
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(body)
    return header.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512) + plain(rng)


def endless(rng: random.Random) -> bytes:
    info = tarfile.TarInfo("x")
    info.type = rng.choice([tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
    return info.tobuf(tarfile.USTAR_FORMAT) * rng.randint(2000, 3000) + plain(rng)


def kind_of(*kinds: bytes) -> Callable[[bytearray, random.Random], None]:
    def change(header: bytearray, rng: random.Random) -> None:
        header[156:157] = rng.choice(kinds)

    return change


def resized(header: bytearray, rng: random.Random) -> None:
    header[124:136] = size_of(rng)


def renamed(header: bytearray, rng: random.Random) -> None:
    name = rng.choice([b"../c%d.png", b"/c%d.png", b"a/../../c%d.png", b"a\\c%d.png"]) % rng.randrange(100)
    header[:100] = name.ljust(100, b"\0")


def bent(header: bytearray, rng: random.Random) -> None:
    at = rng.randrange(100)
    header[at] ^= 1 << rng.randrange(8)


def described(change: Callable[[Tree, random.Random], Any]) -> Callable[[random.Random], bytes]:
    """The seed with another a.json."""

    def mutate(rng: random.Random) -> bytes:
        fields = copy.deepcopy(ANSWER)
        change(fields, rng)
        return other(rng, a_json=json.dumps(fields).encode())

    return mutate


SHARDS: dict[str, Callable[[random.Random], bytes]] = {
    "a sparse map that is none": pax(
        lambda rng: {"GNU.sparse.map": rng.choice(["x", "", "1,y", "1,,2", "9" * 5000]) + "z" * rng.randrange(9)}
    ),
    "a sparse size that is none": pax(
        lambda rng: {rng.choice(["GNU.sparse.size", "GNU.sparse.realsize"]): rng.choice(["x", "1e9", "-", "1.5"])}
    ),
    "a sparse file in a pax header": pax(sparse),
    "a sparse file in GNU's own header": headed(kind_of(tarfile.GNUTYPE_SPARSE)),
    "pax records that are none": raw_pax,
    "headers of headers without end": endless,
    "a pax size that lies": pax(
        lambda rng: {"size": rng.choice(["-5", "zz", "1e999", "nan", f"{rng.randint(10**6, 10**30)}"])}
    ),
    "one size for all": lambda rng: tar(MEMBERS, everywhere={"size": str(rng.randrange(512))}),
    "a pax name that leads out": pax(lambda rng: {"path": rng.choice(["../c.png", "/c.png", "a/../../c.png"])}),
    "a size that lies": headed(resized, "a.png", "b.png"),
    "a name that leads out": headed(renamed),
    "a link or device": headed(kind_of(b"1", b"2", b"3", b"4", b"6", b"Z")),
    "a checksum that does not fit": headed(bent, sealed=False),
    "a tar cut short": lambda rng: (lambda data: data[: rng.randrange(len(data.rstrip(b"\0")))])(plain(rng)),
    "a gzip cut short": lambda rng: cut(gzip.compress(plain(rng), mtime=0), rng) or b"\x1f\x8b",
    "a member twice": lambda rng: other(rng, a_PNG=rng.randbytes(9)),
    "a picture that is missing": lambda rng: other(rng, "a.png", c_txt=rng.randbytes(2).hex().encode()),
    "a picture of another name": lambda rng: other(
        rng, "a.png", **{f"a_{rng.choice(['heic', 'image_png', 'x_jpg', 'svg', 'img0_png'])}": PICTURE.getvalue()}
    ),
    "more or fewer pictures than named": described(
        lambda fields, rng: fields.update(image=["p.png"] * rng.randint(2, 9) + [f"{rng.random()}.png"])
    ),
    "no text": lambda rng: other(rng, "a.json", c_png=rng.randbytes(9)),
    "a key twice in the JSON": lambda rng: other(
        rng, a_json=b'{"x": %d, "x": 1, ' % rng.randrange(99) + MEMBERS["a.json"][1:]
    ),
    "JSON cut short": lambda rng: other(rng, a_json=MEMBERS["a.json"][: rng.randrange(len(MEMBERS["a.json"]))]),
    "bytes that are no UTF-8": lambda rng: other(
        rng, **{rng.choice(["a_json", "b_txt"]): not_utf8(MEMBERS[rng.choice(["a.json", "b.txt"])], rng)}
    ),
    "an empty text": described(lambda fields, rng: text(rng.choice(["", "  ", "\n\t"]))(fields, rng)),
    "turns that are none": described(wrong_turns),
    "no samples": lambda rng: tar({f"README{rng.randrange(99)}": b"x"}) if rng.random() < 0.5 else bytes(1024),
    "another file": lambda rng: b"\xff" + rng.randbytes(rng.randint(1, 3000)),
}


def refuse_shard(kind: str, rng: random.Random, folder: Path) -> bytes:
    """Returns what was refused."""
    path = folder / "s.tar"
    path.write_bytes(SHARDS[kind](rng))
    samples = Samples([path])
    if not samples.refused:
        assert any(refused(samples, index) for index in range(len(samples))), kind
        return path.read_bytes()
    with pytest.raises(DataError) as caught:
        ShardIndex([path])
    assert str(path) in str(caught.value), kind
    assert len(str(caught.value)) < 2000, kind
    return path.read_bytes()


def test_the_seed_shards_are_valid(folder: Path) -> None:
    for content in [tar(MEMBERS, kind=kind) for kind in FORMATS]:
        (folder / "s.tar").write_bytes(content)
        samples = Samples([folder / "s.tar"])
        assert [samples.read(index).pictures for index in range(2)] == [[PICTURE.getvalue()]] * 2


@pytest.mark.parametrize("kind", SHARDS)
def test_malformed_shards_are_refused(kind: str, folder: Path) -> None:
    for seed in range(4):
        refuse_shard(kind, random.Random(f"{kind} {seed}"), folder)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@MANY
@given(kind=st.sampled_from(sorted(SHARDS)), rng=RANDOM)
def test_many_malformed_shards_are_refused(kind: str, rng: random.Random, folder: Path) -> None:
    refuse_shard(kind, rng, folder)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@MANY
@given(rng=RANDOM)
def test_a_shard_with_a_changed_header_is_read_or_refused(rng: random.Random, folder: Path) -> None:
    def change(header: bytearray, rng: random.Random) -> None:
        for _ in range(rng.randint(1, 3)):
            header[rng.randrange(512)] = rng.choice([rng.randrange(256), 0, 255, 128, 0x30 + rng.randrange(10)])

    (folder / "s.tar").write_bytes(headed(change)(rng))
    samples = Samples([folder / "s.tar"])
    assert len(samples) or samples.refused
    for index in range(len(samples)):
        refused(samples, index)


# -- checkpoints -------------------------------------------------------------------------------------------------------

TINY = IBQConfig(
    channels=4,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    z_channels=8,
    norm_groups=4,
    codebook_size=20,
    codebook_dim=8,
)
NAME = "quantize.embedding.weight"


class Checkpoints:
    """A small tokenizer, exported in two layouts, and malformed copies of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        torch.manual_seed(0)
        tokenizer = IBQTokenizer(TINY)
        export_tokenizer(tokenizer, root / "emu", "emu3.5")
        export_tokenizer(tokenizer, root / "voken.ckpt", "seed-voken")
        self.config = json.loads((root / "emu" / "config.json").read_text(encoding="utf-8"))
        self.safetensors = (root / "emu" / "model.safetensors").read_bytes()
        self.archive = (root / "voken.ckpt").read_bytes()
        self.content = torch.load(root / "voken.ckpt", weights_only=True)

    def folder(self, weights: bytes | None, config: bytes | None = None) -> Path:
        path = self.root / "bad"
        path.mkdir(exist_ok=True)
        for name, content in (
            ("model.safetensors", weights),
            ("config.json", config or json.dumps(self.config).encode()),
        ):
            (path / name).unlink(missing_ok=True)
            if content is not None:
                (path / name).write_bytes(content)
        return path

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        from safetensors.torch import load

        tensors = load(self.safetensors)
        change(tensors)
        path = self.folder(None)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
        return path

    def header(self, change: Callable[[dict[str, Any]], Any]) -> Path:
        (length,) = struct.unpack("<Q", self.safetensors[:8])
        header = json.loads(self.safetensors[8 : 8 + length])
        change(header)
        written = json.dumps(header).encode()
        return self.folder(struct.pack("<Q", len(written)) + written + self.safetensors[8 + length :])

    def configured(self, name: str, value: Any) -> Path:
        return self.folder(self.safetensors, json.dumps({**self.config, name: value}).encode())

    def file(self, content: bytes) -> Path:
        path = self.root / "bad.ckpt"
        path.write_bytes(content)
        return path

    def saved(self, content: Any) -> Path:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return self.file(buffer.getvalue())


class Runs:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("ran",)


def some(tensors: dict[str, torch.Tensor], rng: random.Random) -> str:
    return rng.choice(sorted(tensors))


def replaced(
    make: Callable[[torch.Tensor, random.Random], torch.Tensor],
) -> Callable[[Checkpoints, random.Random], Path]:
    def mutate(seeds: Checkpoints, rng: random.Random) -> Path:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            name = some(tensors, rng)
            tensors[name] = make(tensors[name], rng)

        return seeds.tensors(change)

    return mutate


def offsets(seeds: Checkpoints, rng: random.Random) -> Path:
    def change(header: dict[str, Any]) -> None:
        name = rng.choice([each for each in header if each != "__metadata__"])
        header[name]["data_offsets"][rng.randrange(2)] += rng.choice([-4, 4, 10**12, -(10**6)])

    return seeds.header(change)


def lying_shape(seeds: Checkpoints, rng: random.Random) -> Path:
    def change(header: dict[str, Any]) -> None:
        name = rng.choice([each for each in header if each != "__metadata__"])
        header[name]["shape"] = rng.choice([[10**9, 10**9], [-1], [0], ["8"], None, [1.5], [2**63, 2]])

    return seeds.header(change)


SIZES = ("ch", "ch_mult", "num_res_blocks", "z_channels", "embed_dim", "codebook_size")

CHECKPOINTS: dict[str, Callable[[Checkpoints, random.Random], Path]] = {
    "safetensors cut short": lambda seeds, rng: seeds.folder(cut(seeds.safetensors, rng)),
    "a header longer than the file": lambda seeds, rng: seeds.folder(
        struct.pack("<Q", rng.choice([2**63, 2**40, 10**7, 2**64 - 1])) + seeds.safetensors[8:]
    ),
    "a header that is no JSON": lambda seeds, rng: seeds.folder(seeds.safetensors[:8] + b"[" + seeds.safetensors[9:]),
    "offsets that lie": offsets,
    "a shape that lies": lying_shape,
    "an unknown type": lambda seeds, rng: seeds.header(
        lambda header: header[NAME].update(dtype=rng.choice(["F33", "", None, 3, "f32"]))
    ),
    "a missing tensor": lambda seeds, rng: seeds.tensors(lambda tensors: tensors.pop(some(tensors, rng))),
    "a tensor too many": lambda seeds, rng: seeds.tensors(
        lambda tensors: tensors.update({f"encoder.extra{rng.random()}": torch.zeros(2)})
    ),
    "a tensor under another name": lambda seeds, rng: seeds.tensors(
        lambda tensors: tensors.update({some(tensors, rng) + "s": tensors.pop(some(tensors, rng))})
    ),
    "another shape": replaced(lambda tensor, rng: torch.zeros([*tensor.shape, rng.randint(2, 4)])),
    "not a number": replaced(
        lambda tensor, rng: torch.full_like(tensor, rng.choice([float("nan"), float("inf"), -float("inf")]))
    ),
    "another type": replaced(lambda tensor, rng: tensor.to(rng.choice([torch.int32, torch.float64, torch.bool]))),
    "no weights": lambda seeds, rng: seeds.folder(None),
    "a configuration cut short": lambda seeds, rng: seeds.folder(
        seeds.safetensors, json.dumps(seeds.config).encode()[: rng.randint(1, 60)]
    ),
    "a configuration of another type": lambda seeds, rng: seeds.folder(
        seeds.safetensors, rng.choice([b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000])
    ),
    "a size that is none": lambda seeds, rng: seeds.configured(
        rng.choice(SIZES), rng.choice(["8", [], {}, 1.5, True, [None], float("nan")])
    ),
    "an impossible size": lambda seeds, rng: seeds.configured(
        rng.choice(SIZES), rng.choice([0, -1, 10**9, 10**30, [0]])
    ),
    "another model": lambda seeds, rng: seeds.configured("model_type", rng.choice(["bert", 3, None, "", []])),
    "an archive cut short": lambda seeds, rng: seeds.file(cut(seeds.archive, rng)),
    "a pickle that runs code": lambda seeds, rng: seeds.saved(
        {"state_dict": {**seeds.content["state_dict"], "encoder.x": Runs()}}
    ),
    "a bare pickle": lambda seeds, rng: seeds.file(pickle.dumps(Runs(), protocol=rng.randint(0, 5))),
    "no mapping": lambda seeds, rng: seeds.saved(rng.choice([[], 3, "text", torch.zeros(2), None, {1: 2}])),
    "a state that is none": lambda seeds, rng: seeds.saved(
        {"state_dict": rng.choice([[], 3, {}, {1: torch.zeros(1)}, {"a": 3}, None])}
    ),
    "another file": lambda seeds, rng: seeds.file(rng.randbytes(rng.randint(0, 3000))),
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


def refuse_checkpoint(kind: str, rng: random.Random, seeds: Checkpoints) -> bytes:
    """Returns what was refused."""
    path = CHECKPOINTS[kind](seeds, rng)
    with pytest.raises(ModelError) as caught:
        read_tokenizer(path)
    assert 10 < len(str(caught.value)) < 3000, kind
    assert not Path("ran").exists(), "code of the file was run"
    return b"".join(each.read_bytes() for each in (sorted(path.iterdir()) if path.is_dir() else [path]))


def test_the_seed_checkpoints_are_valid(seeds: Checkpoints) -> None:
    for path in (
        seeds.root / "emu",
        seeds.root / "voken.ckpt",
        seeds.tensors(lambda _: None),
        seeds.header(lambda _: None),
    ):
        tokenizer = read_tokenizer(path)[0]
        assert tokenizer.codebook_size == 20


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_malformed_checkpoints_are_refused(kind: str, seeds: Checkpoints) -> None:
    for seed in range(3):
        refuse_checkpoint(kind, random.Random(f"{kind} {seed}"), seeds)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@MANY
@given(kind=st.sampled_from(sorted(CHECKPOINTS)), rng=RANDOM)
def test_many_malformed_checkpoints_are_refused(kind: str, rng: random.Random, seeds: Checkpoints) -> None:
    refuse_checkpoint(kind, rng, seeds)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@MANY
@given(rng=RANDOM)
def test_a_flipped_bit_in_an_archive_is_found(rng: random.Random, seeds: Checkpoints) -> None:
    """Every bit of a member is under its checksum; what lies between members may change without a meaning."""
    path = seeds.file(flipped(seeds.archive, rng))
    try:
        found = read_tokenizer(path)[0].state_dict()
    except ModelError:
        return
    wanted = read_tokenizer(seeds.root / "voken.ckpt")[0].state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


# -- all of them -------------------------------------------------------------------------------------------------------


def test_there_are_enough_of_them() -> None:
    """Of every kind in every run of the tests."""
    assert min(map(len, (RECIPES, MANIFESTS, SHARDS, CHECKPOINTS))) >= 15
    assert 3 * len(RECIPES) + 4 * len(MANIFESTS) + 4 * len(SHARDS) + 3 * len(CHECKPOINTS) >= 300


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_there_are_five_hundred_of_them(folder: Path, seeds: Checkpoints) -> None:
    """Different ones, each of them refused, of at least 15 kinds of each sort of input."""
    sorts: list[tuple[dict[str, Any], Callable[[str, random.Random, Any], bytes], Any]] = [
        (RECIPES, refuse_recipe, folder),
        (MANIFESTS, refuse_manifest, folder),
        (SHARDS, refuse_shard, folder),
        (CHECKPOINTS, refuse_checkpoint, seeds),
    ]
    for kinds, refuse, place in sorts:
        draws = [(kind, random.Random(f"{kind} {seed}")) for kind in kinds for seed in range(100, 112)]
        different = {refuse(kind, rng, place) for kind, rng in draws}
        assert len(kinds) >= 15
        assert len(different) >= 125
