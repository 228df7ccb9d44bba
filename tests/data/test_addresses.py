"""Data at addresses: read as those on this machine are, by ranges; changes and silence are told, never passed over."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ett.config import from_mapping
from ett.data import entries as entries_module
from ett.data import far as far_module
from ett.data import once as once_module
from ett.data import places as places_module
from ett.data.check import check
from ett.data.convert import convert
from ett.data.far import BLOCK, BrokenSource, Far, Look
from ett.data.manifest import Manifest
from ett.data.mixture import SourceConfig, build_mixture
from ett.data.once import content_hash
from ett.data.places import named, place, shard_paths, stamp
from ett.errors import DataError, RecipeError
from ett.experiments.folder import RunFolder
from ett.experiments.recipe import Recipe
from ett.experiments.run import Run
from tests.conftest import CommandLine, killed_at
from tests.data.addresses import encoded, manifest, picture, shards, tar

Store = Callable[[str, bytes], None]


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_module, "PAUSES", (0.0, 0.0))
    entries_module._scanned_before.cache_clear()
    once_module.forget()


@pytest.fixture
def store() -> Iterator[Store]:
    """Puts a file at ``memory://``."""
    system = fsspec.filesystem("memory")
    yield lambda path, content: system.pipe(f"/{path}", content)
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("path", ["memory://far", "memory://far/*.tar", "memory://far/{000..002}.tar"])
def test_shards_at_an_address_are_those_here(path: str, store: Store, tmp_path: Path) -> None:
    for k in range(3):
        store(f"far/{k:03}.tar", tar(4 * k, 4 * k + 4))
        (tmp_path / f"{k:03}.tar").write_bytes(tar(4 * k, 4 * k + 4))
    store("far/README.md", b"about")
    here, far = (shards(each).build() for each in (str(tmp_path), path))
    assert len(here) == len(far) == 12
    for ours, theirs in zip(here, far, strict=True):
        assert ours.messages == theirs.messages
        assert [each.tobytes() for each in ours.images] == [each.tobytes() for each in theirs.images]
    assert shards(str(tmp_path / "{000..002}.tar")).build()[11].id == far[11].id


def test_braces_stand_for_numbers(tmp_path: Path) -> None:
    assert list(map(str, named("s3://b/{08..10}/t-{0..1}.tar"))) == [
        f"s3://b/{k}/t-{i}.tar" for k in ("08", "09", "10") for i in (0, 1)
    ]
    for k in range(3):
        (tmp_path / f"t{k}.tar").write_bytes(tar(k, k + 1))
    for pattern in ("t{0..2}.tar", "t*.tar"):
        assert check(str(tmp_path / pattern))["usable"] == 3
    # an existing file of that name is that file
    (tmp_path / "{0..1}.tar").write_bytes(tar(0, 1))
    assert shard_paths(str(tmp_path / "{0..1}.tar"))[0] == [tmp_path / "{0..1}.tar"]
    for wrong in ("memory://{5..2}.tar", "memory://{0..99999999}.tar", "x/{0..9999}{0..9999}.tar"):
        with pytest.raises(DataError, match="braces may name 1 to 1000000"):
            shard_paths(wrong)
    with pytest.raises(DataError, match=r"Cannot read the shard .*/7\.tar"):
        shards(str(tmp_path / "{7..8}.tar")).build()


@pytest.mark.parametrize("tolerant", [False, True])
def test_what_is_not_there_at_the_start_ends_every_process(tolerant: bool, store: Store) -> None:
    store("far/0.tar", tar(0, 2))
    store("all/0.tar", tar(0, 2))
    store("all/1.tar", tar(0, 2)[:3000])
    # one process of a launch that left it out would see other examples than the rest
    with pytest.raises(DataError, match=r"memory://far/1\.tar does not exist"):
        shards("memory://far/{0..1}.tar").build(tolerant=tolerant)
    # what is damaged is so for all
    if tolerant:
        source = shards("memory://all").build(tolerant=True)
        assert len(source) == 2
        assert len(source.left_out) == 1


@pytest.mark.parametrize("kind", ["shards", "manifest"])
@pytest.mark.parametrize("here", [False, True])
def test_what_was_there_is_no_bad_sample(
    kind: str, here: bool, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, content = {"shards": ("0.tar", tar(0, 4)), "manifest": ("m.jsonl", manifest(["0.png"]))}[kind]
    for each, what in ((name, content), ("0.png", picture(0))):
        store(f"far/{each}", what)
        (tmp_path / each).write_bytes(what)
    path = str(tmp_path / name) if here else f"memory://far/{name}"
    mixture = build_mixture([SourceConfig(source=kind, path=path)], 0, tolerant=True)
    encoded(mixture, 1)
    (tmp_path / name).unlink()
    fsspec.filesystem("memory").rm(f"/far/{name}")
    for again in (300.0, 0.0):
        monkeypatch.setattr(places_module, "LOOK_AGAIN", again)
        with pytest.raises(BrokenSource, match=rf"{name} was there and is out of reach now"):
            encoded(mixture, 1)


def test_a_manifest_cut_short_in_use_is_no_bad_sample(store: Store) -> None:
    store("far/m.jsonl", manifest(["0.png", "0.png"]))
    store("far/0.png", picture(0))
    mixture = build_mixture([SourceConfig(source="manifest", path="memory://far/m.jsonl")], 0, tolerant=True)
    store("far/m.jsonl", manifest(["0.png"])[:-5])
    with pytest.raises(BrokenSource, match="was changed while in use"):
        encoded(mixture, 2)


def test_a_long_line_is_one_request_and_a_manifest_is_read_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = manifest(["0.png", "0.png", "0.png"]).splitlines()
    lines[1] = lines[1][:-1] + b', "note": "' + 1_000_000 * b"n" + b'"}'
    content = b"\n".join(lines)
    store("far/m.jsonl", content)
    store("far/0.png", picture(0))
    asked: list[tuple[int, int]] = []
    plain = Far.read

    def read(self: Far, start: int, stop: int) -> bytes:
        if stop > start and self.name == "m.jsonl":
            asked.append((start, stop))
        return plain(self, start, stop)

    monkeypatch.setattr(Far, "read", read)
    sources = [SourceConfig(source="manifest", path="memory://far/m.jsonl").build(tolerant=True) for _ in range(3)]
    assert sum(stop - start for start, stop in asked) == len(content)
    expected = hashlib.sha256(content).hexdigest()
    assert content_hash(place("memory://far/m.jsonl")) == expected
    assert sum(stop - start for start, stop in asked) == len(content)
    for index in range(3):
        asked.clear()
        assert sources[2][index].id == f"p{index}"
        assert len(asked) == 1
    once_module.forget()
    assert content_hash(place("memory://far/m.jsonl")) == expected
    (tmp_path / "m.jsonl").write_bytes(content)
    assert content_hash(tmp_path / "m.jsonl") == expected
    store("far/empty.jsonl", b"")
    assert content_hash(place("memory://far/empty.jsonl")) == hashlib.sha256().hexdigest()


def test_only_ranges_are_fetched_and_the_headers_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tar(0, 30, padding=100_000)
    assert len(content) > 5 * BLOCK
    store("far/0.tar", content)
    fetched: list[int] = []
    plain = Far.read

    def read(self: Far, start: int, stop: int) -> bytes:
        fetched.append(stop - start)
        return plain(self, start, stop)

    monkeypatch.setattr(Far, "read", read)
    source = shards("memory://far/0.tar").build()
    assert max(fetched) <= BLOCK
    assert sum(fetched) < 1.2 * len(content)
    fetched.clear()
    assert source[7].id.endswith("007")
    header = 512
    assert sorted(fetched) == [len(picture(7)) + header, len(b"number 7") + 100_000 + header]
    fetched.clear()
    shards("memory://far/0.tar").build(tolerant=True)
    assert fetched == []


def test_a_gzipped_shard_at_an_address(store: Store) -> None:
    store("far/0.tar.gz", gzip.compress(tar(0, 3)))
    source = pickle.loads(pickle.dumps(shards("memory://far").build()))
    # what is kept of it between two openings does not hold the content
    assert (
        entries_module._scanned_before(Far("memory://far/0.tar.gz"), stamp(Far("memory://far/0.tar.gz")))._unpacked
        == {}
    )
    assert [example.images[0].getpixel((0, 0))[0] for example in source] == [0, 1, 2]
    store("far/0.tar.gz", gzip.compress(tar(0, 300))[:-20])
    with pytest.raises(DataError, match="truncated or damaged"):
        shards("memory://far").build()


def test_what_is_unsafe_in_a_far_shard_is_refused(store: Store) -> None:
    for name, kind in (("../out.png", tarfile.REGTYPE), ("link.png", tarfile.SYMTYPE)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as file:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
        store("far/0.tar", buffer.getvalue())
        with pytest.raises(DataError, match=r"unsafe|link or device"):
            shards("memory://far").build()
    store("far/0.tar", tar(0, 4)[:3000])
    with pytest.raises(DataError, match="truncated or damaged"):
        shards("memory://far").build()


def test_a_manifest_at_an_address_has_its_pictures_beside_it(store: Store, tmp_path: Path, run: CommandLine) -> None:
    store("far/m.jsonl", manifest(["a/0.png", "./1 1.png", "gone.png"]))
    store("far/a/0.png", picture(0))
    store("far/1 1.png", picture(1))
    source = Manifest("memory://far/m.jsonl")
    assert source.name == "m"
    assert [source[k].images[0].getpixel((0, 0))[0] for k in range(2)] == [0, 1]
    with pytest.raises(DataError, match=r"m\.jsonl:3: memory://far/gone\.png does not exist"):
        source[2]
    summary = check("memory://far/m.jsonl")
    assert (summary["examples"], summary["usable"]) == (3, 2)
    code, out, _ = run("data", "check", "memory://far/m.jsonl")
    assert code == 2
    assert "gone.png" in out
    before = source.fingerprint()
    store("far/a/0.png", picture(3))
    assert Manifest("memory://far/m.jsonl").fingerprint() != before
    store("far/whole.jsonl", manifest(["a/0.png"]))
    assert convert("memory://far/whole.jsonl", tmp_path / "tars") == 1
    assert shards(str(tmp_path / "tars")).build()[0].images[0].getpixel((0, 0)) == (3, 0, 0)


@pytest.mark.parametrize(
    "image", ["../out.png", "a/../../out.png", "/out.png", "..\\out.png", "b::memory://out.png", "memory://out.png"]
)
def test_no_picture_lies_outside_of_a_far_manifests_folder(image: str, store: Store) -> None:
    store("far/m.jsonl", manifest([image]))
    store("out.png", picture(0))
    with pytest.raises(DataError, match=r"m\.jsonl:1: .*(leads out|address)"):
        Manifest("memory://far/m.jsonl")
    summary = check("memory://far/m.jsonl")
    assert set(summary["problems"]) <= {"unsafe_path", "missing_picture"}
    assert summary["usable"] == 0


def test_an_image_root_is_not_for_addresses(store: Store, tmp_path: Path) -> None:
    store("far/m.jsonl", manifest(["0.png"]))
    with pytest.raises(DataError, match="image_root is not for it"):
        Manifest("memory://far/m.jsonl", image_root=tmp_path)


def test_a_file_address_keeps_the_rules_of_this_machine(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "out.png").write_bytes(picture(0))
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    (folder / "m.jsonl").write_bytes(manifest(["link.png"]))
    assert place((folder / "m.jsonl").as_uri()) == folder / "m.jsonl"
    with pytest.raises(DataError, match="symbolic link"):
        Manifest((folder / "m.jsonl").as_uri())


def test_chains_and_names_for_the_web(store: Store) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("d/m.jsonl", manifest(["0.png"]))
        file.writestr("d/0.png", picture(5))
    store("a.zip", buffer.getvalue())
    assert Manifest("zip://d/m.jsonl::memory://a.zip")[0].images[0].getpixel((0, 0)) == (5, 0, 0)
    assert str(Far("https://h/d/m.jsonl?key=1").beside("a b?#.png")) == "https://h/d/a%20b%3F%23.png"
    assert str(Far("simplecache::s3://b/d/m.jsonl").beside("e/a.png")) == "simplecache::s3://b/d/e/a.png"


def test_files_at_the_root_of_an_address(store: Store) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("m.jsonl", manifest(["0.png"]))
        file.writestr("0.png", picture(5))
        for k in range(2):
            file.writestr(f"a-{k}.tar", tar(2 * k, 2 * k + 2))
    store("z.zip", buffer.getvalue())
    store("m.jsonl", manifest(["0.png"]))
    store("0.png", picture(6))
    store("a-0.tar", tar(0, 2))
    assert Manifest("zip://m.jsonl::memory://z.zip")[0].images[0].getpixel((0, 0)) == (5, 0, 0)
    assert Manifest("memory://m.jsonl")[0].images[0].getpixel((0, 0)) == (6, 0, 0)
    assert list(map(str, named("zip://a-*.tar::memory://z.zip"))) == [
        f"zip://a-{k}.tar::memory://z.zip" for k in (0, 1)
    ]
    assert list(map(str, named("memory://a-*.tar"))) == ["memory://a-0.tar"]
    assert len(shards("zip://::memory://z.zip").build()) == 4
    assert str(Far("https://h/m.jsonl?key=1").beside("a b.png")) == "https://h/a%20b.png"
    assert Far("memory://m.jsonl").stem == "m"


def test_a_shard_replaced_in_use_ends_the_run_and_is_no_bad_sample(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("memory://far", str(tmp_path)):
        for replacement, again in ((tar(0, 8, padding=7), 300.0), (tar(8, 16), 0.0)):
            store("far/0.tar", tar(0, 8))
            (tmp_path / "0.tar").write_bytes(tar(0, 8))
            mixture = build_mixture([shards(kind)], 0, tolerant=True)
            assert not any(drawn.skipped for drawn in encoded(mixture, 8))
            store("far/0.tar", replacement)
            (tmp_path / "0.tar").write_bytes(replacement)
            # what begins where another sample did is known by its header, what is as large by its version
            monkeypatch.setattr(places_module, "LOOK_AGAIN", again)
            with pytest.raises(BrokenSource, match=r"0\.tar was changed while in use"):
                encoded(mixture, 8)


def test_a_far_manifest_changed_in_use_is_noticed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store("far/m.jsonl", manifest(["0.png"]))
    store("far/0.png", picture(0))
    mixture = build_mixture([SourceConfig(source="manifest", path="memory://far/m.jsonl")], 0, tolerant=True)
    encoded(mixture, 1)
    store("far/m.jsonl", manifest(["0.png"]).replace(b"red", b"rad"))
    monkeypatch.setattr(places_module, "LOOK_AGAIN", 0.0)
    with pytest.raises(BrokenSource, match="was changed while in use"):
        encoded(mixture, 1)


def test_an_address_that_is_silent_is_asked_again_and_then_ends_the_run(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store("far/0.tar", tar(0, 4))
    mixture = build_mixture([shards("memory://far")], 0, tolerant=True)
    system, calls = type(fsspec.filesystem("memory")), 0
    plain = system.cat_file

    def silent(self: Any, *arguments: Any, **named_ones: Any) -> bytes:
        nonlocal calls
        calls += 1
        if calls <= failing:
            raise ConnectionResetError("reset by peer")
        return plain(self, *arguments, **named_ones)

    monkeypatch.setattr(system, "cat_file", silent)
    failing = 2
    assert not any(drawn.skipped for drawn in encoded(mixture, 2))
    calls, failing = 0, 10_000
    with pytest.raises(
        BrokenSource, match=r"memory://far/0\.tar does not answer after 3 tries \(ConnectionResetError: reset"
    ):
        encoded(mixture, 2)
    entries_module._scanned_before.cache_clear()
    with pytest.raises(BrokenSource, match="does not answer"):
        build_mixture([shards("memory://far")], 0, tolerant=True)


def test_what_an_implementation_hides_behind_its_errors(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs raises an OSError because of a ClientError, which holds the answer."""

    class ClientError(Exception):
        def __init__(self, status: int) -> None:
            self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}

    store("far/0.png", picture(0))
    calls = 0

    def failing(self: Any, *arguments: Any, **named_ones: Any) -> bytes:
        nonlocal calls
        calls += 1
        raise error from ClientError(status)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", failing)
    error, status = OSError(22, "The requested range is not satisfiable"), 416
    assert Far("memory://far/0.png").read(0, 10) == b""
    error, status = PermissionError("The provided token has expired."), 400
    with pytest.raises(BrokenSource, match=r"no right to read memory://far/0\.png .*token has expired"):
        Far("memory://far/0.png").read(0, 10)
    assert calls == 2
    error, status = OSError(5, "Slow down"), 503
    with pytest.raises(BrokenSource, match="does not answer after 3 tries"):
        Far("memory://far/0.png").read(0, 10)


def test_an_address_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"class": "package_that_is_absent.FileSystem", "err": "Please install package_that_is_absent"}
    monkeypatch.setitem(import_module("fsspec.registry").known_implementations, "absent", absent)
    for source, name in (("shards", "t.tar"), ("manifest", "t.jsonl")):
        with pytest.raises(DataError, match=r"absent://b/t.* needs a package .*install package_that_is_absent.*s3fs"):
            SourceConfig(source=source, path=f"absent://b/{name}").build()
        with pytest.raises(DataError, match=r"foo://b/t.* cannot be read .*Protocol not known"):
            SourceConfig(source=source, path=f"foo://b/{name}").build()


@pytest.mark.parametrize("kind", ["shards", "manifest"])
def test_a_run_on_an_address_resumes_to_the_same_bits_and_notices_changes(
    kind: str, store: Store, pictures: Path, toy_recipe: dict[str, Any], tmp_path: Path
) -> None:
    convert(pictures / "manifest.jsonl", tmp_path / "tars", shard_examples=5)
    for folder in (pictures, tmp_path / "tars"):
        for file in folder.iterdir():
            store(f"far/{file.name}", file.read_bytes())
    paths = {"shards": "memory://far/{000000..000002}.tar", "manifest": "memory://far/manifest.jsonl"}
    toy_recipe["data"] = [{"source": kind, "path": paths[kind]}]
    toy_recipe["stages"] = [{**toy_recipe["stages"][1], "steps": 5, "checkpoint_every": 2}]
    toy_recipe |= {"num_workers": 1, "max_bad_samples": 1}
    recipe = from_mapping(Recipe, toy_recipe)
    Run(recipe, tmp_path / "whole").train()
    with killed_at(4):
        Run(recipe, tmp_path / "killed").train()
    shutil.copytree(tmp_path / "killed", tmp_path / "changed")
    Run(recipe, tmp_path / "killed", resume=True).train()
    whole, killed = (
        (tmp_path / name / "stages" / "0-align" / "model.safetensors").read_bytes() for name in ("whole", "killed")
    )
    assert whole == killed
    for file in (tmp_path / "tars" / "000001.tar", pictures / "manifest.jsonl"):
        # as large as before
        store(f"far/{file.name}", file.read_bytes().replace(b"number 7", b"number 8"))
    with pytest.raises(RecipeError, match=r"memory://far/.* has changed since"):
        Run(recipe, tmp_path / "changed", resume=True)


def test_a_resume_without_its_manifest_says_so(pictures: Path, toy_recipe: dict[str, Any], tmp_path: Path) -> None:
    toy_recipe["data"] = [{"source": "manifest", "path": str(pictures / "manifest.jsonl")}]
    recipe = from_mapping(Recipe, toy_recipe)
    RunFolder(tmp_path / "run", recipe, resume=False, overwrite=False).open()
    (pictures / "manifest.jsonl").rename(pictures / "gone.jsonl")
    with pytest.raises(DataError, match=r"manifest\.jsonl cannot be read \(No such file.*Put the file back"):
        RunFolder(tmp_path / "run", recipe, resume=True, overwrite=False)


def test_files_at_addresses_are_looked_at_together_and_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{k}.png" for k in range(6)]
    for k, name in enumerate(names):
        store(f"far/{name}", picture(k))
        store(f"tars/{k}.tar", tar(k, k + 1))
    store("far/m.jsonl", manifest(names))
    looked: list[tuple[str, bool]] = []
    plain = Far.look

    def look(self: Far) -> Look:
        looked.append((self.name, threading.current_thread() is threading.main_thread()))
        return plain(self)

    monkeypatch.setattr(Far, "look", look)
    assert convert("memory://far/m.jsonl", tmp_path / "out", shard_bytes=10_240) == 6
    assert len(list((tmp_path / "out").glob("*.tar"))) > 1
    # the sizes for the shards, and the fingerprint of the conversion
    assert sorted(each for each in looked if each[0] in names) == sorted(2 * [(name, False) for name in names])
    looked.clear()
    source = shards("memory://tars").build()
    assert sorted(looked) == [(f"{k}.tar", False) for k in range(6)]
    looked.clear()
    source.fingerprint()
    assert sorted(looked) == [(f"{k}.tar", False) for k in range(6)]


def test_a_table_at_an_address_that_changed_is_noticed(
    store: Store, toy_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    line = b'{"q": "a", "a": "b"}\n'
    store("far/t.jsonl", 3 * line)
    columns = {"image": None, "question": "q", "answer": "a"}
    table = {"source": "table", "path": "memory://far/*.jsonl", "columns": columns}
    toy_recipe["data"] = [*toy_recipe["data"], table]
    toy_recipe["stages"] = [{**toy_recipe["stages"][1], "steps": 3}]
    recipe = from_mapping(Recipe, toy_recipe)
    with killed_at(2):
        Run(recipe, tmp_path / "run").train()
    store("far/t.jsonl", 3 * line.replace(b"b", b"c"))
    with pytest.raises(RecipeError, match=r"memory://far/\*\.jsonl has changed since"):
        Run(recipe, tmp_path / "run", resume=True)
