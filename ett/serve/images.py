"""``/v1/images/generations`` and ``/v1/images/reconstructions``."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from ett.errors import UserError
from ett.generate.conversations import positions
from ett.generate.draw import Request as Asked
from ett.generate.draw import draw, grid_of, requests
from ett.generate.reconstruct import Reconstruction, rebuild
from ett.images import Box
from ett.model.image_sampling import ImageSampling
from ett.serve.chat import unless_gone
from ett.serve.engine import Engine, Work
from ett.serve.errors import ApiError
from ett.serve.limits import Limits
from ett.serve.meters import Meters
from ett.serve.pictures import base64_png, picture_from_url
from ett.serve.requests import DrawingRequest, ReconstructionRequest
from ett.serve.served import Served


class _Abandoned(Exception):
    """Ends a drawing that nobody waits for."""


@dataclass(frozen=True)
class _Drawing:
    """One picture to draw, of `size` (height, width) [pixels]; `abandoned` once nobody waits for it."""

    request: Asked
    size: tuple[int, int]
    sampling: ImageSampling
    abandoned: threading.Event


@dataclass(frozen=True)
class _Taken:
    """One picture to take through the tokenizer: float32[3, H, W] in [-1, 1] and where the picture lies on it."""

    pixels: npt.NDArray[np.float32]
    box: Box
    initial: bool


class Images:
    """Answers the two kinds of picture requests; arguments as `ett.serve.chat.Chat`."""

    def __init__(
        self, served: Served, engine: Engine, limits: Limits, meters: Meters, preparing: ThreadPoolExecutor
    ) -> None:
        self._served, self._engine, self._limits, self._meters = served, engine, limits, meters
        self._preparing = preparing
        most = limits.max_batch
        self._draw: Work[_Drawing, PIL.Image.Image] = Work(
            "drawing", self._drawn, most, lambda job: (job.sampling, job.size)
        )
        self._take: Work[_Taken, list[Reconstruction]] = Work(
            "reconstruction", self._taken, most, lambda job: job.initial
        )

    # -- drawing -------------------------------------------------------------------------------------------------------

    async def draw(self, given: DrawingRequest, request: Request) -> Response:
        """OpenAI's ``images.generate``: PNG as base64, by default of the size that the model learned.

        Raises:
            ApiError: the request is refused (501 where the model cannot draw), or failed.
        """
        self._served.check_name(given.model)
        self._served.drawing()
        jobs = await asyncio.get_running_loop().run_in_executor(self._preparing, self._jobs, given)
        try:
            drawn = await unless_gone(request, asyncio.gather(*(self._engine.submit(self._draw, job) for job in jobs)))
        finally:
            jobs[0].abandoned.set()
        self._meters.pictures.labels("drawing").inc(len(drawn))
        data = [{"b64_json": base64_png(image)} for image in drawn]
        height, width = jobs[0].size
        return JSONResponse(
            {"created": int(time.time()), "data": data, "output_format": "png", "size": f"{width}x{height}"}
        )

    def _jobs(self, given: DrawingRequest) -> list[_Drawing]:
        model, processor, count = self._served.drawing(), self._served.processor, given.n or 1
        if count > self._limits.max_images:
            raise ApiError(
                400, f"n is {count}; this server draws at most {self._limits.max_images} at a time.", param="n"
            )
        if len(given.prompt) > self._limits.max_characters:
            raise ApiError(400, f"prompt is longer than {self._limits.max_characters} characters.", param="prompt")
        size = self._served.size
        if given.size not in (None, "auto"):
            width, _, height = given.size.partition("x")
            size = int(height), int(width)
        try:
            rows, columns = grid_of(model, processor, size)
        except UserError as error:
            raise ApiError(400, str(error), param="size") from error
        seed = given.seed if given.seed is not None else secrets.randbits(61)
        try:
            asked = requests([given.prompt], count, seed)
            length = processor.drawing_inputs([given.prompt], guided=False)["input_ids"].shape[1]
        except UserError as error:
            raise ApiError(400, str(error), param="prompt") from error
        room = positions(model)
        if room is not None and length + rows * columns > room:
            raise ApiError(
                400,
                f"The prompt takes {length} positions and the picture {rows * columns}, but the language model has {room}. "
                "Shorten the prompt, or draw a smaller picture.",
                param="prompt",
            )
        settings = {name: getattr(given, name) for name in ("temperature", "top_k", "top_p", "guidance")}
        sampling = replace(ImageSampling(), **{name: value for name, value in settings.items() if value is not None})
        abandoned = threading.Event()
        return [_Drawing(each, size, sampling, abandoned) for each in asked]

    def _drawn(self, jobs: Sequence[_Drawing]) -> list[PIL.Image.Image]:
        """A picture for each job; none at all once nobody waits for any of them."""

        def go_on(_: int) -> None:
            if all(job.abandoned.is_set() for job in jobs):
                raise _Abandoned

        model, asked, count = self._served.drawing(), [job.request for job in jobs], len(jobs)
        size, sampling = jobs[0].size, jobs[0].sampling
        pictures = draw(model, self._served.processor, asked, sampling, size=size, batch_size=count, on_token=go_on)
        try:
            return [picture.image for picture in pictures]
        except _Abandoned:
            return []

    # -- reconstructing ------------------------------------------------------------------------------------------------

    async def reconstruct(self, given: ReconstructionRequest, request: Request) -> Response:
        """A picture as the tokenizer sees it: original at the model's size, reconstruction, indices; with `initial` also the
        reconstruction and indices before tuning.

        Raises:
            ApiError: the request is refused, or failed.
        """
        self._served.check_name(given.model)
        if given.initial and self._served.initial is None:
            raise ApiError(
                400, "This server has no tokenizer from before tuning. Start it with --initial MODEL.", param="initial"
            )
        job = await asyncio.get_running_loop().run_in_executor(self._preparing, self._fitted, given)
        found = await unless_gone(request, self._engine.submit(self._take, job))
        self._meters.pictures.labels("reconstruction").inc()
        body = {
            "created": int(time.time()),
            "width": found[0].original.width,
            "height": found[0].original.height,
            "codebook_size": self._served.tokenizer.codebook_size,
            "original": {"b64_json": base64_png(found[0].original)},
            "data": [_described(found[0])],
        }
        if len(found) > 1:
            body["initial"] = _described(found[1])
        return JSONResponse(body)

    def _fitted(self, given: ReconstructionRequest) -> _Taken:
        image = picture_from_url(given.image, self._limits.max_pixels, "image")
        pixels, box = self._served.processor.image_processor.fit(image)
        return _Taken(pixels, box, given.initial)

    def _taken(self, jobs: Sequence[_Taken]) -> list[list[Reconstruction]]:
        """For each job what the tokenizer makes of it, and with `initial` what the one before tuning made of it."""
        fitted = [(job.pixels, job.box) for job in jobs]
        tokenizers = [self._served.tokenizer]
        if jobs[0].initial and self._served.initial is not None:
            tokenizers.append(self._served.initial)
        with torch.inference_mode():
            found = [list(rebuild(tokenizer, fitted)) for tokenizer in tokenizers]
        return [list(versions) for versions in zip(*found, strict=True)]


def _described(found: Reconstruction) -> dict[str, Any]:
    return {
        "b64_json": base64_png(found.image),
        "psnr": round(found.psnr, 4),
        "ssim": round(found.ssim, 6),
        "indices": found.indices.tolist(),
    }
