"""An epoch from tars through a training's own reader: is every example drawn once, also across a resume, and is memory flat?

    python benchmarks/streaming.py                         # 200,000 examples, two loader processes
    python benchmarks/streaming.py --samples 20000 --stop-at 0.3

Tars of 8 x 8 pixels and a caption each are made in a temporary folder. One epoch is read with `ett.train.feed.steps_of`, which
is what `ett train` reads with: draws dealt to loader processes, decoded, encoded, collated. At `--stop-at` of it everything is
thrown away, and a reader made anew from the number of finished steps alone goes on, as `--resume` does. Memory is the
proportional set size (PSS) of this process and its loaders together: pages that forked processes share count once.
"""

from __future__ import annotations

import argparse
import gc
import io
import multiprocessing
import platform
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from accelerate import Accelerator

from ett.data.mixture import SourceConfig, build_mixture
from ett.model.build import ModelSpec, build_processor, build_vision_tokenizer
from ett.model.text import byte_tokenizer
from ett.train.feed import StageData, steps_of
from ett.train.stages import StageConfig

PER_SHARD = 5000
REPORTS = 20
"""Lines printed over an epoch."""
WARM = 0.1
"""Share of the epoch after which memory is held against what it is then."""


@dataclass(frozen=True)
class Reading:
    """At a moment of the epoch: examples read so far, seconds since its beginning, bytes in use."""

    samples: int
    seconds: float
    memory: int


@dataclass(frozen=True)
class Epoch:
    """What came of one.

    Attributes:
        seen: int64[samples], how often each example was read.
        readings: in time; memory of the processes together.
        resumed_at: examples after which the reader was made anew.
    """

    seen: np.ndarray
    readings: list[Reading]
    resumed_at: int

    @property
    def growth(self) -> float:
        """The largest memory after the first `WARM` of the epoch, as a share of what it was then, less 1."""
        warm = [each.memory for each in self.readings if each.samples >= WARM * len(self.seen)]
        return max(warm) / warm[0] - 1


def write_tars(folder: Path, samples: int, per_shard: int = PER_SHARD) -> None:
    """Tars of `per_shard` examples: ``{number}.png``, 8 x 8 pixels of noise, and ``{number}.txt``."""
    rng = np.random.default_rng(0)
    for start in range(0, samples, per_shard):
        with tarfile.open(folder / f"{start // per_shard:05d}.tar", "w") as tar:
            for number in range(start, min(start + per_shard, samples)):
                picture = io.BytesIO()
                PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(picture, "png")
                for extension, content in (("png", picture.getvalue()), ("txt", b"number %d" % number)):
                    member = tarfile.TarInfo(f"{number:09d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def read_epoch(folder: Path, samples: int, batch_size: int, workers: int, stop_at: float) -> Epoch:
    """One epoch of the tars in `folder`, given up after the share `stop_at` of it and taken up again.

    Args:
        samples: in the tars; a multiple of `batch_size`.
    """
    steps = samples // batch_size
    stop, every = max(1, round(stop_at * steps)), max(1, steps // REPORTS)
    seen, readings, started = np.zeros(samples, np.int64), list[Reading](), time.monotonic()
    for first, last in ((0, stop), (stop, steps)):
        # nothing is handed over but the number of steps
        tokenizer = build_vision_tokenizer(ModelSpec(image_size=8, vision_tokenizer=TOKENIZER))
        processor = build_processor(ModelSpec(image_size=8, vision_tokenizer=TOKENIZER), byte_tokenizer(), tokenizer)
        mixture = build_mixture([SourceConfig("shards", path=str(folder))], seed=0, tolerant=True)
        data = StageData(mixture, [], processor, workers)
        config = StageConfig("align", steps, batch_size)
        for step, fed in enumerate(steps_of(data, config, first, Accelerator(cpu=True), lambda: False), first + 1):
            for batch in fed.micro_batches:
                np.add.at(seen, [int(each.rpartition("/")[2]) for each in batch.ids], 1)
            if step % every == 0 or step == last:
                readings.append(Reading(step * batch_size, time.monotonic() - started, memory_in_use()))
                print(
                    f"{step * batch_size:>9,} examples  {readings[-1].seconds:7.1f} s  {readings[-1].memory / 2**20:8.1f} MiB"
                    + f"  {int((seen == 0).sum()):>9,} not seen" * (step in (stop, steps))
                )
            if step == last:
                break
        del data, mixture, fed
        gc.collect()
    return Epoch(seen, readings, stop * batch_size)


TOKENIZER = {"channels": 8, "channel_multipliers": [1, 1], "norm_groups": 8, "z_channels": 8, "codebook_size": 16}


def memory_in_use() -> int:
    """Bytes that this process and its children take, shared ones in equal parts (Linux)."""
    pids = ["self", *(str(child.pid) for child in multiprocessing.active_children())]
    rows = (row.split() for pid in pids for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return sum(1024 * int(row[1]) for row in rows if row[0] == "Pss:")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000, help="a multiple of --batch-size")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--stop-at", type=float, default=0.4, help="share of the epoch after which it is resumed")
    given = parser.parse_args()
    if given.samples % given.batch_size:
        parser.error(f"--samples must be a multiple of --batch-size, {given.batch_size}")
    with tempfile.TemporaryDirectory() as folder:
        write_tars(Path(folder), given.samples)
        print(f"{given.samples:,} examples in tars of {PER_SHARD:,}, {given.workers} workers; {platform.machine()}")
        epoch = read_epoch(Path(folder), given.samples, given.batch_size, given.workers, given.stop_at)
    exactly = "every one once" if (epoch.seen == 1).all() else f"{(epoch.seen != 1).sum():,} NOT once"
    print(f"read {exactly}; resumed after {epoch.resumed_at:,}; memory grew by {epoch.growth:.1%}")


if __name__ == "__main__":
    main()
