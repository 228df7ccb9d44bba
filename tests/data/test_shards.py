"""Shards are read whole or refused by name."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ett.data import shards
from ett.data.entries import Samples, open_entries
from ett.data.places import shard_paths
from ett.data.shards import ShardIndex
from ett.errors import DataError

MEMBERS = {
    "a/000.jpg": b"picture 0" * 200,
    "a/000.txt": b"zero",
    "./b.tar.1.PNG": b"picture 1",
    "b.json": b"{}",
    "README": b"no extension",
}


def write(path: Path, members: Mapping[str, bytes], *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write(tmp_path / "shard.tar", MEMBERS)


def test_members_are_grouped_by_key_and_read_back(shard: Path) -> None:
    index = ShardIndex([shard])
    assert [sample.key for sample in index] == ["a/000", "b"]
    assert {extension: index.read(index[0], extension) for extension in index[0].members} == {
        "jpg": MEMBERS["a/000.jpg"],
        "txt": b"zero",
    }
    assert set(index[1].members) == {"tar.1.png", "json"}
    assert index.ignored == [f"{shard}: README"]


def test_several_shards_keep_their_order(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.tar", {f"k{n}.txt": str(n).encode()}) for n in (2, 1)]
    index = ShardIndex(paths)
    assert [index.read(sample, "txt") for sample in index] == [b"2", b"1"]
    with pytest.raises(IndexError, match="sample 2 of 2"):
        index[2]


def test_gzipped_shards_read_the_same(shard: Path, tmp_path: Path) -> None:
    zipped = tmp_path / "shard.tar.gz"
    zipped.write_bytes(gzip.compress(shard.read_bytes()))
    plain, packed = ShardIndex([shard]), ShardIndex([zipped])
    for index in (packed, pickle.loads(pickle.dumps(packed))):
        for ours, theirs in zip(index, plain, strict=True):
            assert {e: index.read(ours, e) for e in ours.members} == {e: plain.read(theirs, e) for e in theirs.members}


def test_pickles_small_and_reads_from_threads(tmp_path: Path) -> None:
    path = write(tmp_path / "many.tar", {f"{n:06}.txt": str(n).encode() for n in range(500)})
    index = ShardIndex([path])
    assert len(pickle.dumps(index)) < 500 * 150
    again = pickle.loads(pickle.dumps(index))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda n: again.read(again[n], "txt"), range(500))) == [b"%d" % n for n in range(500)]


@pytest.mark.parametrize("name", ["/etc/a.txt", "../a.txt", "a/../../b.txt", "a\\b.txt"])
def test_unsafe_names_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "unsafe.tar", {name: b"x"})
    with pytest.raises(DataError, match=r"unsafe\.tar.*unsafe"):
        ShardIndex([path])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("x.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    path = write(tmp_path / "linked.tar", {"a.jpg": b"x"}, info)
    with pytest.raises(DataError, match=r"linked\.tar: x\.jpg is a link or device"):
        ShardIndex([path])


PAX = [
    {"GNU.sparse.map": "x"},
    {"GNU.sparse.size": "x"},
    {"GNU.sparse.realsize": "x"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
    {"GNU.sparse.major": "1"},
    {"GNU.sparse.name": "b.txt"},
    {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1"},
    {"size": "-5"},
    {"size": "9" * 400},
]


@pytest.mark.parametrize("headers", PAX)
def test_pax_headers_that_lie_are_refused(tmp_path: Path, headers: dict[str, str]) -> None:
    info = tarfile.TarInfo("x.txt")
    info.pax_headers = dict(headers)
    path = write(tmp_path / "pax.tar", {"a.jpg": b"x"}, info)
    with pytest.raises(DataError, match=r"pax\.tar.*(sparse|after a\.jpg|runs past)"):
        ShardIndex([path])


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    """Their bytes lie in pieces, so that reading them in a row gives others."""
    info = tarfile.TarInfo("x.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    path = write(tmp_path / "sparse.tar", {"a.jpg": b"x"}, info)
    with pytest.raises(DataError, match=r"sparse\.tar: x\.jpg is stored as a sparse file.*without tar's option -S"):
        ShardIndex([path])


def test_a_size_for_every_member_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sizes.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"size": "3"}) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 2000
        tar.addfile(info, io.BytesIO(bytes(2000)))
    with pytest.raises(DataError, match=r"the headers of a\.jpg give it different sizes"):
        ShardIndex([path])


def test_headers_of_headers_without_end_are_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    header = info.tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "deep.tar").write_bytes(header * 3000 + bytes(1024))
    with pytest.raises(DataError, match=r"deep\.tar is truncated or damaged"):
        ShardIndex([tmp_path / "deep.tar"])


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_and_not_waited_for(shard: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "b.tar")
    (folder / "c.tar").mkdir()
    shard.rename(folder / "a.tar")
    for name in ("b.tar", "c.tar"):
        with pytest.raises(DataError, match=rf"{name} is not a file but a folder or device"):
            ShardIndex([folder / name])
    samples = Samples(shard_paths(str(folder))[0])
    assert len(samples) == 2
    assert [Path(where).name for where, _ in samples.refused] == ["b.tar", "c.tar"]
    assert len(open_entries(folder).refused) == 2


def test_a_member_written_twice_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg is there twice"):
        ShardIndex([write(tmp_path / "twice.tar", {"a.jpg": b"x"}, info)])


def test_truncation_is_found_at_every_length(shard: Path, tmp_path: Path) -> None:
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        end = max(member.offset_data + 512 * -(-member.size // 512) for member in tar)
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end + 512, 256), end - 1, end + 511]:
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar"):
            ShardIndex([cut])
    cut.write_bytes(whole[: end + 512])
    assert len(ShardIndex([cut])) == 2


def test_a_damaged_header_names_the_member_before_it(shard: Path, tmp_path: Path) -> None:
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        at = tar.getmember("./b.tar.1.PNG").offset
    data[at + 150] ^= 0xFF
    (tmp_path / "flipped.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"flipped\.tar is truncated or damaged.*after a/000\.txt"):
        ShardIndex([tmp_path / "flipped.tar"])


def test_a_cut_or_flipped_gzip_is_refused(shard: Path, tmp_path: Path) -> None:
    data = bytearray(gzip.compress(shard.read_bytes()))
    path = tmp_path / "bad.tar.gz"
    path.write_bytes(data[:-9])
    with pytest.raises(DataError, match=r"bad\.tar\.gz is truncated or damaged"):
        ShardIndex([path])
    data[-6] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"bad\.tar\.gz is truncated or damaged"):
        ShardIndex([path])


def test_a_gzip_bomb_is_refused(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_UNPACKED", 1000)
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(DataError, match="more than 1000 bytes"):
        ShardIndex([tmp_path / "bomb.tar.gz"])


def test_a_shard_that_shrinks_is_noticed(shard: Path) -> None:
    index = ShardIndex([shard])
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(DataError, match=r"shard\.tar was changed while in use"):
        index.read(index[0], "jpg")


def test_missing_things_are_named(shard: Path, tmp_path: Path) -> None:
    index = ShardIndex([shard])
    with pytest.raises(DataError, match=r"a/000 has no \.webp member, only \.jpg, \.txt"):
        index.read(index[0], "webp")
    with pytest.raises(DataError, match=r"Cannot read the shard .*none\.tar"):
        ShardIndex([tmp_path / "none.tar"])
    with pytest.raises(DataError, match="No shards given"):
        ShardIndex([])
    with pytest.raises(DataError, match="holds no samples"):
        ShardIndex([write(tmp_path / "empty.tar", {"README": b"x"})])
