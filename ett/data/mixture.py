"""A weighted mixture of sources in an order that is a pure function of (seed, draw number).

Draw n of a run is always the same example, whatever worker, process or resumed run asks for it, so the state of the loader
is one number: how many draws were made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler

from ett.config import require
from ett.data.artwork import ArtworkFacts, ArtworkNames, ArtworkQuestions
from ett.data.drawing import PROMPT, Drawings, without_prompt
from ett.data.drawn_scenes import DrawnScenes
from ett.data.drawn_text import DrawnText
from ett.data.entries import Lines, Samples
from ett.data.entry_source import EntrySource
from ett.data.far import BrokenSource
from ett.data.manifest import Manifest
from ett.data.moved import Moved
from ett.data.places import shard_paths
from ett.data.sources import Source
from ett.data.table import ColumnsConfig, TableSource
from ett.errors import DataError, RecipeError, UserError
from ett.model.processing import Encoded, EttProcessor
from ett.types import Example

BLOCK = 1000
"""Draws within which every source gets its share, to whole draws."""

MAX_BLOCK = 100_000
"""The block where a source's share of a smaller one is less than a draw."""

GOLDEN_RATIO = 0.6180339887498949

STAND_INS = 100
"""Examples that are tried in place of one that cannot be used, before the source is taken to be beyond use."""

SourceName = Literal["names", "questions", "facts", "drawn_text", "drawn_scenes", "manifest", "shards", "table"]
STORED = ("manifest", "shards", "table")
"""Sources that lie somewhere; they have no splits of their own."""


@dataclass(frozen=True)
class SourceConfig:
    """One ingredient of a mixture.

    Attributes:
        source: "names" and "questions" (built-in artwork), "facts" (questions about its names, without pictures), "drawn_text"
            and "drawn_scenes" (built-in), "manifest" (a JSONL file), "shards" (WebDataset tars), "table" (Parquet and others,
            or a hub data set).
        weight: share relative to the other sources', > 0.
        split: of a built-in source or a hub data set.
        path: of the manifest, of one tar, of a folder of tars, a pattern (``shards/train-*.tar``) or numbers in braces
            (``train-{000..039}.tar``); relative to the working directory, or an address that `fsspec` knows. Of a table also a
            hub name (`TableSource`).
        columns: of a table.
        image_root: a folder outside the manifest's whose pictures may be read; null allows none.
        limit: use only the first so many examples; null uses all.
        difficulty: of drawn text, in [0, 1].
        kinds: of drawn text, among "word", "number", "letters", "document".
        spelled: drawn text's answer letter by letter ("c a t").
        characters: of drawn text, (fewest, most) in a string; null takes the difficulty's.
        lines: of a drawn document, (fewest, most).
        asked: share of a built-in source's examples, in [0, 1], that keep their question; of the others the picture alone
            stands before the answer, as before a caption.
        size: side of drawn pictures [pixels].
        short_answers: of drawn scenes, a question about one shape and a short answer instead of the whole description; of drawn
            text, one about its first or last character.
        seed: of drawn text and scenes.
        versions: of names, how often each picture comes: as it is, and otherwise smaller, moved or mirrored (`Moved`).
        draws: the picture is the answer, to what `prompt` says of it: for the stages "gen" and "joint".
        prompt: what is asked for; ``{answer}`` stands for the answer that the source gives, other names in braces for its
            metadata (of names: ``{style}``, ``{group}`` ...).
    """

    source: SourceName
    weight: float = 1.0
    split: str = "train"
    path: str | None = None
    columns: ColumnsConfig = ColumnsConfig()
    image_root: str | None = None
    limit: int | None = None
    difficulty: float = 0.5
    kinds: tuple[Literal["word", "number", "letters", "document"], ...] = ("word", "number", "letters")
    spelled: bool = False
    characters: tuple[int, int] | None = None
    lines: tuple[int, int] = (2, 4)
    asked: float = 1.0
    size: int = 96
    short_answers: bool = False
    seed: int = 0
    versions: int = 1
    draws: bool = False
    prompt: str = PROMPT

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", self.weight, "above 0")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1, or null")
        require(0 <= self.difficulty <= 1, "difficulty", self.difficulty, "in [0, 1]")
        require(len(self.kinds) >= 1, "kinds", self.kinds, "a non-empty list")
        require(0 <= self.asked <= 1, "asked", self.asked, "in [0, 1]")
        require(self.size >= 16, "size", self.size, "at least 16")
        if (self.path is None) == (self.source in STORED):
            needs = "needs a path" if self.path is None else "is built in and has no path"
            raise RecipeError(f"A {self.source} source {needs}; got path = {self.path!r}.")
        if self.short_answers and (self.source not in ("drawn_scenes", "drawn_text") or self.draws):
            raise RecipeError(
                "short_answers is for drawn_scenes and drawn_text that are read, not drawn. Leave it out."
            )
        if self.short_answers and self.asked < 1:
            raise RecipeError(f"short_answers answer a question: leave asked at 1, not {self.asked}.")
        require(self.versions >= 1, "versions", self.versions, "at least 1")
        if self.versions > 1 and self.source != "names":
            raise RecipeError(f"versions are of names, not of {self.source}. Leave it out.")
        if self.source != "manifest" and self.image_root is not None:
            raise RecipeError("image_root is for manifests; other sources bring their pictures. Leave it out.")

    def with_split(self, split: str, *, tolerant: bool = False) -> Source:
        """The source itself, for another split.

        Args:
            tolerant: what cannot be used is found out when it is drawn, not now.
        """
        source = self._read(split, tolerant)
        return Drawings(source, self.prompt) if self.draws else source

    def _read(self, split: str, tolerant: bool) -> Source:
        source: Source
        if self.source == "manifest":
            assert self.path is not None
            if not tolerant:
                return Manifest(self.path, limit=self.limit, image_root=self.image_root)
            return EntrySource(Lines(self.path, limit=self.limit, image_root=self.image_root), self.path)
        if self.source == "shards":
            assert self.path is not None
            paths, folder = shard_paths(self.path)
            source = EntrySource(Samples(paths, folder=folder), self.path, refuse=not tolerant)
            return Limited.of(source, self.limit)
        if self.source == "table":
            assert self.path is not None
            return Limited.of(TableSource(self.path, split, self.columns), self.limit)
        if self.source == "drawn_text":
            source = DrawnText(
                split,
                size=self.size,
                difficulty=self.difficulty,
                kinds=self.kinds,
                spelled=self.spelled,
                characters=self.characters,
                lines=self.lines,
                short_answers=self.short_answers,
                seed=self.seed,
            )
        elif self.source == "drawn_scenes":
            source = DrawnScenes(split, size=self.size, short_answers=self.short_answers, seed=self.seed)
        else:
            artwork = {"names": ArtworkNames, "questions": ArtworkQuestions, "facts": ArtworkFacts}
            source = artwork[self.source](split)
            if self.versions > 1 and split == "train":
                source = Moved(source, self.versions)
        return Limited.of(source if self.asked == 1 else PartlyAsked(source, self.asked), self.limit)

    def build(self, *, tolerant: bool = False) -> Source:
        """The source for this configuration's own split."""
        return self.with_split(self.split, tolerant=tolerant)


class Limited(Source):
    """The first `limit` examples of a source."""

    def __init__(self, source: Source, limit: int) -> None:
        self.name, self.left_out = source.name, source.left_out
        self._source = source
        self._length = min(limit, len(source))

    @staticmethod
    def of(source: Source, limit: int | None) -> Source:
        return source if limit is None else Limited(source, limit)

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._source[index]


class PartlyAsked(Source):
    """A source whose examples ask in `share` of the cases, chosen by position, and show the picture alone in the others."""

    def __init__(self, source: Source, share: float) -> None:
        self.name = source.name
        self._source = source
        self._share = share

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        # neighbouring positions fall far apart (the golden ratio's multiples), so every stretch holds the share
        if (index * GOLDEN_RATIO) % 1.0 < self._share:
            return example
        answers = [message for message in example.messages if message["role"] == "assistant"]
        picture = {"role": "user", "content": [{"type": "image"} for _ in example.images]}
        return replace(example, messages=(picture, answers[0]))


class Mixture:
    """Draw number n -> example.

    Each block of `BLOCK` draws holds every source in its share, to whole draws, in an order shuffled by the seed; each source
    is walked epoch by epoch, every epoch a new permutation. Where a share is less than a draw, blocks are ten times as long, up
    to `MAX_BLOCK`.

    Args:
        tolerant: an example that cannot be used is skipped, and another of its source stands in.

    Raises:
        DataError: a source without examples.
        RecipeError: no source, or weights and sources differ in number, or a share below one draw in `MAX_BLOCK`.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], seed: int, *, tolerant: bool = False
    ) -> None:
        if not sources or len(sources) != len(weights):
            raise RecipeError("A mixture needs at least one source, and a weight for each.")
        for source in sources:
            if len(source) == 0:
                raise DataError(f"The source {source.name!r} holds no examples.")
        self.sources = list(sources)
        self.block = _block_length(weights, [source.name for source in sources])
        self.counts = _apportion(weights, self.block)
        self.seed, self.tolerant = seed, tolerant
        self._block_order = lru_cache(maxsize=4)(self._shuffled_block)
        self._permutation = lru_cache(maxsize=2 * len(self.sources))(self._shuffled_source)

    def __getitem__(self, draw: int) -> Example:
        """Example of draw number `draw` >= 0."""
        source, index = self.locate(draw)
        return self.sources[source][index]

    def locate(self, draw: int) -> tuple[int, int]:
        """(which source, which of its examples) of draw number `draw`."""
        block, position = divmod(draw, self.block)
        owners, ranks = self._block_order(block)
        source = int(owners[position])
        turn = block * self.counts[source] + int(ranks[position])
        epoch, step = divmod(turn, len(self.sources[source]))
        return source, int(self._permutation(source, epoch)[step])

    def candidates(self, draw: int) -> Iterator[tuple[int, int]]:
        """`locate`, then the examples of the same source that stand in for it one after another, all from the seed."""
        source, index = self.locate(draw)
        yield source, index
        for turn in range(STAND_INS if self.tolerant else 0):
            generator = np.random.default_rng([self.seed, 2, draw, turn])
            yield source, int(generator.integers(len(self.sources[source])))

    def drawn(self, stop: int) -> list[np.ndarray]:
        """Which examples of each source the draws [0, `stop`) take: int64, ascending, each once."""
        blocks, rest = divmod(stop, self.block)
        owners = self._block_order(blocks)[0][:rest]
        found = []
        for source, count in enumerate(self.counts):
            turns = blocks * count + int((owners == source).sum())
            # the first epoch takes no example twice; after it, all were taken
            found.append(np.sort(self._permutation(source, 0)[:turns]))
        return found

    def _shuffled_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source of each draw, how many draws of that source came before it in the block), int64[self.block] each."""
        owners = np.repeat(np.arange(len(self.sources)), self.counts)
        np.random.default_rng([self.seed, 0, block]).shuffle(owners)
        ranks = np.zeros_like(owners)
        for source in range(len(self.sources)):
            mine = owners == source
            ranks[mine] = np.arange(int(mine.sum()))
        return owners, ranks

    def _shuffled_source(self, source: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 1, source, epoch]).permutation(len(self.sources[source]))

    def __getstate__(self) -> dict[str, object]:
        # caches hold bound methods; a worker makes its own
        kept = ("sources", "block", "counts", "seed", "tolerant")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._block_order = lru_cache(maxsize=4)(self._shuffled_block)
        self._permutation = lru_cache(maxsize=2 * len(self.sources))(self._shuffled_source)


def build_mixture(configs: Sequence[SourceConfig], seed: int, *, tolerant: bool = False) -> Mixture:
    """The mixture that a recipe describes; everything that can be checked without decoding pictures is checked here, unless it
    is `tolerant`."""
    sources = [config.build(tolerant=tolerant) for config in configs]
    return Mixture(sources, [config.weight for config in configs], seed, tolerant=tolerant)


class Skipped(NamedTuple):
    """An example that could not be used: number of its source in the mixture, its position there, and why."""

    source: int
    position: int
    reason: str


class Drawn(NamedTuple):
    """What a draw gives, and what was skipped on the way to it."""

    item: Encoded
    skipped: tuple[Skipped, ...]


def encode_draw(
    mixture: Mixture, draw: int, processor: EttProcessor, max_length: int | None, drop_prompt: float = 0.0
) -> Drawn:
    """Draw number `draw`, encoded; of pictures to be drawn, the share `drop_prompt` comes without words.

    Raises:
        DataError: it cannot be used; where the mixture is tolerant, nor can any of `STAND_INS` others.
        BrokenSource: data that were there are out of reach, or changed; no mixture tolerates that.
    """
    skipped: list[Skipped] = []
    for source, index in mixture.candidates(draw):
        try:
            example = without_prompt(mixture.sources[source][index], drop_prompt, mixture.seed, draw)
            item = processor.encode(example, max_length)
        except BrokenSource:
            raise
        except DataError as error:
            if not mixture.tolerant:
                raise
            skipped.append(Skipped(source, index, str(error)))
        else:
            return Drawn(item, tuple(skipped))
    raise DataError(
        f"Source {mixture.sources[skipped[0].source].name!r}: {len(skipped)} examples in a row cannot be used. The first: "
        f"{skipped[0].reason} `ett data check` lists them all."
    )


class EncodedDraws(Dataset[Drawn | UserError]):
    """Draw number -> encoded example, for a `DataLoader`. An unusable example is returned as its error: raised in a worker,
    it would reach the user wrapped in the worker's stack trace."""

    def __init__(
        self, mixture: Mixture, processor: EttProcessor, max_length: int | None, drop_prompt: float = 0.0
    ) -> None:
        self.mixture, self.processor, self.max_length = mixture, processor, max_length
        self.drop_prompt = drop_prompt

    def __getitem__(self, draw: int) -> Drawn | UserError:
        try:
            return encode_draw(self.mixture, draw, self.processor, self.max_length, self.drop_prompt)
        except UserError as error:
            return error


class DrawSampler(Sampler[list[int]]):
    """The draw numbers of this rank's micro-batches, from step `start` to `stop`.

    Step s of the whole job makes draws ``[s * global_batch, (s + 1) * global_batch)``; its micro-batches are dealt to the
    ranks in order, ``accumulation`` of them to each.
    """

    def __init__(
        self, start: int, stop: int, micro_batch: int, accumulation: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.start, self.stop = start, stop
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        per_step = self.micro_batch * self.accumulation * self.world_size
        for step in range(self.start, self.stop):
            for turn in range(self.accumulation):
                first = step * per_step + (turn * self.world_size + self.rank) * self.micro_batch
                yield list(range(first, first + self.micro_batch))

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation


def _block_length(weights: Sequence[float], names: Sequence[str]) -> int:
    """Draws in a block, so that each source's share of them is at least one."""
    smallest = min(weights) / sum(weights)
    block = BLOCK
    # 0.001 of weights that add up to 1 but for rounding is a draw of 1000
    while not smallest * block >= 1 - 1e-9:
        block *= 10
        if block > MAX_BLOCK:
            raise RecipeError(
                f"The source {names[list(weights).index(min(weights))]!r} has a share of {smallest:.2g} of the draws; at least "
                f"1/{MAX_BLOCK} is possible. Give it more weight, or leave it out."
            )
    return block


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole shares of `total` in proportion to `weights`, each at least 1 (largest remainders)."""
    share = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    counts = np.maximum(np.floor(share).astype(int), 1)
    while counts.sum() < total:
        counts[int(np.argmax(share - counts))] += 1
    while counts.sum() > total:
        counts[int(np.argmax(counts))] -= 1
    return [int(count) for count in counts]
