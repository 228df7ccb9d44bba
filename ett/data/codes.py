"""A code cache: frozen stages read the indices of a picture instead of encoding it each time it is drawn.

A cache is a folder of shards (`ett.data.code_shards`). Their metadata name everything that indices depend on: the tokenizer (a
hash of its configuration and every weight), its precision, the pictures' size and how they are fitted to it, Pillow's version,
and the source: its settings, and a hash of what its files hold. A cache in which one of them is not what it is now is refused,
by name.

Indices are `VisionTokenizer.tokenize`'s. A picture that is encoded in another batch, on other threads or another device is
rounded otherwise, so that an index may differ where two codes are as good as equal: see `MARGIN`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch.utils.data import DataLoader, Dataset

from ett.config import to_mapping
from ett.data.code_shards import CodedExample, CodeShard, text_of, write_shard
from ett.data.mixture import Mixture, SourceConfig
from ett.data.places import is_address
from ett.data.sources import Source
from ett.data.workers import begin_worker
from ett.errors import DataError, UserError
from ett.model.processing import EttImageProcessor
from ett.tokenizers import VisionTokenizer
from ett.types import Example

MARGIN = {"float32": 5e-4, "bfloat16": 1e-1}
"""A cached index is the one that encoding anew gives, unless the feature z lies closer to the border between the two codes than
``MARGIN[precision]`` times the root mean square of |z|: as far as rounding in the encoder can move it. With dot-product logits
that distance is the margin of the top two, ``(l_a - l_b) / |e_a - e_b|``. Features on CPU are off by up to 2e-4 of it in
float32 (median 1e-6 to 1e-5), by 3e-2 in bfloat16 (7e-3). Not measured: CUDA, which rounds float32 convolutions to TF32."""

SHARD_EXAMPLES = 1024
"""Examples in a shard, and about as many that each process can lose when it is killed."""
PROBED_EXAMPLES = 3
"""First examples of a source whose words and pixels are part of its hash: they tell when code or libraries draw otherwise."""


class CodeCache:
    """The shards in a folder, for one tokenizer and one way of preparing pictures.

    Args:
        folder: may exist or not; made when something is written.
        tokenizer: frozen from here on; put into evaluation mode, and used on the device where it lies.
        images: prepares its pictures.

    Raises:
        DataError: a shard that is damaged, or was made with something else than is given here.
    """

    def __init__(self, folder: str | Path, tokenizer: VisionTokenizer, images: EttImageProcessor) -> None:
        self.folder, self.tokenizer, self.images = Path(folder), tokenizer.eval(), images
        self.key = {
            "vision tokenizer": tokenizer_hash(tokenizer),
            "precision": str(tokenizer.precision),
            "image_size": f"{images.height} x {images.width}",
            "image_mode": str(images.mode),
            "Pillow": PIL.__version__,
        }
        self._contents: dict[str, str] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look at what is in the folder now."""
        self._shards = [CodeShard(path) for path in sorted(self.folder.glob("*.safetensors"))]
        for shard in self._shards:
            self._check(shard, self.key)

    def missing(self, configs: Sequence[SourceConfig], mixture: Mixture, draws: int) -> list[np.ndarray]:
        """For each source of `mixture`, int64: which examples of its first `draws` draws are not cached yet, each once.

        Args:
            configs: what the sources of `mixture` were built from.
        """
        done: dict[str, np.ndarray] = {}
        found = []
        for config, source, wanted in zip(configs, mixture.sources, mixture.drawn(draws), strict=True):
            # two entries of a mixture may be one source
            settings = _settings(config)
            cached = done[settings] if settings in done else self._table(config, source).positions
            found.append(np.setdiff1d(wanted, cached, assume_unique=True))
            done[settings] = np.union1d(cached, wanted)
        return found

    def fill(
        self, config: SourceConfig, source: Source, positions: np.ndarray, *, batch_size: int, num_workers: int = 0
    ) -> Generator[int]:
        """Encode examples; yields after each batch how many it held. What is done is written, however this ends.

        Args:
            config: what `source` was built from.
            positions: int64, of examples of `source`; several processes each take their own.
            batch_size: examples that are read, and pictures that are encoded, at a time.
            num_workers: processes that read pictures; 0 does it here.

        Raises:
            DataError: an example that cannot be read, or a folder that cannot be written.
        """
        loader: DataLoader[Any] = DataLoader(
            _Pictures(source, self.images),
            batch_sampler=[positions[i : i + batch_size].tolist() for i in range(0, len(positions), batch_size)],
            collate_fn=list,
            num_workers=num_workers,
            worker_init_fn=begin_worker,
            generator=torch.Generator(),
        )
        done: list[CodedExample] = []
        try:
            for items in loader:
                done += self._encode(items, batch_size)
                if len(done) >= SHARD_EXAMPLES:
                    full, done = done, []
                    self._write(config, source, full)
                yield len(items)
        finally:
            if done:
                self._write(config, source, done)

    def mixture(self, configs: Sequence[SourceConfig], mixture: Mixture) -> Mixture:
        """`mixture` with pictures as indices: the same example at each draw, or an error where it is not cached."""
        sources = [
            CodedSource(source, self.folder, self._table(config, source))
            for config, source in zip(configs, mixture.sources, strict=True)
        ]
        return Mixture(sources, [config.weight for config in configs], mixture.seed)

    def _encode(self, items: Sequence[_Prepared | UserError], batch_size: int) -> list[CodedExample]:
        prepared: list[_Prepared] = []
        for item in items:
            if isinstance(item, UserError):
                raise item
            prepared.append(item)
        pixels = [pixel for each in prepared for pixel in each.pixel_values]
        side, device = self.tokenizer.downsample, self.tokenizer.encoder_output.device
        dtype = np.uint16 if self.tokenizer.codebook_size <= 2**16 else np.int32
        found = [np.zeros((0, self.images.height // side, self.images.width // side), dtype)]
        for start in range(0, len(pixels), batch_size):
            batch = torch.from_numpy(np.stack(pixels[start : start + batch_size])).to(device)
            found.append(self.tokenizer.tokenize(batch).cpu().numpy().astype(dtype))
        ends = np.cumsum([len(each.pixel_values) for each in prepared])[:-1]
        parts = np.split(np.concatenate(found), ends)
        return [CodedExample(each.position, each.text, own) for each, own in zip(prepared, parts, strict=True)]

    def _write(self, config: SourceConfig, source: Source, examples: Sequence[CodedExample]) -> None:
        settings = _settings(config)
        metadata = {**self.key, "source": settings, "content": self._content(settings, source)}
        # named by what is in it: of the same examples, encoded by two runs at once, one file stays
        named = json.dumps([settings, [each.position for each in examples]])
        name = hashlib.sha256(named.encode()).hexdigest()[:16]
        write_shard(self.folder / f"{name}.safetensors", examples, metadata)

    def _table(self, config: SourceConfig, source: Source) -> _Table:
        settings = _settings(config)
        own = [shard for shard in self._shards if shard.metadata["source"] == settings]
        for shard in own:
            self._check(shard, {"content": self._content(settings, source)}, f" of {config.path or source.name}")
        return _Table.of(own)

    def _check(self, shard: CodeShard, wanted: Mapping[str, str], of: str = "") -> None:
        """Raises DataError where a shard's metadata are not the wanted ones."""
        stored = {name: shard.metadata.get(name, "unknown") for name in wanted}
        told = [
            f"{name}{of} ({stored[name][:12]}, now {wanted[name][:12]})"
            for name in wanted
            if stored[name] != wanted[name]
        ]
        if told:
            raise DataError(
                f"The code cache {self.folder} is stale: it was made with another {', another '.join(told)}. Delete it, and "
                "pictures are encoded anew, or set cached_codes to another folder."
            )

    def _content(self, settings: str, source: Source) -> str:
        """A hash of what settings alone do not fix."""
        if settings not in self._contents:
            digest = hashlib.sha256()
            for position in range(min(PROBED_EXAMPLES, len(source))):
                example = source[position]
                digest.update(text_of(example))
                for image in example.images:
                    digest.update(self.images.fit(image)[0].tobytes())
            digest.update(source.fingerprint().encode())
            self._contents[settings] = digest.hexdigest()
        return self._contents[settings]


class CodedSource(Source):
    """The examples of a source with indices from a cache in place of pictures; as long, and in the same order.

    Args:
        source: whose examples are cached. folder, table: where they are.
    """

    def __init__(self, source: Source, folder: Path, table: _Table) -> None:
        self.name, self._length = source.name, len(source)
        self._folder, self._table = folder, table

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        """Raises DataError where the example is not in the cache, or damaged."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        table = self._table
        at = int(np.searchsorted(table.positions, index))
        if at == len(table.positions) or table.positions[at] != index:
            raise DataError(f"The code cache {self._folder} lacks example {index} of {self.name!r}. Fill it first.")
        return table.shards[table.owners[at]].example(int(table.rows[at]))


def tokenizer_hash(tokenizer: VisionTokenizer) -> str:
    """SHA-256 of a tokenizer's configuration and every weight, wherever they lie."""
    digest = hashlib.sha256(json.dumps(tokenizer.config_mapping(), sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Table:
    """Where a source's cached examples lie: positions int64[E], ascending; of each its shard (owners) and row, int64[E]."""

    shards: Sequence[CodeShard]
    positions: np.ndarray
    owners: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, shards: Sequence[CodeShard]) -> _Table:
        none = np.zeros(0, np.int64)
        positions = np.concatenate([none, *(each.positions for each in shards)])
        owners = np.concatenate([none, *(np.full(len(each.positions), k) for k, each in enumerate(shards))])
        rows = np.concatenate([none, *(np.arange(len(each.positions)) for each in shards)])
        unique, first = np.unique(positions, return_index=True)
        return cls(shards, unique, owners[first], rows[first])


@dataclass(frozen=True)
class _Prepared:
    """An example on its way to the encoder; pixel_values: float32[3, H, W] each."""

    position: int
    text: bytes
    pixel_values: list[np.ndarray]


class _Pictures(Dataset[_Prepared | UserError]):
    """Position -> prepared example; an unusable one as its error, as `EncodedDraws` does."""

    def __init__(self, source: Source, images: EttImageProcessor) -> None:
        self.source, self.images = source, images

    def __getitem__(self, position: int) -> _Prepared | UserError:
        try:
            example = self.source[position]
            return _Prepared(position, text_of(example), [self.images.fit(image)[0] for image in example.images])
        except UserError as error:
            return error


def _settings(config: SourceConfig) -> str:
    """What tells sources apart: every setting but the share in a mixture."""
    settings = to_mapping(config)
    del settings["weight"]
    for name in ("path", "image_root"):
        if settings[name] and not is_address(settings[name]):
            settings[name] = os.path.realpath(settings[name])
    return json.dumps(settings, sort_keys=True)
