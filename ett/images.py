"""Pictures from outside: opened safely, brought to 8-bit RGB, fitted to a size, turned into arrays and back.

Everything here treats its input as hostile: a picture is either decoded whole or refused with one `DataError` that
names it. Sizes are (height, width) in pixels; arrays are float32[3, H, W] in [-1, 1].
"""

from __future__ import annotations

import io
import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import PIL.Image
from PIL import ExifTags, ImageCms, ImageFile

from ett.errors import DataError, unknown

MAX_PIXELS = 178_956_970
"""Largest picture decoded by default [pixels], 0.7 GB decoded. With its default settings Pillow refuses above the same
number (twice ``PIL.Image.MAX_IMAGE_PIXELS``, where it starts to warn)."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is opened. Pillow knows some forty formats more; among them are ones that start other programs (EPS) or that any
text file may resemble (TGA, PCD), which strangers' files must not reach."""

FitMode = Literal["pad", "crop", "stretch"]
FIT_MODES: tuple[FitMode, ...] = ("pad", "crop", "stretch")

RESAMPLING = PIL.Image.Resampling.LANCZOS
"""The filter of every resize here. Pillow widens it with the scale, so that shrinking is antialiased."""

Rgb = tuple[int, int, int]
WHITE: Rgb = (255, 255, 255)

# What Pillow 13 raises for damaged files. 300,000 flips and truncations over every format above showed the bomb error,
# OSError (UnidentifiedImageError among them), SyntaxError, ValueError, RuntimeError (AVIF), AttributeError (AVIF with a
# broken EXIF block) and TypeError (TIFF directories). The others stand in the sources of its readers and decoders on
# paths that the flips did not reach; ImportError is for a build of Pillow without the library that a file needs.
_DECODER_ERRORS = (
    PIL.Image.DecompressionBombError,
    PIL.Image.DecompressionBombWarning,
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    AttributeError,
    struct.error,
    zlib.error,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    ImportError,
)

_TRANSPOSITIONS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}

# ``warnings.catch_warnings`` swaps a list that the whole process shares: two threads inside it would restore each
# other's. Pictures are therefore decoded one at a time in a process; loaders are parallel over processes.
_decoding = threading.RLock()


def _renew_lock() -> None:
    """A child forked while another thread decodes would wait for that thread for ever."""
    global _decoding
    _decoding = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def _quiet_pillow(max_pixels: int) -> Iterator[None]:
    """Pillow's remarks on damaged metadata dropped, whatever the process does with warnings.

    Its bomb warning becomes an exception unless the caller allows more pixels than Pillow warns at; where Pillow
    refuses, at twice that number, it still does.
    """
    below_pillows = PIL.Image.MAX_IMAGE_PIXELS is None or max_pixels <= PIL.Image.MAX_IMAGE_PIXELS
    with _decoding, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("error" if below_pillows else "ignore", category=PIL.Image.DecompressionBombWarning)
        yield


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow can open (old ones know no AVIF)."""
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def load_image(
    source: str | Path | bytes | BinaryIO | PIL.Image.Image, *, max_pixels: int = MAX_PIXELS
) -> PIL.Image.Image:
    """A picture of any mode and size as 8-bit RGB, upright, in sRGB, opaque.

    Orientation from EXIF is applied. Transparency (alpha channels, palettes, colour keys) is laid on white. Embedded
    ICC profiles are converted to sRGB; one that cannot be used is ignored, as browsers do, and so is damaged EXIF. Of
    an animation, the first frame. Values deeper than 8 bits:

    - 16-bit greyscale: v / 257, rounded, so that 65535 becomes 255. 16-bit colour: Pillow keeps the high byte.
    - ``I`` (32-bit integers, what Pillow makes of deep PGM): read as 16-bit values: clipped to [0, 65535], / 257.
    - ``F`` (float TIFF, PFM): clipped to [0, 255], or, if no value exceeds 1, to [0, 1] and scaled by 255. NaN is 0.

    Args:
        source: a path, an encoded file's bytes, a binary stream (read from where it stands to its end) or a Pillow
            image, which stays as it is.
        max_pixels: largest height * width accepted; what a file's header claims is compared before decoding. Pillow's
            own refusal above twice ``PIL.Image.MAX_IMAGE_PIXELS`` stays: allowing more than our default needs both.

    Returns:
        A new image of mode RGB without metadata: loading it again changes nothing.

    Raises:
        DataError: missing, a folder or device, empty, not a picture, damaged, truncated, or larger than `max_pixels`.
        ValueError: `max_pixels` is not positive.
    """
    if max_pixels < 1:
        raise ValueError(f"max_pixels is {max_pixels}; it must be at least 1.")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DataError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on in this process, which turns damaged pictures into half-grey "
            "ones unnoticed. Set it to False, and mend or remove the pictures it was meant for."
        )
    if isinstance(source, PIL.Image.Image):
        name = str(getattr(source, "filename", "") or f"the given {source.mode} image")
        with _quiet_pillow(max_pixels), _refusing(name, max_pixels):
            return _to_rgb(source, name, max_pixels)
    if isinstance(source, str | Path):
        name = str(source)
        with _opened(source) as file:
            return _decode(file, name, max_pixels)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), f"the given {len(source)} bytes", max_pixels)
    name = str(getattr(source, "name", "the given stream"))
    return _decode(io.BytesIO(source.read()), name, max_pixels)


@contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    """The regular file at `path`, open for reading."""
    try:
        # Looked at before opening: opening a named pipe would wait for a writer.
        mode = os.stat(path).st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise DataError(f"{path} is a device or pipe, not a picture. Give the path of a picture file.")
        if stat.S_ISDIR(mode):
            raise DataError(f"{path} is a folder, not a picture. Give the path of a picture file in it.")
        file = open(path, "rb")  # noqa: SIM115 - closed below, outside the handler that is for opening only
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Check the path of the picture.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check the path and its permissions.") from error
    except DataError:
        raise
    except ValueError as error:  # a null character in the path
        raise DataError(f"{str(path)!r} is not a path ({error}). Check the path of the picture.") from error
    with file:
        yield file


def _decode(file: BinaryIO, name: str, max_pixels: int) -> PIL.Image.Image:
    if not file.read(1):
        raise DataError(f"{name} is empty (0 bytes). Restore or remove it.")
    file.seek(0)
    with _quiet_pillow(max_pixels), _refusing(name, max_pixels), PIL.Image.open(file, formats=_formats()) as image:
        if image.format == "JPEG2000":
            _refuse_missing_tiles(file, name)
        return _to_rgb(image, name, max_pixels)


def _refuse_missing_tiles(file: BinaryIO, name: str) -> None:
    """JPEG 2000 cut off after its header is a blank picture to the decoder. Whole ones have tile data (from a marker
    ff93) and behind it the end marker ffd9, two bytes that the data themselves cannot contain."""
    position = file.tell()
    file.seek(0)
    _, tile, rest = file.read().partition(b"\xff\x93")
    file.seek(position)
    if not tile or b"\xff\xd9" not in rest:
        raise DataError(f"{name} is damaged: its JPEG 2000 data ends early. Replace or remove it.")


@contextmanager
def _refusing(name: str, max_pixels: int) -> Iterator[None]:
    """Pillow's errors as one `DataError` about `name`."""
    try:
        yield
    except DataError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise DataError(
            f"{name} is not a picture that can be read (unknown kind, or its header is damaged). "
            f"Allowed: {', '.join(_formats())}. Convert, replace or remove it."
        ) from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise DataError(_too_large(name, str(error).rstrip("."), max_pixels)) from error
    except _DECODER_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{name} is damaged or of an unsupported kind: {reason}. Replace or remove it.") from error


def _too_large(name: str, found: str, max_pixels: int) -> str:
    return (
        f"{name} is too large to decode: {found}. Allowed: {max_pixels} pixels. "
        "Shrink it, or raise max_pixels if you trust its origin."
    )


def _to_rgb(image: PIL.Image.Image, name: str, max_pixels: int) -> PIL.Image.Image:
    """`image`, not yet decoded, as upright opaque 8-bit sRGB."""
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"{name} has no pixels ({width} x {height}). Replace or remove it.")
    if width * height > max_pixels:
        raise DataError(_too_large(name, f"{width} x {height} = {width * height} pixels", max_pixels))
    image.load()
    orientation = _orientation(image)
    image = _opaque(_in_srgb(_eight_bit(image), image.info.get("icc_profile")))
    if orientation in _TRANSPOSITIONS:
        image = image.transpose(_TRANSPOSITIONS[orientation])
    image.info = {}
    return image


def _orientation(image: PIL.Image.Image) -> object:
    """The EXIF (or XMP) orientation, 1 to 8; 1 where the block is damaged. (Pillow turns TIFFs while loading.)"""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:
        return 1


def _eight_bit(image: PIL.Image.Image) -> PIL.Image.Image:
    """`image` as L, RGB, RGBA, CMYK or LAB, all 8 bits a channel; transparency as RGBA."""
    mode = image.mode
    if mode == "I" or mode.startswith("I;"):
        return _sixteen_to_eight(image)
    if mode == "F":
        return _float_to_eight(image)
    if mode == "La":
        # Pillow has no way from La to RGB; LA it knows.
        return image.convert("LA").convert("RGBA")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if mode in ("L", "RGB", "CMYK", "LAB") else image.convert("L" if mode == "1" else "RGB")


def _sixteen_to_eight(image: PIL.Image.Image) -> PIL.Image.Image:
    values = np.asarray(image)
    grey = ((np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
    return PIL.Image.fromarray(grey)


def _float_to_eight(image: PIL.Image.Image) -> PIL.Image.Image:
    values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=np.inf, neginf=-np.inf)
    peak = 1.0 if values.max() <= 1.0 else 255.0
    return PIL.Image.fromarray(np.rint(np.clip(values, 0.0, peak) * (255.0 / peak)).astype(np.uint8))


@lru_cache(maxsize=16)
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The colour transform of an ICC profile, None where it is damaged or not for pictures of `mode`."""
    try:
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB"
        )
    except (ImageCms.PyCMSError, *_DECODER_ERRORS):
        return None


def _in_srgb(image: PIL.Image.Image, profile: object) -> PIL.Image.Image:
    """`image` (L, RGB, RGBA, CMYK, LAB) with its colours moved from `profile` to sRGB; alpha stays."""
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    colours = PIL.Image.merge("RGB", image.split()[:3]) if alpha is not None else image
    transform = _transform_to_srgb(profile, colours.mode) if isinstance(profile, bytes) and profile else None
    # Without a profile, Pillow's own formulas: LAB through its D50 profile, CMYK as (255 - C)(255 - K) / 255.
    moved = colours.convert("RGB") if transform is None else transform.apply(colours)
    if alpha is not None:
        moved.putalpha(alpha)
    return moved


def _opaque(image: PIL.Image.Image) -> PIL.Image.Image:
    """An RGB or RGBA image laid on white."""
    if image.mode == "RGB":
        return image
    ground = PIL.Image.new("RGB", image.size, WHITE)
    ground.paste(image, mask=image.getchannel("A"))
    return ground


@dataclass(frozen=True)
class Box:
    """A rectangle on a canvas [pixels]: columns left <= x < right, rows top <= y < bottom."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def cut(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The part of `image` inside the box: a padded canvas, or its reconstruction, back at the picture's aspect."""
        return image.crop((self.left, self.top, self.right, self.bottom))


@dataclass(frozen=True)
class Fitted:
    """A picture on a canvas.

    Attributes:
        image: mode RGB, of the size asked for.
        box: where the picture lies on it; the whole canvas unless it was padded.
    """

    image: PIL.Image.Image
    box: Box


def fit(image: PIL.Image.Image, height: int, width: int, mode: FitMode) -> Fitted:
    """An RGB picture on a canvas of `height` x `width` pixels, by `letterbox`, `center_crop` or `stretch`.

    Args:
        image: mode RGB, any size.
        height, width: of the canvas [pixels], at least 1.
        mode: ``pad`` keeps the whole picture and its aspect, on white; ``crop`` keeps the aspect and fills the canvas;
            ``stretch`` keeps the whole picture and fills the canvas.

    Raises:
        ValueError: another mode, a size below 1, or a picture that is not RGB.
    """
    if mode == "pad":
        return Fitted(*letterbox(image, height, width))
    if mode == "crop":
        return Fitted(*center_crop(image, height, width))
    if mode == "stretch":
        return Fitted(*stretch(image, height, width))
    raise ValueError(unknown("way to fit a picture", mode, FIT_MODES))


def letterbox(image: PIL.Image.Image, height: int, width: int, fill: Rgb = WHITE) -> tuple[PIL.Image.Image, Box]:
    """The whole picture at its own aspect, centred on a canvas of `height` x `width` pixels of colour `fill`.

    It touches two opposite edges. The other side is rounded, and at least 1 pixel however long and thin the picture is.
    Raises ValueError for a size below 1 or a picture that is not RGB.
    """
    _check(image, height, width)
    scale = min(height / image.height, width / image.width)
    inner_height = min(height, max(1, round(image.height * scale)))
    inner_width = min(width, max(1, round(image.width * scale)))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    canvas = PIL.Image.new("RGB", (width, height), fill)
    canvas.paste(_resized(image, inner_height, inner_width, (0.0, 0.0, *image.size)), (left, top))
    return canvas, Box(left, top, left + inner_width, top + inner_height)


def center_crop(image: PIL.Image.Image, height: int, width: int) -> tuple[PIL.Image.Image, Box]:
    """The largest centred part with the aspect of the canvas, resized to `height` x `width` pixels.

    Raises ValueError for a size below 1 or a picture that is not RGB.
    """
    _check(image, height, width)
    # Cut and resized in one step, in fractions of a pixel: resizing first would make a 1 x 2000 picture huge.
    scale = max(height / image.height, width / image.width)
    part_height, part_width = min(image.height, height / scale), min(image.width, width / scale)
    top, left = (image.height - part_height) / 2, (image.width - part_width) / 2
    part = (left, top, min(left + part_width, image.width), min(top + part_height, image.height))
    return _resized(image, height, width, part), Box(0, 0, width, height)


def stretch(image: PIL.Image.Image, height: int, width: int) -> tuple[PIL.Image.Image, Box]:
    """The whole picture resized to `height` x `width` pixels, its aspect lost.

    Raises ValueError for a size below 1 or a picture that is not RGB.
    """
    _check(image, height, width)
    return _resized(image, height, width, (0.0, 0.0, *image.size)), Box(0, 0, width, height)


def _check(image: PIL.Image.Image, height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"Cannot fit a picture to {height} x {width} pixels (height x width); each must be >= 1.")
    if image.mode != "RGB":
        raise ValueError(f"The picture has mode {image.mode}; only RGB can be fitted. Open it with load_image.")


def _resized(
    image: PIL.Image.Image, height: int, width: int, part: tuple[float, float, float, float]
) -> PIL.Image.Image:
    return image.resize((width, height), RESAMPLING, box=part)


def to_array(image: PIL.Image.Image) -> npt.NDArray[np.float32]:
    """An RGB image as float32[3, H, W] in [-1, 1]: v / 127.5 - 1.

    Raises:
        ValueError: the image is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"The picture has mode {image.mode}; only RGB becomes an array. Open it with load_image.")
    values = np.asarray(image, dtype=np.float32) / np.float32(127.5) - np.float32(1.0)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def from_array(array: npt.NDArray[np.floating]) -> PIL.Image.Image:
    """float[3, H, W] as an RGB image: clamped to [-1, 1] and rounded, the inverse of `to_array` for what it returns.

    Raises:
        ValueError: another shape, no pixels, or a NaN among the values.
    """
    if array.ndim != 3 or array.shape[0] != 3 or 0 in array.shape:
        raise ValueError(f"The array has shape {array.shape}; a picture is [3, H, W] with at least one pixel.")
    values = np.asarray(array, dtype=np.float32)
    if np.isnan(values).any():
        raise ValueError("The array holds NaN, which is no colour. Look for the step that produced it.")
    pixels = np.rint((np.clip(values, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    return PIL.Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
