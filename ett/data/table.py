"""Rows of a table as examples: Parquet, Arrow, JSON lines or CSV, tars without an index, or a data set of the hub.

The library `datasets` reads them, on this machine or behind an address that `fsspec` knows (``s3://``, ``https://``). It brings
them into its cache once, an Arrow file that is mapped into memory, so that rows are read by position and memory does not grow
with them.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ett.data.places import Place, is_address, named
from ett.data.sources import Source, conversation
from ett.errors import DataError, unknown
from ett.images import load_image
from ett.types import Example

BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tar": "webdataset",
}


@dataclass(frozen=True)
class ColumnsConfig:
    """Which columns of a table hold what.

    Attributes:
        image: a picture's encoded bytes (of type `Image` or binary), or a list of them; null for text alone.
        answer: text. question: text; null asks nothing, as before a caption.
        id: text or number; null takes the row's number.
    """

    image: str | None = "image"
    answer: str = "text"
    question: str | None = None
    id: str | None = None


class TableSource(Source):
    """The rows of a table, in its order.

    Args:
        path: a file, a pattern (``data/*.parquet``), the address of either, or the name of a hub data set (``name`` or
            ``owner/name``).
        split: of a hub data set; files have one alone.
        columns: what is where.

    Raises:
        DataError: the library is not installed, nothing can be read there, or a column is missing.
    """

    def __init__(self, path: str, split: str = "train", columns: ColumnsConfig | None = None) -> None:
        self.columns = columns or ColumnsConfig()
        self.path, self.name = path, PurePosixPath(path.split("://")[-1]).name.split(".")[0] or path
        self._rows = _load(path, split)
        if len(self._rows) == 0:
            raise DataError(f"{path} has no rows.")
        for column in (self.columns.image, self.columns.answer, self.columns.question, self.columns.id):
            if column is not None and column not in self._rows.column_names:
                raise DataError(f"{path}: {unknown('column', column, self._rows.column_names)} Name it in `columns`.")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        columns, row = self.columns, self._row(index)
        try:
            answer = _text(row, columns.answer)
            question = None if columns.question is None else _text(row, columns.question)
            pictures = [] if columns.image is None else _pictures(row[columns.image], columns.image)
            images = [load_image(picture) for picture in pictures]
        except DataError as error:
            raise DataError(f"{self.path}, row {index}: {error}") from error
        if not images and question is None:
            raise DataError(
                f"{self.path}, row {index}: there is neither a picture nor a question. Name them in `columns`."
            )
        name = str(index if columns.id is None else row[columns.id])
        return Example(name, conversation(question, answer, len(images)), images)

    def _row(self, index: int) -> Mapping[str, Any]:
        try:
            row: Mapping[str, Any] = self._rows[index]
        except UnicodeDecodeError as error:
            start = error.object[error.start : error.start + 1].hex()
            raise DataError(
                f"{self.path}, row {index}: one of its texts is not UTF-8 (byte {error.start + 1}, 0x{start}). Write it as "
                "UTF-8, or remove the row."
            ) from None
        except (ValueError, OSError) as error:
            raise DataError(
                f"{self.path}, row {index} cannot be read ({_reason(error)}). Mend or remove the row."
            ) from error
        return row

    def fingerprint(self) -> str:
        # the library's own, over the files' addresses, sizes and times
        return str(self._rows._fingerprint)


def _load(path: str, split: str) -> Any:
    """A `datasets.Dataset` whose pictures stay encoded."""
    try:
        import datasets
    except ImportError as error:
        raise DataError('Tables need the package datasets: pip install "ett-tuning[tables]".') from error
    builder = BUILDERS.get(PurePosixPath(path).suffix)
    far = "://" in path
    if builder is not None and not far and not glob.glob(path):
        raise DataError(f"{path} does not exist. Give a file, a pattern, an address or the name of a hub data set.")
    datasets.disable_progress_bars()
    try:
        if builder is not None:
            rows = datasets.load_dataset(builder, data_files=path, split="train")
        else:
            rows = datasets.load_dataset(path, split=split)
    except ImportError as error:
        raise DataError(
            f"{path} needs a package that is not installed ({_reason(error)}). Install it with pip: s3fs for s3://, gcsfs for "
            "gs://, adlfs for az://, or what the message names. Or copy the files to this machine."
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{path} cannot be read ({_reason(error.__cause__ or error)}). Check the name, the split and the format."
        ) from error
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, type(feature)(datasets.Image(decode=False)))
    return rows


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error).strip() else 'no reason given'}"


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{column!r} is not UTF-8 (byte {error.start + 1}).") from None
    if not isinstance(value, str) or not value.strip():
        shown = "empty" if isinstance(value, str) else f"a {type(value).__name__}"
        raise DataError(f"{column!r} is {shown}. It must be text.")
    return value.strip()


def _pictures(value: Any, column: str) -> list[bytes]:
    found = []
    for each in value if isinstance(value, list) else [value]:
        content = each.get("bytes") if isinstance(each, Mapping) else each
        if not isinstance(content, bytes):
            # a path in somebody else's table could name any file of this machine
            raise DataError(
                f"{column!r} holds no picture's bytes. Tables bring pictures; paths in them are not followed."
            )
        found.append(content)
    return found


def files_of(path: str) -> list[Place]:
    """The files that `path` names; none for hub data sets.

    Raises:
        DataError: an address cannot be listed. BrokenSource: it does not answer.
    """
    if is_address(path):
        return named(path)
    return [Path(each) for each in sorted(glob.glob(path))] if PurePosixPath(path).suffix in BUILDERS else []
