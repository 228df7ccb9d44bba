"""Reading saved models, tokenizers and language models: complete and undamaged, or one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as TextTokenizer

from ett.errors import ModelError
from ett.model.configuration import EttConfig
from ett.model.ett import EttForConditionalGeneration
from ett.model.processing import EttProcessor
from ett.model.smollm2 import NAME as SMOLLM2
from ett.model.smollm2 import prepare_smollm2
from ett.model.text import OWN_TEXT_TOKENIZERS
from ett.tokenizers import VisionTokenizer
from ett.tokenizers.base import CONFIG_NAME, channels_last

SHIPPED_WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
"""Small trained parts that come with the package."""

T = TypeVar("T")

# What transformers raises for a folder that someone damaged or edited: its readers trust their JSON files and look keys and
# types up as they go. Caught around its loading functions alone.
DAMAGED = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    ZeroDivisionError,
    AssertionError,
    SafetensorError,
    StrictDataclassError,
)


def find_weights(path: object) -> Path:
    """The folder at `path`, or the shipped weights of that name.

    Raises:
        ModelError: neither exists.
    """
    known = sorted(p.name for p in SHIPPED_WEIGHTS.iterdir() if p.is_dir()) if SHIPPED_WEIGHTS.is_dir() else []
    if isinstance(path, str | Path):
        given = Path(path)
        if given.is_dir():
            return given
        if str(path) in known:
            return SHIPPED_WEIGHTS / str(path)
    shown = str(path) if isinstance(path, Path) else path
    raise ModelError(
        f"There is no folder {shown!r}. Give a saved model's or tokenizer's, or a shipped one: {', '.join(known)}."
    )


def is_saved_model(directory: Path) -> bool:
    """Whether `directory` holds a complete model (`EttForConditionalGeneration`), not a tokenizer alone."""
    if (directory / "processor_config.json").is_file():
        return True
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == EttConfig.model_type


def load_vision_tokenizer(directory: Path, *, weights: bool = True) -> VisionTokenizer:
    """A tokenizer from its own folder or out of a saved model's; without `weights`, on the meta device."""
    if not weights:
        return _tokenizer_without_weights(directory)
    if not is_saved_model(directory):
        return VisionTokenizer.from_pretrained(directory)
    tokenizer: VisionTokenizer = load_model(directory)[0].vision_tokenizer
    return tokenizer


def _tokenizer_without_weights(directory: Path) -> VisionTokenizer:
    if is_saved_model(directory):
        mapping = _config_of(directory).vision_tokenizer
    else:
        mapping = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
        mapping.pop("model_type", None)
    with torch.device("meta"):
        return VisionTokenizer.from_config(mapping, str(directory / CONFIG_NAME)).eval()


def _config_of(directory: Path) -> EttConfig:
    return _guarded(f"The model in {directory}", lambda: EttConfig.from_pretrained(directory))


def load_model(directory: Path, *, weights: bool = True) -> tuple[EttForConditionalGeneration, EttProcessor]:
    """A saved model in evaluation mode, and its processor; without `weights`, the model is on the meta device.

    Raises:
        ModelError: no model there, a damaged file, or weights that do not fit the configuration.
    """
    if not (directory / "processor_config.json").is_file():
        raise ModelError(
            f"{directory} has no processor_config.json. Save the processor beside the model (processor.save_pretrained), or "
            "give another folder."
        )
    if weights:
        model = _complete(f"The model in {directory}", EttForConditionalGeneration.from_pretrained, directory)
    else:
        config = _config_of(directory)
        with torch.device("meta"):
            model = EttForConditionalGeneration(config)
    processor: EttProcessor = _guarded(f"The processor in {directory}", lambda: EttProcessor.from_pretrained(directory))
    channels_last(model)
    return model.eval(), processor


def load_language_model(path: str) -> PreTrainedModel:
    """The causal LM at a folder, hub id or "smollm2", in float32, every tensor from the file.

    Raises:
        ModelError: there is none, a file is damaged, or tensors are missing.
    """
    return _complete(
        f"The language model {path!r}",
        AutoModelForCausalLM.from_pretrained,
        language_model_folder(path),
        allow_unexpected=True,
        dtype=torch.float32,
    )


def load_language_config(path: str) -> PreTrainedConfig:
    """Its configuration alone; ModelError as `load_language_model`."""
    config: PreTrainedConfig = _guarded(
        f"The language model {path!r}", lambda: AutoConfig.from_pretrained(language_model_folder(path))
    )
    return config


def load_text_tokenizer(name: str) -> TextTokenizer:
    """The text tokenizer at a folder, hub id, "smollm2", or one of this package's own: "bytes", "names".

    Raises:
        ModelError: there is none.
    """
    if name in OWN_TEXT_TOKENIZERS:
        return OWN_TEXT_TOKENIZERS[name]()
    tokenizer: TextTokenizer = _guarded(
        f"The text tokenizer {name!r}", lambda: AutoTokenizer.from_pretrained(language_model_folder(name))
    )
    return tokenizer


def language_model_folder(path: str) -> str:
    """`path`, or where "smollm2" was prepared (it is prepared now, if need be)."""
    return str(prepare_smollm2()) if path == SMOLLM2 else path


def _complete(
    what: str, from_pretrained: Callable[..., Any], path: object, allow_unexpected: bool = False, **kwargs: Any
) -> Any:
    """Load with transformers and refuse what it would fill with random numbers.

    Public language models carry buffers that newer code computes, hence `allow_unexpected`.
    """
    # tensors of another shape are reported below with the rest, and never used
    loaded = _guarded(
        what, lambda: from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    )
    model, report = cast(tuple[Any, Mapping[str, Any]], loaded)
    reshaped = [key[0] if isinstance(key, tuple) else str(key) for key in report["mismatched_keys"]]
    unexpected = [] if allow_unexpected else report["unexpected_keys"]
    wrong = sorted({*report["missing_keys"], *unexpected, *reshaped})
    if wrong:
        raise ModelError(
            f"{what} holds weights of another architecture, or not all of them: {len(wrong)} tensors do not fit "
            f"({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''})."
        )
    return model


def _guarded(what: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except ModelError:
        raise
    except DAMAGED as error:
        raise ModelError(f"{what} cannot be loaded: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The beginning of a library's message, which may go on for pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
