"""End-to-end vision tokenizer tuning: train a vision tokenizer through a language model (ETT, arXiv 2505.10562).

Public names are imported when first used, so that ``import ett`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "EttCollator": "ett.data.collate",
    "EttConfig": "ett.model",
    "EttForConditionalGeneration": "ett.model",
    "EttImageProcessor": "ett.model",
    "EttProcessor": "ett.model",
    "IBQConfig": "ett.tokenizers",
    "IBQTokenizer": "ett.tokenizers",
    "IndexBackpropagationQuantizer": "ett.tokenizers",
    "Manifest": "ett.data.manifest",
    "VisionTokenizer": "ett.tokenizers",
    "UserError": "ett.errors",
    "answer": "ett.generate.chat",
    "load_image": "ett.images",
    "load_model": "ett.experiments.run",
    "load_recipe": "ett.experiments.recipe",
    "train_recipe": "ett.experiments.run",
}

__all__ = ["__version__", *sorted(_NAMES)]  # noqa: PLE0604  # names of `_NAMES`, strings all

if TYPE_CHECKING:
    # ruff: noqa: F401  # what a type checker sees behind __getattr__
    from ett.data.collate import EttCollator
    from ett.data.manifest import Manifest
    from ett.errors import UserError
    from ett.experiments.recipe import load_recipe
    from ett.experiments.run import load_model, train_recipe
    from ett.generate.chat import answer
    from ett.images import load_image
    from ett.model import EttConfig, EttForConditionalGeneration, EttImageProcessor, EttProcessor
    from ett.tokenizers import IBQConfig, IBQTokenizer, IndexBackpropagationQuantizer, VisionTokenizer


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'ett' has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return __all__
