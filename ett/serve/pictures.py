"""Pictures in requests and responses: data URLs in, PNG as base64 out. Nothing is ever fetched for a stranger."""

from __future__ import annotations

import base64
import binascii
import io
import re

import PIL.Image

from ett.errors import DataError
from ett.images import load_image
from ett.serve.errors import ApiError

_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?P<rest>;[^,]{0,100})?,", re.ASCII | re.IGNORECASE)


def picture_from_url(url: str, max_pixels: int, param: str) -> PIL.Image.Image:
    """The picture in a data URL, mode RGB, decoded whole.

    Args:
        url: ``data:image/png;base64,...`` of any kind that `ett.images.load_image` opens.
        param: where it stands in the request, for messages.

    Raises:
        ApiError: another scheme, damaged base64, or a picture that cannot be used (400).
    """
    head = _DATA_URL.match(url[:256])
    if head is None:
        scheme = url.partition(":")[0].lower()
        if scheme in ("http", "https"):
            raise ApiError(
                400,
                f"{param}: pictures are not fetched from the network, so that no request can make the server open addresses "
                "that only it can reach. Send the picture itself: data:image/png;base64,...",
                param=param,
                code="remote_picture",
            )
        raise ApiError(
            400, f"{param} is not a data URL. Send data:image/png;base64,...", param=param, code="invalid_url"
        )
    if not (head["rest"] or "").lower().endswith(";base64"):
        raise ApiError(
            400, f"{param}: a data URL must be base64: data:image/png;base64,...", param=param, code="invalid_url"
        )
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{param} is not valid base64: {error}.", param=param, code="invalid_base64") from error
    try:
        return load_image(data, max_pixels=max_pixels)
    except DataError as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="invalid_image") from error


def base64_png(image: PIL.Image.Image) -> str:
    """The picture as PNG, base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
