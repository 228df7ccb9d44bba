"""Pictures from outside: the values of every mode, refusals in one sentence, and geometry."""

from __future__ import annotations

import io
import os
import random
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
from PIL import ImageCms, ImageFile, features

from ett.errors import DataError
from ett.images import (
    MAX_PIXELS,
    Box,
    center_crop,
    fit,
    from_array,
    letterbox,
    load_image,
    stretch,
    to_array,
)

Pixels = npt.NDArray[np.uint8]


def pixels(image: PIL.Image.Image) -> Pixels:
    assert image.mode == "RGB"
    return np.asarray(image)


def encoded(image: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def row(*values: Any, mode: str) -> PIL.Image.Image:
    """A picture one pixel high."""
    image = PIL.Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data + chunk(b"IEND", b"")


def photo() -> PIL.Image.Image:
    """40 x 52, smooth with a noisy square."""
    y, x = np.mgrid[0:40, 0:52]
    values = np.stack([(x * 5) % 256, (y * 6) % 256, ((x + y) * 3) % 256], -1).astype(np.uint8)
    values[10:20, 10:20] = np.random.default_rng(0).integers(0, 256, (10, 10, 3))
    return PIL.Image.fromarray(values)


def with_alpha() -> PIL.Image.Image:
    y, x = np.mgrid[0:40, 0:52]
    image = photo()
    image.putalpha(PIL.Image.fromarray(((x + y) * 2).astype(np.uint8)))
    return image


def profile_of(name: Any) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


def swapped_profile() -> bytes:
    """sRGB with the primaries of red and green exchanged: a picture in it is recognised by its wrong colours."""
    profile = bytearray(profile_of("sRGB"))
    count = struct.unpack_from(">I", profile, 128)[0]
    for i in range(count):
        at = 132 + 12 * i
        tag = bytes(profile[at : at + 4])
        if tag in (b"rXYZ", b"gXYZ"):
            profile[at : at + 4] = b"gXYZ" if tag == b"rXYZ" else b"rXYZ"
    return bytes(profile)


def samples() -> dict[str, bytes]:
    """One encoded picture of each kind and flavour."""
    image, alpha = photo(), with_alpha()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a picture"
    turned = alpha.rotate(90)
    more = {"exif": exif, "icc_profile": profile_of("sRGB")}
    found = {
        "jpeg": encoded(image, "JPEG", **more),
        "jpeg progressive": encoded(image, "JPEG", progressive=True),
        "jpeg cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "mpo": encoded(image, "MPO", save_all=True, append_images=[image.rotate(90)]),
        "png": encoded(alpha, "PNG", **more),
        "png palette": encoded(image.quantize(16), "PNG", transparency=b"\x00\x50\xff"),
        "apng": encoded(alpha, "PNG", save_all=True, append_images=[turned]),
        "gif": encoded(image, "GIF"),
        "gif animated": encoded(
            image.quantize(32), "GIF", save_all=True, append_images=[image.rotate(90).quantize(32)]
        ),
        "webp": encoded(alpha, "WEBP", **more),
        "webp lossless": encoded(alpha, "WEBP", lossless=True),
        "webp animated": encoded(alpha, "WEBP", save_all=True, append_images=[turned]),
        "tiff": encoded(image, "TIFF", **more),
        "tiff lzw": encoded(image, "TIFF", compression="tiff_lzw"),
        "tiff deflate": encoded(image, "TIFF", compression="tiff_deflate"),
        "tiff jpeg": encoded(image, "TIFF", compression="jpeg"),
        "tiff float": encoded(image.convert("F"), "TIFF"),
        "bmp": encoded(image, "BMP"),
        "bmp palette": encoded(image.quantize(16), "BMP"),
        "ppm": encoded(image, "PPM"),
        "jpeg2000": encoded(image, "JPEG2000"),
    }
    if features.check("avif"):
        found["avif"] = encoded(alpha, "AVIF", **more)
    return found


SAMPLES = samples()


# Modes: every value, not only the shape.


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (row(0, 255, mode="1"), [(0, 0, 0), (255, 255, 255)]),
        (row(0, 7, 255, mode="L"), [(0, 0, 0), (7, 7, 7), (255, 255, 255)]),
        (row((1, 2, 3), mode="RGB"), [(1, 2, 3)]),
        (row((1, 2, 3, 9), mode="RGBX"), [(1, 2, 3)]),
        (row((10, 20, 30, 255), (10, 20, 30, 0), mode="RGBA"), [(10, 20, 30), (255, 255, 255)]),
        (row((0, 0, 0, 51), (255, 0, 0, 204), mode="RGBA"), [(204, 204, 204), (255, 51, 51)]),
        (row((0, 51), (100, 255), (9, 0), mode="LA"), [(204, 204, 204), (100, 100, 100), (255, 255, 255)]),
        (row((51, 0, 0, 51), mode="RGBa"), [(255, 204, 204)]),
        (row((0, 51), mode="La"), [(204, 204, 204)]),
        (row((0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255), mode="CMYK"), [(255, 255, 255), (0, 255, 255), (0, 0, 0)]),
        (row((255, 128, 128), (0, 128, 128), mode="YCbCr"), [(255, 255, 255), (0, 0, 0)]),
        (row((0, 255, 255), (85, 255, 255), mode="HSV"), [(255, 0, 0), (0, 255, 0)]),
    ],
    ids=lambda value: value.mode if isinstance(value, PIL.Image.Image) else "",
)
def test_each_mode_has_its_colours(image: PIL.Image.Image, expected: list[tuple[int, int, int]]) -> None:
    assert pixels(load_image(image))[0].tolist() == [list(colour) for colour in expected]


def test_lab() -> None:
    image = row((255, 128, 128), (0, 128, 128), (138, 209, 198), mode="LAB")
    expected = [(255, 255, 255), (0, 0, 0), (255, 0, 0)]
    for source in (image, encoded(image, "TIFF")):
        assert np.abs(pixels(load_image(source))[0].astype(int) - expected).max() <= 6


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_sixteen_bits_are_divided_by_257(mode: str) -> None:
    given = [0, 128, 129, 257, 32768, 65407, 65535]
    expected = [round(value / 257) for value in given]
    assert expected[-1] == 255
    assert expected[2] == 1
    for channel in np.moveaxis(pixels(load_image(row(*given, mode=mode))), -1, 0):
        assert channel[0].tolist() == expected


def test_integers_beyond_16_bits_are_clipped() -> None:
    assert pixels(load_image(row(-5, 70_000, mode="I")))[0, :, 0].tolist() == [0, 255]


def test_sixteen_bit_files() -> None:
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    expected = [0, 1, 255]
    grey = PIL.Image.fromarray(values)
    for kind in ("PNG", "TIFF"):
        assert pixels(load_image(encoded(grey, kind)))[0, :, 1].tolist() == expected
    big_endian = b"MM\x00\x2a\x00\x00\x00\x08" + struct.pack(">H", 8)
    for tag, value in ((256, 3), (257, 1), (258, 16), (259, 1), (262, 1), (273, 110), (278, 1), (279, 6)):
        big_endian += struct.pack(">HHIHH", tag, 3, 1, value, 0)
    big_endian += bytes(4)
    assert len(big_endian) == 110
    assert pixels(load_image(big_endian + values.astype(">u2").tobytes()))[0, :, 1].tolist() == expected
    deep = b"P5\n3 1\n65535\n" + values.astype(">u2").tobytes()
    assert pixels(load_image(deep))[0, :, 1].tolist() == expected


def test_sixteen_bit_colour_keeps_the_high_byte() -> None:
    data = png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 0x8000, 0xFFFF, 0x12FF, 0x0100, 0x00FF))
    assert pixels(load_image(data))[0].tolist() == [[0, 0x80, 0xFF], [0x12, 1, 0]]


def test_a_colour_key_is_white() -> None:
    grey = png(3, 1, 8, 0, b"\0\x05\x06\x07", chunk(b"tRNS", struct.pack(">H", 6)))
    assert pixels(load_image(grey))[0, :, 0].tolist() == [5, 255, 7]
    deep = png(
        2, 1, 16, 0, b"\0" + struct.pack(">2H", 257 * 9, 257 * 9 + 1), chunk(b"tRNS", struct.pack(">H", 257 * 9))
    )
    assert pixels(load_image(deep))[0, :, 0].tolist() == [255, 9]
    colour = png(2, 1, 8, 2, b"\0" + bytes([1, 2, 3, 1, 2, 4]), chunk(b"tRNS", struct.pack(">3H", 1, 2, 3)))
    assert pixels(load_image(colour))[0].tolist() == [[255, 255, 255], [1, 2, 4]]
    bilevel = png(2, 1, 1, 0, b"\0\x40", chunk(b"tRNS", struct.pack(">H", 0)))
    assert pixels(load_image(bilevel))[0, :, 0].tolist() == [255, 255]


def test_palettes() -> None:
    image = PIL.Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    assert pixels(load_image(image))[0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    alpha = load_image(encoded(image, "PNG", transparency=bytes([255, 51, 0])))
    assert pixels(alpha)[0].tolist() == [[10, 20, 30], [212, 214, 216], [255, 255, 255]]
    key = load_image(encoded(image, "GIF", transparency=1))
    assert pixels(key)[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]
    assert pixels(load_image(image.convert("PA")))[0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    rgba = PIL.Image.new("P", (2, 1))
    rgba.putpalette([0, 0, 0, 51, 9, 9, 9, 255], "RGBA")
    rgba.putdata([0, 1])
    assert pixels(load_image(rgba))[0].tolist() == [[204, 204, 204], [9, 9, 9]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0, -3.0, float("nan")], [0, 128, 255, 0, 0]),
        ([0.0, 0.5, 1.5, 254.6, 300.0, float("inf"), float("-inf")], [0, 0, 2, 255, 255, 255, 0]),
    ],
)
def test_floats_are_of_0_to_1_or_of_0_to_255(values: list[float], expected: list[int]) -> None:
    image = PIL.Image.fromarray(np.array([values], dtype=np.float32))
    for source in (image, encoded(image, "TIFF")):
        assert pixels(load_image(source))[0, :, 0].tolist() == expected


def flat(colour: tuple[int, ...], mode: str) -> PIL.Image.Image:
    return PIL.Image.new(mode, (16, 16), colour)


def test_cmyk_jpegs_are_not_negatives() -> None:
    """Adobe writes CMYK inverted; read as it stands, a white page would be black."""
    for colour, expected in (
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
    ):
        data = encoded(flat(colour, "CMYK"), "JPEG", quality=100)
        assert b"Adobe" in data
        assert np.abs(pixels(load_image(data)).astype(int) - expected).max() <= 2
        assert np.array_equal(pixels(load_image(encoded(flat(colour, "CMYK"), "TIFF")))[0, 0], expected)


def test_ycck_jpegs() -> None:
    """The same scan announced as YCCK (transform 2) is decoded by libjpeg; neutral colours are the same in both."""
    # In the file all four are inverted: (0, 128, 128, 255), which as YCC is black, Adobe's inverted way to say white.
    data = encoded(flat((255, 127, 127, 0), "CMYK"), "JPEG", quality=100)
    at = data.index(b"Adobe") + 11
    assert np.abs(pixels(load_image(data[:at] + b"\x02" + data[at + 1 :])).astype(int) - 255).max() <= 3


@pytest.mark.parametrize(
    "kind",
    [
        "PNG",
        "GIF",
        "WEBP",
        pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="no AVIF")),
    ],
)
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = load_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert np.abs(pixels(image).astype(int) - (255, 0, 0)).max() <= (3 if kind == "AVIF" else 0)


def test_the_first_page_of_a_tiff() -> None:
    pages = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert pixels(load_image(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])))[0, 0].tolist() == [
        255,
        0,
        0,
    ]


# Orientation and colour profiles.

# What each EXIF orientation does to [[1, 2, 3], [4, 5, 6]] to stand it upright.
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
    9: [[1, 2, 3], [4, 5, 6]],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    values = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)
    if kind == "JPEG":
        values = np.kron(values * 40, np.ones((8, 8), dtype=np.uint8))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    data = encoded(PIL.Image.fromarray(values).convert("RGB"), kind, exif=exif, **options)
    found = pixels(load_image(data))[..., 0]
    if kind == "JPEG":
        found = np.rint(found[4::8, 4::8] / 40).astype(np.uint8)
    assert found.tolist() == UPRIGHT[orientation]


def test_exif_is_applied_once() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = encoded(PIL.Image.new("RGB", (4, 2)), "PNG", exif=exif, icc_profile=swapped_profile())
    once = load_image(data)
    assert once.size == (2, 4)
    assert once.info == {}
    twice = load_image(once)
    assert twice is not once
    assert np.array_equal(pixels(once), pixels(twice))
    with PIL.Image.open(io.BytesIO(data)) as opened:
        assert load_image(opened).size == (2, 4)
        assert opened.size == (4, 2)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0rubbish", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*\xff\xff\xff\xff"]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif_is_ignored(kind: str, exif: bytes) -> None:
    assert load_image(encoded(photo(), kind, exif=exif)).size == photo().size


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_profiles_are_converted_to_srgb(mode: str) -> None:
    image = PIL.Image.new("RGB", (2, 2), (255, 0, 0)).convert(mode)
    if mode == "RGBA":
        image.putalpha(128)
    plain, moved = (pixels(load_image(encoded(image, "PNG", icc_profile=p)))[0, 0] for p in (None, swapped_profile()))
    assert plain.tolist() == ([255, 127, 127] if mode == "RGBA" else [255, 0, 0])
    assert (moved == plain[[1, 0, 2]]).all(), "red in this profile is green"


@pytest.mark.parametrize("image", [photo(), photo().convert("L"), photo().convert("CMYK"), with_alpha()])
@pytest.mark.parametrize("profile", [b"rubbish", profile_of("sRGB")[:200], profile_of("LAB")])
def test_unusable_profiles_are_ignored(image: PIL.Image.Image, profile: bytes) -> None:
    data = encoded(image, "TIFF", icc_profile=profile)
    assert np.array_equal(pixels(load_image(data)), pixels(load_image(encoded(image, "TIFF"))))


def test_srgb_changes_nothing() -> None:
    assert np.array_equal(pixels(load_image(encoded(photo(), "PNG", icc_profile=profile_of("sRGB")))), pixels(photo()))


# Sources.


def test_every_source(tmp_path: Path) -> None:
    data = encoded(photo(), "PNG")
    path = tmp_path / "no suffix"
    path.write_bytes(data)
    for source in (path, str(path), data, io.BytesIO(data), photo()):
        assert np.array_equal(pixels(load_image(source)), pixels(photo()))
    with path.open("rb") as stream:
        assert np.array_equal(pixels(load_image(stream)), pixels(photo()))
    stream_inside = io.BytesIO(b"header" + data)
    stream_inside.seek(6)
    assert np.array_equal(pixels(load_image(stream_inside)), pixels(photo()))


def test_the_given_image_is_left_alone() -> None:
    image = with_alpha()
    image.info["note"] = "mine"
    before = image.tobytes()
    load_image(image)
    assert image.tobytes() == before
    assert image.info == {"note": "mine"}
    rgb = photo()
    load_image(rgb).putpixel((0, 0), (9, 9, 9))
    assert rgb.getpixel((0, 0)) == photo().getpixel((0, 0))


def test_refused_paths(tmp_path: Path) -> None:
    empty, text, pipe = tmp_path / "empty.png", tmp_path / "text.png", tmp_path / "pipe.png"
    empty.touch()
    text.write_text("not a picture, whatever its name says")
    os.mkfifo(pipe)
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    for path, reason in (
        (tmp_path / "missing.png", "does not exist"),
        (tmp_path, "is a folder"),
        (empty, "is empty"),
        (text, "is not a picture"),
        (pipe, "is a device or pipe"),
        (loop, "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (text / "below.png", "cannot be read"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            load_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="is not a path"):
        load_image("a\0b.png")


def test_other_programs_are_not_started() -> None:
    """An EPS file is a program, which Pillow would hand to Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DataError, match="is not a picture"):
        load_image(eps)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_no_pixels(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="no pixels"):
        load_image(PIL.Image.new("RGB", size))


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 1)])
def test_any_aspect(size: tuple[int, int]) -> None:
    assert load_image(encoded(PIL.Image.new("RGB", size, "red"), "PNG")).size == size


# Bombs: the header's claim is enough.


def bombs() -> dict[str, bytes]:
    big = 60_000
    bmp = bytearray(SAMPLES["bmp"])
    struct.pack_into("<ii", bmp, 18, big, big)
    gif = bytearray(SAMPLES["gif"])
    struct.pack_into("<HH", gif, 6, big, big)
    jpeg = bytearray(SAMPLES["jpeg progressive"])
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc2") + 5, big, big)
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + 2 * struct.pack("<I", big - 1)[:3] + bytes(90)
    return {
        "png": png(big, big, 8, 2, bytes(1000)),
        "bmp": bytes(bmp),
        "gif": bytes(gif),
        "jpeg": bytes(jpeg),
        "webp": b"RIFF" + struct.pack("<I", len(extended) + 4) + b"WEBP" + extended,
        "ppm": b"P6\n60000 60000\n255\n" + bytes(1000),
    }


@pytest.fixture
def _no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)


@pytest.mark.parametrize("kind", bombs())
@pytest.mark.usefixtures("_no_decoding")
def test_bombs_are_refused_before_decoding(kind: str) -> None:
    with pytest.raises(DataError, match=f"too large to decode.*{MAX_PIXELS}"):
        load_image(bombs()[kind])


@pytest.mark.parametrize("side", [9_000, 10_000, 14_000])
@pytest.mark.parametrize("max_pixels", [40 * 52, 80_000_000])
@pytest.mark.usefixtures("_no_decoding")
def test_below_pillows_own_limits_ours_holds(side: int, max_pixels: int) -> None:
    """9,000 squared is silent in Pillow, 10,000 a warning, 14,000 an error."""
    with pytest.raises(DataError, match=f"too large to decode.*Allowed: {max_pixels} pixels"):
        load_image(png(side, side, 8, 2, bytes(1000)), max_pixels=max_pixels)


@pytest.mark.parametrize("pillows", [None, 1000])
def test_pillows_limit_is_neither_needed_nor_changed(monkeypatch: pytest.MonkeyPatch, pillows: int | None) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", pillows)
    for kind in ("png", "gif", "bmp"):
        with pytest.raises(DataError, match="too large to decode"):
            load_image(bombs()[kind])
    assert pillows == PIL.Image.MAX_IMAGE_PIXELS
    # 1,500 pixels: Pillow warns, we allow them.
    assert load_image(encoded(PIL.Image.new("RGB", (30, 50)), "PNG")).size == (30, 50)


def test_max_pixels_is_inclusive() -> None:
    data = encoded(photo(), "PNG")
    assert load_image(data, max_pixels=40 * 52).size == (52, 40)
    for source in (data, photo(), io.BytesIO(data)):
        with pytest.raises(DataError, match="too large to decode: 52 x 40 = 2080 pixels"):
            load_image(source, max_pixels=40 * 52 - 1)
    with pytest.raises(ValueError, match="max_pixels"):
        load_image(data, max_pixels=0)


# Damage.


def outcome(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[PIL.Image.Image | None, str]:
    """The picture, or None and the message; any other error fails the test."""
    try:
        return load_image(data, max_pixels=max_pixels), ""
    except DataError as error:
        return None, str(error)


@pytest.mark.parametrize("kind", SAMPLES)
def test_truncated_files_are_never_half_decoded(kind: str) -> None:
    """Whole (what was cut off was no pixel) or refused, at 40 places in each file."""
    data = SAMPLES[kind]
    whole = pixels(load_image(data))
    refused = 0
    for i in range(40):
        image, message = outcome(data[: len(data) * i // 40])
        assert image is None or np.array_equal(pixels(image), whole)
        assert "\n" not in message
        refused += image is None
    assert refused >= 15, "the first frame or page can end early in the file, but not that early"


def damaged(seed: int) -> Iterator[tuple[str, bytes]]:
    generator = random.Random(seed)
    for kind, data in SAMPLES.items():
        for _ in range(30):
            flipped = bytearray(data)
            # Headers are where the harm is done: half of the flips go to the first 200 bytes.
            reach = len(data) if generator.random() < 0.5 else min(len(data), 200)
            for _ in range(generator.choice([1, 1, 2, 4, 16])):
                flipped[generator.randrange(reach)] = generator.choice([0, 255, generator.randrange(256)])
            yield kind, bytes(flipped)


@pytest.mark.filterwarnings("error")
def test_flipped_bytes_end_in_a_picture_or_in_one_sentence() -> None:
    outcomes = {True: 0, False: 0}
    for kind, data in damaged(seed=0):
        image, message = outcome(data, max_pixels=1_000_000)
        outcomes[image is not None] += 1
        assert len(message) < 500, kind
        assert "\n" not in message, kind
        if image is not None:
            assert image.width >= 1, kind
            assert pixels(image).shape == (image.height, image.width, 3), kind
    assert sum(outcomes.values()) >= 300
    assert min(outcomes.values()) >= 50, outcomes


def test_jpeg2000_without_its_tiles_is_not_a_blank_picture() -> None:
    data = SAMPLES["jpeg2000"]
    start = data.index(b"\xff\x90")
    for end in (*range(start, start + 20), len(data) - 1):
        assert outcome(data[:end])[0] is None


def test_a_damaged_image_object(tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    path.write_bytes(SAMPLES["png"][: len(SAMPLES["png"]) * 3 // 4])
    with PIL.Image.open(path) as image, pytest.raises(DataError, match=r"half\.png is damaged"):
        load_image(image)


def test_half_decoding_switched_on_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="LOAD_TRUNCATED_IMAGES"):
        load_image(SAMPLES["png"])


def test_warning_filters_survive_threads() -> None:
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [load_image(SAMPLES["jpeg"]) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_while_a_thread_decodes_does_not_hang() -> None:
    from ett import images

    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with images._decoding:
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        free = images._decoding.acquire(timeout=5)
        os._exit(0 if free else 1)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Geometry.


def test_letterbox_keeps_the_aspect() -> None:
    canvas, box = letterbox(PIL.Image.new("RGB", (40, 20), "red"), 32, 32, fill=(1, 2, 3))
    assert box == Box(left=0, top=8, right=32, bottom=24)
    assert (box.width, box.height) == (32, 16)
    values = pixels(canvas)
    assert (values[8:24] == (255, 0, 0)).all()
    assert (values[:8] == (1, 2, 3)).all()
    assert (values[24:] == (1, 2, 3)).all()
    assert pixels(box.cut(canvas)).shape == (16, 32, 3)
    assert (pixels(box.cut(canvas)) == (255, 0, 0)).all()


def test_center_crop_takes_the_middle() -> None:
    image = PIL.Image.new("RGB", (40, 20), "red")
    image.paste((0, 0, 255), (10, 0, 30, 20))
    cropped, box = center_crop(image, 20, 20)
    assert box == Box(0, 0, 20, 20)
    assert (pixels(cropped) == (0, 0, 255)).all()


def test_stretch_takes_everything() -> None:
    image = PIL.Image.new("RGB", (40, 20), "red")
    image.paste((0, 0, 255), (20, 0, 40, 20))
    stretched, box = stretch(image, 40, 40)
    assert box == Box(0, 0, 40, 40)
    assert (pixels(stretched)[:, :14] == (255, 0, 0)).all()
    assert (pixels(stretched)[:, -14:] == (0, 0, 255)).all()


@pytest.mark.parametrize("mode", ["pad", "crop", "stretch"])
def test_a_picture_that_fits_is_unchanged(mode: Any) -> None:
    fitted = fit(photo(), 40, 52, mode)
    assert np.array_equal(pixels(fitted.image), pixels(photo()))
    assert fitted.box == Box(0, 0, 52, 40)


@pytest.mark.parametrize("mode", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 1), (3, 100_000), (257, 255)])
@pytest.mark.parametrize("canvas", [(256, 256), (64, 192), (1, 1)])
def test_extreme_aspects(mode: Any, size: tuple[int, int], canvas: tuple[int, int]) -> None:
    height, width = canvas
    image, box = (fitted := fit(PIL.Image.new("RGB", size, "red"), height, width, mode)).image, fitted.box
    assert image.size == (width, height)
    assert 0 <= box.left < box.right <= width
    assert 0 <= box.top < box.bottom <= height
    assert (pixels(box.cut(image)) == (255, 0, 0)).all()
    if mode == "pad":
        assert box.width == width or box.height == height
    else:
        assert (box.width, box.height) == (width, height)


@pytest.mark.parametrize("mode", ["pad", "crop", "stretch"])
def test_shrinking_is_antialiased(mode: Any) -> None:
    """A fine chequerboard seen from afar is grey; without a filter it would stay black and white."""
    board = PIL.Image.fromarray((np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    values = pixels(fit(board, 32, 32, mode).image)[4:-4, 4:-4].astype(int)
    assert np.abs(values - 127.5).max() < 3


def test_fit_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any = "padd"
    with pytest.raises(ValueError, match="Did you mean 'pad'"):
        fit(photo(), 8, 8, wrong)
    for height, width in ((0, 8), (8, 0), (-1, 8)):
        with pytest.raises(ValueError, match="must be >= 1"):
            fit(photo(), height, width, "pad")
    with pytest.raises(ValueError, match="load_image"):
        fit(with_alpha(), 8, 8, "crop")


# Arrays.


def test_arrays_and_back() -> None:
    array = to_array(photo())
    assert array.dtype == np.float32
    assert array.shape == (3, 40, 52)
    assert array.flags.c_contiguous
    assert np.allclose(array, pixels(photo()).transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    every = PIL.Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3))
    extremes = to_array(every)
    assert (extremes.min(), extremes.max()) == (-1.0, 1.0)
    assert np.array_equal(pixels(from_array(extremes)), pixels(every))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_from_array_clamps_and_rounds(dtype: npt.DTypeLike) -> None:
    values = np.array([-7.0, -1.0, 0.0, 0.9999, 7.0, np.inf])
    array = np.broadcast_to(values, (3, 1, 6)).astype(dtype)
    assert pixels(from_array(array))[0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize("shape", [(3, 4), (1, 4, 4), (4, 4, 3), (3, 0, 4)])
def test_from_array_refuses_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        from_array(np.zeros(shape, dtype=np.float32))


def test_from_array_refuses_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        from_array(np.full((3, 2, 2), np.nan, dtype=np.float32))


def test_to_array_refuses_other_modes() -> None:
    with pytest.raises(ValueError, match="load_image"):
        to_array(with_alpha())
