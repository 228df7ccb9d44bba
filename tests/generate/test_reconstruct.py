"""Pictures through the tokenizer: sizes, padding, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from ett.errors import DataError, ModelError
from ett.generate.fidelity import psnr
from ett.generate.reconstruct import (
    reconstruct,
    side_by_side,
    sized,
    tokenize_picture,
    unique_stems,
    write_reconstructions,
)
from ett.images import Box, to_array
from ett.model import EttImageProcessor
from ett.tokenizers import VisionTokenizer
from tests.evaluate.conftest import Toy, picture


@pytest.fixture
def tokenizer(toy: Toy) -> VisionTokenizer:
    return toy[0].vision_tokenizer


def test_padding_is_cut_off(tokenizer: VisionTokenizer) -> None:
    wide, tall, square = reconstruct(tokenizer, 32, [picture(0, 60, 30), picture(1, 7, 70), picture(2, 9, 9)])
    assert wide.image.size == wide.original.size == (32, 16)
    assert tall.image.size == (3, 32)
    assert square.image.size == (32, 32)
    assert wide.indices.shape == (8, 8)
    assert wide.indices.dtype == np.int64


def test_figures_are_those_of_the_pictures(tokenizer: VisionTokenizer) -> None:
    (found,) = reconstruct(tokenizer, 32, [picture(0, 60, 30)])
    pixels = torch.from_numpy(np.stack([EttImageProcessor(32, 32).fit(picture(0, 60, 30))[0]]))
    decoded = tokenizer.detokenize(tokenizer.tokenize(pixels))
    assert found.psnr == psnr(pixels[0], decoded[0], Box(0, 8, 32, 24))
    # but for rounding to 8 bits
    written = psnr(*(torch.from_numpy(to_array(image)) for image in (found.original, found.image)))
    assert found.psnr == pytest.approx(written, abs=0.05)


def test_batches_do_not_matter(tokenizer: VisionTokenizer) -> None:
    pictures = [picture(i, 20 + i, 30) for i in range(5)]
    one, more = (list(reconstruct(tokenizer, 32, pictures, batch_size)) for batch_size in (1, 3))
    for a, b in zip(one, more, strict=True):
        assert np.array_equal(a.indices, b.indices)
        assert a.psnr == pytest.approx(b.psnr, abs=1e-3)
    assert list(reconstruct(tokenizer, 32, [])) == []


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F", "HSV"])
def test_any_mode(tokenizer: VisionTokenizer, mode: str) -> None:
    grey = picture(0).convert("L")
    image = picture(0).convert("RGB").convert(mode) if mode not in ("LA", "I;16", "F") else grey.convert(mode)
    (found,) = reconstruct(tokenizer, 16, [image])
    assert found.image.size == (16, 12)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (900, 2)])
def test_any_size(tokenizer: VisionTokenizer, size: tuple[int, int]) -> None:
    (found,) = reconstruct(tokenizer, 32, [PIL.Image.new("RGB", size, "red")])
    assert max(found.image.size) == 32
    assert np.isfinite([found.psnr, found.ssim]).all()


def test_sizes_divide(tokenizer: VisionTokenizer) -> None:
    with pytest.raises(ModelError, match="for example 28 or 32"):
        sized(tokenizer, 30)
    with pytest.raises(ModelError, match="for example 4 or 8"):
        sized(tokenizer, 1)
    assert sized(tokenizer, EttImageProcessor(16, 32)).width == 32


def test_files(tokenizer: VisionTokenizer, tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.webp", tmp_path / "b" / "y.bmp"]
    for i, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        picture(i, 40, 20).save(path)
    out = tmp_path / "new" / "folder"
    written = write_reconstructions(tokenizer, 32, paths, out, compare=True)
    assert [path.name for path, _ in written] == ["x.png", "x-2.png", "y.png"]
    assert sorted(p.name for p in out.iterdir()) == [
        "x-2.compare.png", "x-2.png", "x.compare.png", "x.png", "y.compare.png", "y.png",
    ]  # fmt: skip
    for path, found in written:
        assert np.array_equal(np.asarray(PIL.Image.open(path)), np.asarray(found.image))
    with PIL.Image.open(out / "x.compare.png") as image:
        assert image.size == (32 + 4 + 32, 16)


def test_originals_are_never_overwritten(tokenizer: VisionTokenizer, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "x.png")
    before = (tmp_path / "x.png").read_bytes()
    with pytest.raises(DataError, match="would be overwritten"):
        write_reconstructions(tokenizer, 32, [tmp_path / "x.png"], tmp_path)
    assert (tmp_path / "x.png").read_bytes() == before
    (tmp_path / "x.png").rename(tmp_path / "x.compare.png")
    picture(1).save(tmp_path / "x.jpg")
    with pytest.raises(DataError, match=r"x\.compare\.png.*would be overwritten"):
        write_reconstructions(tokenizer, 32, [tmp_path / "x.jpg", tmp_path / "x.compare.png"], tmp_path, compare=True)
    assert (tmp_path / "x.compare.png").read_bytes() == before
    assert not (tmp_path / "x.png").exists()


def test_bad_files(tokenizer: VisionTokenizer, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"bad\.png"):
        write_reconstructions(tokenizer, 32, [tmp_path / "bad.png"], tmp_path / "out")
    picture(0).save(tmp_path / "good.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_reconstructions(tokenizer, 32, [tmp_path / "good.png"], tmp_path / "file")


def test_unique_stems() -> None:
    given = ["a.png", "A.jpg", "b/a.png", "a-2.png", "a.compare.png", "a.compare.jpg"]
    stems = unique_stems(given)
    assert stems[0] == "a"
    names = [name for stem in stems for name in (f"{stem}.png".casefold(), f"{stem}.compare.png".casefold())]
    assert len(set(names)) == len(names)


def test_tokens_as_plain_values(tokenizer: VisionTokenizer) -> None:
    found = tokenize_picture(tokenizer, 32, picture(0, 60, 30))
    (same,) = reconstruct(tokenizer, 32, [picture(0, 60, 30)])
    assert found == {
        "indices": same.indices.tolist(),
        "codebook_size": 64,
        "downsample": 4,
        "height": 32,
        "width": 32,
        "box": [0, 8, 32, 24],
    }


def test_side_by_side() -> None:
    joined = side_by_side(PIL.Image.new("RGB", (3, 2), "red"), PIL.Image.new("RGB", (3, 2), "blue"), gap=1)
    assert joined.size == (7, 2)
    assert [joined.getpixel((x, 0)) for x in (0, 3, 4)] == [(255, 0, 0), (255, 255, 255), (0, 0, 255)]
