"""Pictures through the tokenizer's indices and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor

from ett.errors import DataError, ModelError
from ett.generate.fidelity import psnr, ssim
from ett.images import WHITE, Box, from_array, load_image
from ett.model.processing import EttImageProcessor
from ett.tokenizers import VisionTokenizer

Picture = str | Path | bytes | PIL.Image.Image


@dataclass(frozen=True)
class Reconstruction:
    """One picture and what the decoder makes of its indices, both at the size the model works at, padding cut off.

    Attributes:
        original, image: mode RGB, of equal size.
        indices: int64[h, w] of the whole canvas, padding included.
        psnr: [dB]. ssim: in [-1, 1]. Both without padding.
    """

    original: PIL.Image.Image
    image: PIL.Image.Image
    indices: npt.NDArray[np.int64]
    psnr: float
    ssim: float


def sized(tokenizer: VisionTokenizer, size: int | EttImageProcessor) -> EttImageProcessor:
    """How pictures are fitted: an image processor as it is, or square canvases of `size` pixels.

    Raises:
        ModelError: a size that does not divide into tokens.
    """
    step = tokenizer.downsample
    processor = EttImageProcessor(size, size) if isinstance(size, int) else size
    height, width = processor.height, processor.width
    if height % step or width % step or min(height, width) < 1:
        below = max(1, min(height, width) // step) * step
        raise ModelError(
            f"Pictures of {height} x {width} pixels do not divide into tokens of {step} x {step}. Give a multiple of "
            f"{step}, for example {below} or {below + step}."
        )
    return processor


def reconstruct(
    tokenizer: VisionTokenizer,
    size: int | EttImageProcessor,
    images: Iterable[Picture],
    batch_size: int = 8,
) -> Iterator[Reconstruction]:
    """Encode each picture to indices and decode these.

    Args:
        size: side of the square that pictures are fitted to whole [pixels], or a model's own image processor.
        images: of any mode and size, as `ett.images.load_image` takes them.
        batch_size: pictures at a time.

    Yields:
        One for each picture, in order; no more than a batch is held.

    Raises:
        DataError: a picture that cannot be read. ModelError: a size that does not divide into tokens.
    """
    processor = sized(tokenizer, size)
    waiting = iter(images)
    while part := list(islice(waiting, batch_size)):
        yield from rebuild(tokenizer, [processor.fit(load_image(picture)) for picture in part])


def rebuild(
    tokenizer: VisionTokenizer, fitted: Sequence[tuple[npt.NDArray[np.float32], Box]]
) -> Iterator[Reconstruction]:
    """`reconstruct` for one batch that `EttImageProcessor.fit` prepared: (float32[3, H, W] in [-1, 1], box) each."""
    pixels = _on_device(tokenizer, [array for array, _ in fitted])
    indices = tokenizer.tokenize(pixels)
    decoded = tokenizer.detokenize(indices)
    for i, (array, box) in enumerate(fitted):
        yield Reconstruction(
            original=box.cut(from_array(array)),
            image=box.cut(from_array(decoded[i].cpu().numpy())),
            indices=indices[i].cpu().numpy(),
            psnr=psnr(pixels[i], decoded[i], box),
            ssim=ssim(pixels[i], decoded[i], box),
        )


def write_reconstructions(
    tokenizer: VisionTokenizer,
    size: int | EttImageProcessor,
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    compare: bool = False,
    batch_size: int = 8,
) -> list[tuple[Path, Reconstruction]]:
    """Reconstruct picture files into a folder, made if need be: ``<stem>.png`` each, numbered where stems meet.

    Args:
        paths: of the pictures. The folder's own files are overwritten, but never one of these.
        compare: also write ``<stem>.compare.png``, the original at the same size beside the reconstruction.

    Returns:
        (file written, what it shows) in the order of `paths`.

    Raises:
        DataError: a picture that cannot be read, or a folder that cannot be written. ModelError: as `reconstruct`.
    """
    folder = Path(out)
    targets = [folder / f"{stem}.png" for stem in unique_stems(paths)]
    compared = [target.with_suffix(".compare.png") for target in targets] if compare else []
    for target in (*targets, *compared):
        if any(same_file(target, path) for path in paths):
            raise DataError(
                f"{target} is one of the given pictures and would be overwritten. Choose another --out folder."
            )
    written: list[tuple[Path, Reconstruction]] = []
    for target, found in zip(targets, reconstruct(tokenizer, size, paths, batch_size), strict=True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found.image.save(target)
            if compare:
                side_by_side(found.original, found.image).save(target.with_suffix(".compare.png"))
        except OSError as error:
            raise DataError(
                f"{target} cannot be written: {error.strerror or error}. Choose another --out folder."
            ) from error
        written.append((target, found))
    return written


def tokenize_picture(tokenizer: VisionTokenizer, size: int | EttImageProcessor, image: Picture) -> dict[str, Any]:
    """A picture's indices as plain values.

    Returns:
        ``indices`` ([h][w] whole numbers in [0, codebook_size)), ``codebook_size``, ``downsample`` (pixels per token
        side), ``height`` and ``width`` of the canvas [pixels], and ``box`` ([left, top, right, bottom],
        where the picture lies on it).

    Raises:
        DataError: a picture that cannot be read. ModelError: a size that does not divide into tokens.
    """
    processor = sized(tokenizer, size)
    array, box = processor.fit(load_image(image))
    return {
        "indices": tokenizer.tokenize(_on_device(tokenizer, [array]))[0].tolist(),
        "codebook_size": tokenizer.codebook_size,
        "downsample": tokenizer.downsample,
        "height": processor.height,
        "width": processor.width,
        "box": [box.left, box.top, box.right, box.bottom],
    }


def side_by_side(left: PIL.Image.Image, right: PIL.Image.Image, gap: int = 4) -> PIL.Image.Image:
    """Two RGB pictures of equal height on white, `gap` pixels apart."""
    canvas = PIL.Image.new("RGB", (left.width + gap + right.width, left.height), WHITE)
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + gap, 0))
    return canvas


def unique_stems(paths: Sequence[str | Path]) -> list[str]:
    """The files' names without suffix, with ``-2``, ``-3`` ... where one was taken, on any file system (case folded).

    "<stem>.compare" is never given: it names the comparison of <stem>.
    """
    taken: set[str] = set()
    stems: list[str] = []
    for path in paths:
        stem = Path(path).stem or "picture"
        candidate, number = stem, 1
        while candidate.casefold() in taken:
            number += 1
            candidate = f"{stem}-{number}"
        taken |= {candidate.casefold(), f"{candidate}.compare".casefold()}
        stems.append(candidate)
    return stems


def same_file(first: Path, second: str | Path) -> bool:
    """Whether two paths lead to one existing file."""
    try:
        return first.samefile(second)
    except OSError:
        return False


def _on_device(tokenizer: VisionTokenizer, arrays: Sequence[npt.NDArray[np.float32]]) -> Tensor:
    """float32[I, 3, H, W] where the tokenizer's weights are."""
    return torch.from_numpy(np.stack(arrays)).to(tokenizer.encoder_output.device)
