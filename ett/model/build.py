"""A model from a recipe's description: parts by path, by name or from configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ett.config import require, to_mapping
from ett.errors import ModelError, RecipeError
from ett.images import FitMode
from ett.losses.joint import LossConfig
from ett.model.configuration import EttConfig, VisualInput
from ett.model.ett import EttForConditionalGeneration
from ett.model.processing import EttImageProcessor, EttProcessor
from ett.model.projector import ProjectorConfig
from ett.model.smollm2 import NAME as SMOLLM2
from ett.model.smollm2 import prepare_smollm2
from ett.model.text import CHAT_TEMPLATES, add_image_token, byte_tokenizer
from ett.tokenizers import VisionTokenizer
from ett.tokenizers.base import channels_last

SHIPPED_WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
"""Small trained parts that come with the package."""


@dataclass(frozen=True)
class LanguageModelSpec:
    """Any causal language model of transformers.

    Attributes:
        path: a folder, a hub id, or "smollm2" (SmolLM2-135M-Instruct from its Python package); or
        config: a configuration with ``model_type``, for a model with fresh weights.
        text_tokenizer: a folder or hub id, or "bytes"; null takes the one beside the language model, "bytes" for a config.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    text_tokenizer: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise RecipeError("model.language_model needs either a path or a config, not both and not neither.")
        if self.config is not None and "model_type" not in self.config:
            raise RecipeError('model.language_model.config needs a model_type, for example "llama" or "qwen2".')


@dataclass(frozen=True)
class ModelSpec:
    """What a recipe says about the model.

    Attributes:
        init: a saved model to start from; the other fields then only override its settings where a stage allows it.
        image_size: H and W [pixels], or one number for both.
        image_mode: how pictures are fitted to it.
        vision_tokenizer: ``{path: DIR}`` or a configuration (``tokenizer_type``, default "ibq", and its fields).
        language_model: null where only the tokenizer is trained.
        visual_input: "embedding" (ETT) or "index"; index_init: the table as a copy of the codebook, or from N(0, 1).
        chat_template: "lm" (the language model's own) or "plain" (captioning format, no roles), or a Jinja template.
        lora: keyword arguments of ``peft.LoraConfig``; null trains all weights.
        losses: weights that the saved model carries.
    """

    image_size: int | tuple[int, int] = 256
    image_mode: FitMode = "pad"
    init: str | None = None
    vision_tokenizer: dict[str, Any] = field(default_factory=dict)
    language_model: LanguageModelSpec | None = None
    projector: ProjectorConfig = ProjectorConfig()
    visual_input: VisualInput = "embedding"
    index_init: Literal["codebook", "random"] = "codebook"
    chat_template: str = "lm"
    lora: dict[str, Any] | None = None
    losses: LossConfig = LossConfig()

    def __post_init__(self) -> None:
        require(min(self.size) >= 1, "image_size", self.image_size, "at least 1")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) [pixels]."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


def build_vision_tokenizer(spec: ModelSpec) -> VisionTokenizer:
    """The recipe's tokenizer, loaded or with fresh weights from the global random state.

    Raises:
        RecipeError: an unknown key or a size that the tokenizer cannot divide. ModelError: a path without a tokenizer.
    """
    if "path" in spec.vision_tokenizer:
        extra = sorted(set(spec.vision_tokenizer) - {"path"})
        if extra:
            raise RecipeError(f"model.vision_tokenizer has a path, so it cannot set {', '.join(extra)} as well.")
        tokenizer = load_vision_tokenizer(find_weights(spec.vision_tokenizer["path"]))
    else:
        tokenizer = VisionTokenizer.from_config(spec.vision_tokenizer, "model.vision_tokenizer")
    num_positions(tokenizer, spec.projector.merge_size, spec.size)
    return tokenizer


def find_weights(path: str | Path) -> Path:
    """The folder at `path`, or the shipped weights of that name.

    Raises:
        ModelError: neither exists.
    """
    given = Path(path)
    if given.is_dir():
        return given
    shipped = SHIPPED_WEIGHTS / str(path)
    if str(path) == given.name and shipped.is_dir():
        return shipped
    known = sorted(p.name for p in SHIPPED_WEIGHTS.iterdir() if p.is_dir()) if SHIPPED_WEIGHTS.is_dir() else []
    raise ModelError(
        f"There is no folder {str(path)!r}. Give a saved model's or tokenizer's, or a shipped one: {', '.join(known)}."
    )


def load_vision_tokenizer(directory: Path) -> VisionTokenizer:
    """A tokenizer from its own folder or out of a saved model's."""
    if is_saved_model(directory):
        tokenizer = EttForConditionalGeneration.from_pretrained(directory).vision_tokenizer
        assert isinstance(tokenizer, VisionTokenizer)
        return tokenizer
    return VisionTokenizer.from_pretrained(directory)


def is_saved_model(directory: Path) -> bool:
    """Whether `directory` holds a complete model (`EttForConditionalGeneration`), not a tokenizer alone."""
    return (directory / "processor_config.json").is_file()


def num_positions(tokenizer: VisionTokenizer, merge_size: int, size: tuple[int, int]) -> int:
    """Visual positions that a picture of (H, W) pixels takes in the sequence.

    Raises:
        RecipeError: H or W is not a multiple of downsample * merge_size.
    """
    step = tokenizer.downsample * merge_size
    height, width = size
    if height % step or width % step:
        raise RecipeError(
            f"model.image_size = {height} x {width} must be a multiple of {step} (downsampling {tokenizer.downsample} times "
            f"projector.merge_size {merge_size})."
        )
    return (height // step) * (width // step)


def load_language_model(spec: LanguageModelSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(causal LM in float32, its text tokenizer).

    Raises:
        ModelError: nothing usable at the path. RecipeError: a configuration that transformers refuses.
    """
    if spec.config is not None:
        try:
            config = AutoConfig.for_model(**spec.config)
            model = AutoModelForCausalLM.from_config(config)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"model.language_model.config is not usable: {error}") from error
        return model.float(), _text_tokenizer(spec.text_tokenizer or "bytes")
    assert spec.path is not None
    path = str(prepare_smollm2()) if spec.path == SMOLLM2 else spec.path
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ModelError(f"There is no causal language model at {spec.path!r}: {_first_line(error)}") from error
    return loaded, _text_tokenizer(spec.text_tokenizer or path)


def _text_tokenizer(name: str) -> PreTrainedTokenizerBase:
    if name == "bytes":
        return byte_tokenizer()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"There is no text tokenizer at {name!r}: {_first_line(error)}") from error
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def build_processor(
    spec: ModelSpec, text_tokenizer: PreTrainedTokenizerBase, vision_tokenizer: VisionTokenizer
) -> EttProcessor:
    """The processor that goes with a model built from `spec`."""
    height, width = spec.size
    template = None if spec.chat_template == "lm" else CHAT_TEMPLATES.get(spec.chat_template, spec.chat_template)
    return EttProcessor(
        EttImageProcessor(height, width, spec.image_mode),
        text_tokenizer,
        num_image_positions=num_positions(vision_tokenizer, spec.projector.merge_size, spec.size),
        chat_template=template,
    )


def build_model(spec: ModelSpec, vision_tokenizer: VisionTokenizer) -> tuple[EttForConditionalGeneration, EttProcessor]:
    """The model around `vision_tokenizer`, in float32, and its processor."""
    if spec.language_model is None:
        raise RecipeError("This stage trains through a language model: the recipe needs model.language_model.")
    language_model, text_tokenizer = load_language_model(spec.language_model)
    image_token_id = add_image_token(text_tokenizer)
    config = EttConfig(
        projector=to_mapping(spec.projector),
        losses=to_mapping(spec.losses),
        visual_input=spec.visual_input,
        image_token_id=image_token_id,
        lora=spec.lora,
    )
    model = EttForConditionalGeneration.from_parts(config, vision_tokenizer, language_model)
    if spec.visual_input == "index" and spec.index_init == "random":
        assert model.index_embedding is not None
        nn.init.normal_(model.index_embedding.weight)
    return model, build_processor(spec, text_tokenizer, vision_tokenizer)


def load_model(directory: Path) -> tuple[EttForConditionalGeneration, EttProcessor]:
    """A saved model in evaluation mode, and its processor.

    Raises:
        ModelError: no model there, a damaged file, or weights that do not fit the configuration.
    """
    if not is_saved_model(directory):
        raise ModelError(f"{directory} holds no model saved by ett (it has no processor_config.json).")
    try:
        loaded: Any = EttForConditionalGeneration.from_pretrained(
            # tensors of another shape are reported below, with the rest, and never used
            directory,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        model, report = cast(tuple[EttForConditionalGeneration, dict[str, Any]], loaded)
        processor = EttProcessor.from_pretrained(directory)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"The model in {directory} cannot be loaded: {_first_line(error)}") from error
    reshaped = [key[0] if isinstance(key, tuple) else str(key) for key in report["mismatched_keys"]]
    wrong = sorted([*report["missing_keys"], *report["unexpected_keys"], *reshaped])
    if wrong:
        raise ModelError(
            f"The weights in {directory} belong to another architecture: {len(wrong)} tensors do not fit "
            f"({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''})."
        )
    channels_last(model.vision_tokenizer)
    return model.eval(), processor
