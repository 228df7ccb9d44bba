"""Entries as a source: a manifest or shards in which some examples may be unusable, read one by one when they are drawn."""

from __future__ import annotations

from ett.data.entries import MAX_MEMBER_BYTES, Lines, Samples
from ett.data.far import BrokenSource
from ett.data.places import loadable, place
from ett.data.sources import Source
from ett.errors import DataError
from ett.images import load_image
from ett.types import Example


class EntrySource(Source):
    """The examples of a manifest's lines or of shards' samples, in their order.

    Only places are kept (16 bytes a line, about 100 a sample). An example is read, checked and decoded when it is asked for.

    Args:
        entries: where they lie.
        path: as it was given, for messages and the source's name.
        refuse: whether a shard that cannot be read is an error now; otherwise it is left out and stands in `left_out`.

    Raises:
        DataError: a shard that is refused, or no example at all.
    """

    def __init__(self, entries: Lines | Samples, path: str, *, refuse: bool = False) -> None:
        self.name = place(path).name.split(".")[0] or path
        self.left_out = tuple(f"{where}: {error}" for where, error in entries.refused)
        if refuse and self.left_out:
            raise DataError(f"{self.left_out[0]} (max_bad_samples leaves such shards out.)")
        if len(entries) == 0:
            raise DataError(" ".join([f"{path} holds no example that can be read.", *self.left_out[:3]]))
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            entry = self._entries.read(index)
            images = [load_image(loadable(picture, MAX_MEMBER_BYTES)) for picture in entry.pictures]
        except BrokenSource:
            raise
        except DataError as error:
            raise DataError(f"{self._entries.where(index)}: {error}") from error
        return Example(entry.id, entry.messages, images, entry.metadata)

    def fingerprint(self) -> str:
        return self._entries.fingerprint()
