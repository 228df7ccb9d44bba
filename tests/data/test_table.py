"""Tables: rows by position, refused by row; a run on them resumes to the same bits."""

from __future__ import annotations

import io
import json
import os
import pickle
from importlib import import_module
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from ett.config import from_mapping
from ett.data.mixture import Mixture, SourceConfig, encode_draw
from ett.data.table import ColumnsConfig, TableSource
from ett.errors import DataError, RecipeError
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run
from ett.model import EttImageProcessor, EttProcessor
from ett.model.text import CHAT_TEMPLATES, byte_tokenizer
from tests.conftest import killed_at

pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")
arrow = pytest.importorskip("pyarrow")
fsspec = pytest.importorskip("fsspec")


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (24, 40), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    schema = arrow.schema([("image", image), ("caption", arrow.string()), ("key", arrow.string())])
    parquet.write_table(arrow.Table.from_pylist(rows, schema), path)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two files: pictures as bytes and as `Image` writes them, with one of them as a path, a damaged one, an empty caption."""
    rows = [{"image": {"bytes": picture(k), "path": None}, "caption": f"red {k}", "key": f"k{k}"} for k in range(4)]
    write(tmp_path / "a.parquet", rows)
    (tmp_path / "secret.png").write_bytes(picture(9))
    bad = [
        {"image": {"bytes": None, "path": str(tmp_path / "secret.png")}, "caption": "stolen", "key": "k4"},
        {"image": {"bytes": picture(5)[:60], "path": None}, "caption": "cut", "key": "k5"},
        {"image": {"bytes": picture(6), "path": None}, "caption": " ", "key": "k6"},
    ]
    write(tmp_path / "b.parquet", bad)
    return tmp_path


COLUMNS = ColumnsConfig(answer="caption", id="key")


def test_rows_are_examples_in_order(table: Path) -> None:
    source = TableSource(str(table / "a.parquet"), columns=COLUMNS)
    again = pickle.loads(pickle.dumps(source))
    for each in (source, again):
        assert [example.id for example in each] == ["k0", "k1", "k2", "k3"]
    assert source[2].images[0].getpixel((0, 0)) == (2, 0, 0)
    assert [part["type"] for part in source[2].messages[0]["content"]] == ["image"]
    assert source[2].messages[1]["content"] == [{"type": "text", "text": "red 2"}]
    assert source.name == "a"
    assert source.fingerprint() == TableSource(str(table / "a.parquet"), columns=COLUMNS).fingerprint()
    with pytest.raises(IndexError):
        source[4]


def test_json_lines_without_pictures(tmp_path: Path) -> None:
    lines = [json.dumps({"q": f"{k} + 1?", "a": str(k + 1)}) for k in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    columns = ColumnsConfig(image=None, question="q", answer="a")
    source = TableSource(str(tmp_path / "t.jsonl"), columns=columns)
    assert [example.messages[1]["content"][0]["text"] for example in source] == ["1", "2", "3"]
    assert source[1].id == "1"


def test_what_cannot_be_used_is_named(table: Path) -> None:
    source = TableSource(str(table / "*.parquet"), columns=COLUMNS)
    for row, reason in ((4, "paths in them are not followed"), (5, "damaged"), (6, "'caption' is empty")):
        with pytest.raises(DataError, match=rf"row {row}: .*{reason}"):
            source[row]
    with pytest.raises(DataError, match=r"Unknown column 'captions'\. Did you mean 'caption'"):
        TableSource(str(table / "a.parquet"), columns=ColumnsConfig(answer="captions"))
    with pytest.raises(DataError, match="does not exist"):
        TableSource(str(table / "c.parquet"))
    (table / "d.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match="cannot be read"):
        TableSource(str(table / "d.parquet"))
    with pytest.raises(RecipeError, match="A table source needs a path"):
        SourceConfig(source="table")


def test_a_text_that_is_not_utf8_is_a_bad_row_and_no_end(tmp_path: Path) -> None:
    rows = [b'{"q": "a", "a": "b"}'] * 3
    (tmp_path / "t.jsonl").write_bytes(b"\n".join([rows[0], b'{"q": "a", "a": "\xff\xfe"}', *rows]))
    source = TableSource(str(tmp_path / "t.jsonl"), columns=ColumnsConfig(image=None, question="q", answer="a"))
    with pytest.raises(DataError, match=r"t\.jsonl, row 1: one of its texts is not UTF-8 \(byte 1, 0xff\)"):
        source[1]
    processor = EttProcessor(EttImageProcessor(8, 8), byte_tokenizer(), 4, CHAT_TEMPLATES["plain"])
    mixture = Mixture([source], [1.0], 0, tolerant=True)
    skipped = [encode_draw(mixture, draw, processor, None).skipped for draw in range(5)]
    assert [each.position for drawn in skipped for each in drawn].count(1) >= 1
    assert {each.position for drawn in skipped for each in drawn} == {1}


def test_an_address_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"class": "package_that_is_absent.FileSystem", "err": "Please install package_that_is_absent"}
    monkeypatch.setitem(import_module("fsspec.registry").known_implementations, "absent", absent)
    with pytest.raises(DataError, match=r"absent://b/t\.jsonl needs a package .*install package_that_is_absent.*s3fs"):
        TableSource("absent://b/t.jsonl")
    with pytest.raises(DataError, match=r"foo://b/t\.jsonl cannot be read .*Protocol not known"):
        TableSource("foo://b/t.jsonl")


def test_an_address_of_any_kind_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    columns = ColumnsConfig(image=None, question="q", answer="a")
    content = b'{"q": "a", "a": "b"}\n' * 3
    fsspec.filesystem("memory").pipe("/tables/t.jsonl", content)
    (tmp_path / "t.jsonl").write_bytes(content)
    try:
        assert len(TableSource("memory://tables/t.jsonl", columns=columns)) == 3
    finally:
        fsspec.filesystem("memory").rm("/tables/t.jsonl")
    assert len(TableSource((tmp_path / "t.jsonl").as_uri(), columns=columns)) == 3


@pytest.mark.timeout(60)
def test_a_pipe_is_no_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.jsonl")
    with pytest.raises(DataError, match=r"t\.jsonl cannot be read"):
        TableSource(str(tmp_path / "t.jsonl"))


def test_a_run_on_a_table_skips_resumes_and_notices_changes(
    table: Path, toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    columns = {"answer": "caption", "id": "key"}
    toy_recipe["data"] = [{"source": "table", "path": str(table / "*.parquet"), "columns": columns}]
    toy_recipe["stages"] = [{**toy_recipe["stages"][1], "steps": 5}]
    toy_recipe["max_bad_samples"] = 3
    recipe = from_mapping(Recipe, toy_recipe)
    Run(recipe, tmp_path / "whole").train()
    with killed_at(4):
        Run(recipe, tmp_path / "killed").train()
    Run(recipe, tmp_path / "killed", resume=True).train()
    whole, killed = (
        (tmp_path / name / "stages" / "0-align" / "model.safetensors").read_bytes() for name in ("whole", "killed")
    )
    assert whole == killed
    write(table / "a.parquet", [{"image": {"bytes": picture(1), "path": None}, "caption": "new", "key": "k"}])
    with pytest.raises(RecipeError, match="has changed"):
        Run(recipe, tmp_path / "killed", resume=True)
