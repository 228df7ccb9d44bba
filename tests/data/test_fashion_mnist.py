"""Fashion-MNIST's own file format, as a manifest that the question tasks read."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from ett.cli import main
from ett.data.fashion_mnist import CLASSES, QUESTION, read_idx, write_fashion_mnist
from ett.data.manifest import Manifest, question_and_reference
from ett.errors import DataError
from ett.evaluate.references import choices_and_right

LABELS = np.array([9, 0, 3], np.uint8)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    return tmp_path


def test_pictures_and_names_survive(folder: Path) -> None:
    out = folder / "manifests" / "train.jsonl"
    assert write_fashion_mnist(folder, out) == 3
    manifest = Manifest(out)
    for example, pixels, label in zip(manifest, PIXELS, LABELS, strict=True):
        assert np.array_equal(np.asarray(example.images[0])[:, :, 0], pixels), "lossless"
        assert question_and_reference(example) == (QUESTION, CLASSES[label])
        assert choices_and_right(example) == (list(CLASSES), label)
    with pytest.raises(DataError, match="there already"):
        write_fashion_mnist(folder, out)
    assert main(["data", "fashion-mnist", str(folder), str(folder / "two.jsonl"), "--limit", "2"]) == 0
    assert len(Manifest(folder / "two.jsonl")) == 2


def test_what_is_missing_or_damaged_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match="t10k-images"):
        write_fashion_mnist(folder, folder / "out.jsonl", "heldout")
    labels = folder / "train-labels-idx1-ubyte"
    for damaged, message in (
        (idx(LABELS)[:-1], "complete"),
        (idx(PIXELS), "no IDX file"),
        (b"", "no IDX file"),
        (idx(LABELS[:2]), "3 pictures and 2 labels"),
        (idx(LABELS + 1), "labels up to 10"),
    ):
        labels.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            write_fashion_mnist(folder, folder / "out.jsonl")
    packed = folder / "train-images-idx3-ubyte.gz"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:40] + bytes(byte ^ 0xFF for byte in whole[40:60]) + whole[60:])
    with pytest.raises(DataError, match="complete"):
        read_idx(packed, dimensions=3)
    packed.write_bytes(whole[:-9])
    with pytest.raises(DataError, match="complete"):
        read_idx(packed, dimensions=3)
    assert not (folder / "out.jsonl").exists()
