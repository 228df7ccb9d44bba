"""A model from a recipe's description: parts by path, by name or from configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ett.config import require, to_mapping
from ett.errors import ModelError, RecipeError, unknown
from ett.images import FitMode
from ett.model.configuration import EttConfig, VisualInput
from ett.model.ett import EttForConditionalGeneration
from ett.model.image_head import ImageHeadConfig, check_drawable
from ett.model.loading import (
    DAMAGED,
    find_weights,
    first_line,
    load_language_config,
    load_language_model,
    load_model,
    load_text_tokenizer,
    load_vision_tokenizer,
)
from ett.model.lora import inject_lora
from ett.model.processing import EttImageProcessor, EttProcessor
from ett.model.projector import ProjectorConfig
from ett.model.text import CHAT_TEMPLATES, IMAGE_TOKEN, add_image_token
from ett.tokenizers import VisionTokenizer
from ett.types import IGNORE_INDEX, Message


@dataclass(frozen=True)
class LanguageModelSpec:
    """Any causal language model of transformers.

    Attributes:
        path: a folder, a hub id, or "smollm2" (SmolLM2-135M-Instruct from its Python package); or
        config: a configuration with ``model_type``, for a model with fresh weights.
        text_tokenizer: a folder or hub id, "bytes" or "names" (words of the built-in names); null takes the one beside the
            language model, "bytes" for a config.
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
        init: a saved model or a run's folder to start from. It brings its parts; visual_input, lora, image_head,
            chat_template and settings of its vision tokenizer can be set beside it, anything else is an error.
        image_size: H and W [pixels], or one number for both.
        image_mode: how pictures are fitted to it.
        vision_tokenizer: ``{path: DIR}``, a saved tokenizer or model (in a recipe also a run's folder), or a configuration
            (``tokenizer_type``, default "ibq", and its fields). Fields beside `path`, or beside `init`, change the saved
            tokenizer's settings as far as its weights allow: its temperature, say, or a smaller codebook_size, whose codes are
            merged from the saved ones.
        language_model: null where only the tokenizer is trained.
        visual_input: "embedding" (ETT) or "index"; index_init: the table as a copy of the codebook, or from N(0, 1).
        chat_template: "lm" (the language model's own) or "plain" (captioning format, no roles), or a Jinja template.
        lora: keyword arguments of ``peft.LoraConfig``; null trains all weights.
        image_head: what predicts image tokens, for the stages "gen" and "joint"; null for a model that only reads.
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
    image_head: ImageHeadConfig | None = None

    def __post_init__(self) -> None:
        require(min(self.size) >= 1, "image_size", self.image_size, "at least 1")
        if self.init is not None:
            given = self.language_model is not None
            self.refuse_beside_init(("vision_tokenizer", "path" in self.vision_tokenizer), ("language_model", given))

    def refuse_beside_init(self, *described: tuple[str, bool]) -> None:
        """Refuse parts that `init` brings, of those (name, whether it is described here as well)."""
        if refused := [f"model.{name}" for name, wrong in described if wrong]:
            raise RecipeError(
                f"model.init = {self.init!r} brings its own {', '.join(refused)}. Leave it out, or start without: "
                "model.init=null."
            )

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) [pixels]."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


def build_vision_tokenizer(spec: ModelSpec, *, weights: bool = True) -> VisionTokenizer:
    """The recipe's tokenizer, loaded or with fresh weights from the global random state; without `weights`, from its
    configuration alone and on the meta device.

    Raises:
        RecipeError: an unknown key or a size that the tokenizer cannot divide. ModelError: a path without a tokenizer.
    """
    if "path" in spec.vision_tokenizer:
        changes = {name: value for name, value in spec.vision_tokenizer.items() if name != "path"}
        tokenizer = load_vision_tokenizer(find_weights(spec.vision_tokenizer["path"]), weights=weights)
        if changes:
            tokenizer = tokenizer.reconfigured(changes, "model.vision_tokenizer")
    else:
        with torch.device("cpu" if weights else "meta"):
            tokenizer = VisionTokenizer.from_config(spec.vision_tokenizer, "model.vision_tokenizer")
    num_positions(tokenizer, spec.projector.merge_size, spec.size, spec.projector.row_ends)
    return tokenizer


def num_positions(tokenizer: VisionTokenizer, merge_size: int, size: tuple[int, int], row_ends: bool = False) -> int:
    """Visual positions that a picture of (H, W) pixels takes in the sequence, the ends of its rows included.

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
    return (height // step) * (width // step + row_ends)


def parts_of(spec: LanguageModelSpec, *, weights: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(causal LM in float32, its text tokenizer); without `weights`, the LM is on the meta device.

    Raises:
        ModelError: nothing usable at the path. RecipeError: a configuration that transformers refuses, or a vocabulary too
            small for the text tokenizer.
    """
    tokenizer = load_text_tokenizer(spec.text_tokenizer or spec.path or "bytes")
    if spec.path is not None and weights:
        model = load_language_model(spec.path)
    else:
        config = load_language_config(spec.path) if spec.path is not None else _config_of(spec)
        try:
            with torch.device("cpu" if weights else "meta"):
                model = AutoModelForCausalLM.from_config(config).float()
        except DAMAGED as error:
            raise RecipeError(f"model.language_model cannot be built: {first_line(error)}") from error
    largest = max(token_id for token, token_id in tokenizer.get_vocab().items() if token != IMAGE_TOKEN)
    vocabulary = cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if largest >= vocabulary:
        raise RecipeError(
            f"The text tokenizer has token ids up to {largest}, the language model's vocabulary {vocabulary} entries. Choose "
            f"vocab_size >= {largest + 1}, or the tokenizer that belongs to the model."
        )
    return model, tokenizer


def _config_of(spec: LanguageModelSpec) -> PreTrainedConfig:
    assert spec.config is not None
    try:
        config: PreTrainedConfig = AutoConfig.for_model(**spec.config)
    except DAMAGED as error:
        raise RecipeError(f"model.language_model.config is not usable: {first_line(error)}") from error
    return config


def build_processor(
    spec: ModelSpec, text_tokenizer: PreTrainedTokenizerBase, vision_tokenizer: VisionTokenizer
) -> EttProcessor:
    """The processor that goes with a model built from `spec`.

    Raises:
        RecipeError: a chat template that cannot be used.
    """
    height, width = spec.size
    processor = EttProcessor(
        EttImageProcessor(height, width, spec.image_mode),
        text_tokenizer,
        num_image_positions=num_positions(
            vision_tokenizer, spec.projector.merge_size, spec.size, spec.projector.row_ends
        ),
        positions_per_row=_positions_per_row(spec, vision_tokenizer),
        chat_template=_template(spec.chat_template),
        draws=spec.image_head is not None,
    )
    check_template(processor)
    return processor


def _positions_per_row(spec: ModelSpec, tokenizer: VisionTokenizer) -> int:
    """Where rows have ends, the positions of one, its end included; else 0."""
    step = tokenizer.downsample * spec.projector.merge_size
    return spec.size[1] // step + 1 if spec.projector.row_ends else 0


def _template(given: str) -> str | None:
    if given == "lm":
        return None
    if given not in CHAT_TEMPLATES and "{{" not in given and "{%" not in given:
        raise RecipeError(unknown("value for model.chat_template:", given, ["lm", *CHAT_TEMPLATES, "a Jinja template"]))
    return CHAT_TEMPLATES.get(given, given)


def check_template(processor: EttProcessor) -> None:
    """Render a probe conversation: the picture, the question, the answer and what ends it must all be there.

    Raises:
        RecipeError: they are not, or the template is no Jinja.
    """
    question: list[dict[str, str]] = [{"type": "image"}, {"type": "text", "text": "question"}]
    probe: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": "answer"}]
    try:
        ids, labels = processor.tokenize_conversation(probe)
    except (TemplateError, ModelError) as error:
        raise RecipeError(f"model.chat_template cannot be used: {first_line(error)}") from error
    supervised = [label for label in labels if label != IGNORE_INDEX]
    text = str(processor.tokenizer.decode([i for i in ids if i != processor.image_token_id]))
    if ids.count(processor.image_token_id) != processor.num_image_positions or "question" not in text or not supervised:
        raise RecipeError(
            "model.chat_template leaves out the picture, the question or the answer. It must render all three."
        )
    if str(processor.tokenizer.decode(supervised)).strip() == "answer":
        raise RecipeError(
            "Nothing ends an answer: the text tokenizer has no end-of-sequence token, or the chat template does not write it. "
            "The model would never learn to stop."
        )


def build_model(
    spec: ModelSpec, vision_tokenizer: VisionTokenizer, *, weights: bool = True
) -> tuple[EttForConditionalGeneration, EttProcessor]:
    """The model around `vision_tokenizer`, in float32, and its processor.

    `weights=False` builds it on the meta device, to find out whether it can be built.
    """
    if spec.language_model is None:
        raise RecipeError("This stage trains through a language model: the recipe needs model.language_model.")
    language_model, text_tokenizer = parts_of(spec.language_model, weights=weights)
    config = EttConfig(
        projector=to_mapping(spec.projector),
        visual_input=spec.visual_input,
        image_token_id=add_image_token(text_tokenizer),
        lora=spec.lora,
        image_head=None if spec.image_head is None else to_mapping(spec.image_head),
    )
    with torch.device("cpu" if weights else "meta"):
        model = EttForConditionalGeneration.from_parts(config, vision_tokenizer, language_model)
    if spec.visual_input == "index" and spec.index_init == "random":
        assert model.index_embedding is not None
        nn.init.normal_(model.index_embedding.weight)
    return model, build_processor(spec, text_tokenizer, vision_tokenizer)


def check_model(spec: ModelSpec) -> None:
    """Find out, without loading weights, whether the recipe's model can be built.

    Raises:
        UserError: why not.
    """
    if spec.init is not None:
        find_weights(spec.init)
        return
    # a folder is read to the end: its weights may be damaged
    tokenizer = build_vision_tokenizer(spec, weights="path" in spec.vision_tokenizer)
    if spec.language_model is not None:
        build_model(spec, tokenizer.to("meta"), weights=False)


def start_from(
    directory: Path, spec: ModelSpec, *, weights: bool = True
) -> tuple[EttForConditionalGeneration, EttProcessor]:
    """A saved model as the start of a run, with the recipe's visual input, adapters and chat template.

    `weights=False` reads its configuration alone and builds it on the meta device.

    Raises:
        RecipeError: the recipe also describes parts that the saved model already has.
        ModelError: the model cannot be loaded, or reads indices where the recipe says embeddings.
    """
    model, processor = load_model(directory, weights=weights)
    images = processor.image_processor
    spec.refuse_beside_init(
        ("image_size", spec.size not in ((256, 256), (images.height, images.width))),
        ("image_mode", spec.image_mode not in ("pad", images.mode)),
        ("projector", spec.projector not in (ProjectorConfig(), model.config.projector_config)),
        ("lora", None not in (spec.lora, model.config.lora) and spec.lora != model.config.lora),
        (
            "image_head",
            None not in (spec.image_head, model.config.image_head)
            and spec.image_head != model.config.image_head_config,
        ),
    )
    if spec.vision_tokenizer:
        model.vision_tokenizer = model.vision_tokenizer.reconfigured(spec.vision_tokenizer, "model.vision_tokenizer")
        model.config.vision_tokenizer = model.vision_tokenizer.config_mapping()
    if spec.visual_input == "embedding" and model.index_embedding is not None:
        raise ModelError(f"The model in {directory} reads indices; set model.visual_input: index in the recipe.")
    if spec.visual_input == "index" and model.index_embedding is None:
        model.config.visual_input = "index"
        codes = model.vision_tokenizer.quantize.codebook.detach().clone()
        model.index_embedding = nn.Embedding.from_pretrained(codes, freeze=False)
        if spec.index_init == "random":
            nn.init.normal_(model.index_embedding.weight)
    if spec.lora is not None and model.config.lora is None:
        model.config.lora = spec.lora
        with torch.device("cpu" if weights else "meta"):
            inject_lora(model.language_model, spec.lora)
    if spec.image_head is not None and model.image_head is None:
        check_drawable(model.config.projector_config)
        model.config.image_head, processor.draws = to_mapping(spec.image_head), True
        with torch.device("cpu" if weights else "meta"):
            model.add_image_head()
    if spec.chat_template != "lm":
        processor.chat_template = _template(spec.chat_template)
        check_template(processor)
    return model, processor
