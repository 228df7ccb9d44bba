"""What a frozen stage reads, with indices in place of pictures."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from ett.data.codes import CodeCache
from ett.data.mixture import Mixture, SourceConfig
from ett.errors import DataError
from ett.model.processing import Encoded
from ett.signals import noted_signals
from ett.tokenizers import VisionTokenizer
from ett.train.feed import StageData, split_batch
from ett.train.log import RunLog
from ett.train.loop import Interrupted
from ett.train.stages import StageConfig

MEETING = 16
"""Batches of codes after which processes wait for each other."""


def cached_data(
    data: StageData,
    configs: Sequence[SourceConfig],
    config: StageConfig,
    name: str,
    tokenizer: VisionTokenizer,
    folder: Path,
    accelerator: Accelerator,
    log: RunLog,
) -> StageData:
    """`data` with every picture that the stage draws as indices, encoded first where the cache in `folder` lacks them.

    Processes share the work, and read the folder together afterwards. Random states are left alone.

    Args:
        configs: what the sources of ``data.mixture`` were built from.
        config, name: of the stage. tokenizer: its frozen one, moved to the accelerator's device.

    Raises:
        DataError: a stale or damaged cache, a picture that cannot be read, or processes that do not share the folder.
        Interrupted: SIGINT or SIGTERM came; what was encoded is kept.
    """
    tokenizer = tokenizer.to(accelerator.device)
    cache = CodeCache(folder, tokenizer, data.processor.image_processor)
    draws = config.steps * config.batch_size
    # one process's view: another run may write to the folder meanwhile
    (missing,) = broadcast_object_list([cache.missing(configs, data.mixture, draws)])
    if any(map(len, missing)):
        batch_size = split_batch(config, accelerator.num_processes)[0]
        _fill(cache, configs, data.mixture, missing, name, batch_size, data.num_workers, accelerator, log)
        cache.refresh()
        if any(map(len, cache.missing(configs, data.mixture, draws))):
            raise DataError(f"{folder} lacks codes that another process has written: all must reach the same folder.")
    validation = [_coded(item, tokenizer) for item in data.validation]
    return replace(data, mixture=cache.mixture(configs, data.mixture), validation=validation)


def _fill(
    cache: CodeCache,
    configs: Sequence[SourceConfig],
    mixture: Mixture,
    missing: Sequence[np.ndarray],
    name: str,
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
    log: RunLog,
) -> None:
    rank, world = accelerator.process_index, accelerator.num_processes
    own = [np.array_split(positions, world)[rank] for positions in missing]
    largest = [-(-len(positions) // world) for positions in missing]
    meeting = 1 if world == 1 else MEETING
    done, total = 0, sum(map(len, own))
    bar = tqdm(
        total=total,
        desc=f"{name}: codes",
        unit="example",
        disable=None if accelerator.is_main_process else True,
        dynamic_ncols=True,
    )
    with noted_signals(second_one_stops=True) as received, bar:
        for config, source, positions, most in zip(configs, mixture.sources, own, largest, strict=True):
            filling = cache.fill(config, source, positions, batch_size=batch_size, num_workers=num_workers)
            # shares differ by one example at most: so many batches has the largest
            turns = -(-most // batch_size)
            with closing(filling):
                for turn in range(1, turns + 1):
                    count = next(filling, 0)
                    if count:
                        done += count
                        bar.update(count)
                        log.encoding(name, done, total)
                    if turn % meeting == 0 and turn < turns:
                        _meet(received, accelerator)
            # what is left over is written as the generator is closed: only then may another read the folder
            if turns:
                _meet(received, accelerator)


def _meet(received: Sequence[int], accelerator: Accelerator) -> None:
    """One that is ahead waits here, never long, and a signal to any of them stops all."""
    stopped = torch.tensor(float(bool(received)), device=accelerator.device)
    if bool(accelerator.reduce(stopped) > 0):
        raise Interrupted(0, received[0] if received else signal.SIGTERM)


def _coded(item: Encoded, tokenizer: VisionTokenizer) -> Encoded:
    if not item.pixel_values:
        return item
    pixels = torch.from_numpy(np.stack(item.pixel_values)).to(tokenizer.encoder_output.device)
    return replace(item, pixel_values=[], image_indices=list(tokenizer.tokenize(pixels).cpu().numpy()))
