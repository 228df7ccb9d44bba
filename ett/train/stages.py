"""The stages of the paper (docs/method.md): what each trains, on which loss, and the proof that the rest stays still."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ett.config import require
from ett.data.mixture import SourceConfig
from ett.errors import ModelError, RecipeError
from ett.losses.adversarial import DiscriminatorConfig
from ett.losses.joint import LossConfig
from ett.model.ett import EttForConditionalGeneration
from ett.model.lora import is_lora_parameter
from ett.tokenizers import VisionTokenizer
from ett.train.balance import BalanceConfig
from ett.train.checkpoint import random_state, restore_random_state
from ett.train.health import HealthConfig
from ett.train.measures import tokenizer_probes
from ett.train.objectives import run_model
from ett.train.optim import OptimizerConfig
from ett.types import Batch

StageName = Literal["tokenizer", "align", "semantic", "chat", "gen", "joint", "decoder"]
PartName = Literal["vision_tokenizer", "projector", "language_model", "image_head"]

_TRAINS: dict[str, tuple[PartName, ...]] = {
    "tokenizer": ("vision_tokenizer",),
    "align": ("projector",),
    "semantic": ("vision_tokenizer", "projector", "language_model"),
    "chat": ("projector", "language_model"),
    "gen": ("projector", "language_model", "image_head"),
    "joint": ("projector", "language_model", "image_head"),
    # of it the decoder alone, see `train_decoder`
    "decoder": ("vision_tokenizer",),
}
DRAWING: tuple[StageName, ...] = ("gen", "joint")
"""Stages that learn to draw."""
CACHEABLE: tuple[StageName, ...] = ("align", "chat", *DRAWING)
"""Stages that may read a code cache. "semantic" never does, not even an arm that freezes the tokenizer: what arms are compared
by must not depend on the road that pictures take."""


@dataclass(frozen=True)
class StageConfig:
    """One stage of a recipe.

    Attributes:
        stage: "tokenizer" (stage 0, L_vq), "align" (projector, L_cap), "semantic" (everything, L_cap + alpha L_vq),
            "chat" (projector and language model, L_cap on instructions), "gen" (projector, language model and image head,
            cross-entropy of image tokens), "joint" (the same parts, both losses) or "decoder" (the vision tokenizer's decoder
            alone, L_vq of codes that stay: what a stage changed can be mended for the eye and stays for the language model).
        steps: optimizer steps, >= 1.
        batch_size: examples per step over all ranks and accumulated micro-batches.
        micro_batch_size: examples per forward on one rank; null takes as many as fit the batch size.
        optimizer: learning rates and schedule.
        losses: weights; null takes the paper's. alpha counts only where the vision tokenizer trains: it is 0 elsewhere.
        trains: parts to train instead of the stage's own, for controls such as a frozen tokenizer.
        data: mixture; null takes the recipe's.
        max_length: positions after which a conversation is cut; null keeps all.
        validate_every: steps between validations; null validates at the end alone.
        log_every: steps between log lines.
        checkpoint_every: steps between checkpoints; null saves at the end of the stage and on interruption alone.
        ends_with: "last", or "best": the weights whose validation had the lowest loss (needs `validate_every`).
        quantize_after: steps of the tokenizer stage in which the decoder reads the features themselves; then k-means over the
            features places the codes, and quantization begins. 0 quantizes from the start, with the codebook as it is.
        discriminator: of the adversarial term, where `losses.adversarial_weight` is above 0.
        ema_decay: average the weights that train with this decay, in [0, 1); the average is validated and is what the stage
            ends with. null ends with the weights themselves.
        gradient_checkpointing: trade compute for memory in the language model.
        packing: put conversations of a micro-batch into rows that are as long as the longest, as many as fit: less padding, the
            same losses. For stages whose language model reads.
        compile: `torch.compile` for the language model's layers, and encoder and decoder of our own CNN.
        balance: alpha follows the gradients instead of staying `losses.tokenizer_weight`, which is where it starts; null
            fixes it.
        health: how the tokenizer is watched while it trains, and what a collapse or a non-finite loss does.
        cached_codes: true encodes every picture once, before the first step, and trains on the indices (`ett.data.codes`); they
            are dropped with the end of the stage. A path keeps them in that folder, for other runs too. For "align",
            "chat", "gen" and "joint" with a frozen tokenizer alone.
        drop_prompt: share of the pictures to be drawn, in [0, 1], that are learned without their words: what guidance
            compares with.
    """

    stage: StageName
    steps: int
    batch_size: int
    micro_batch_size: int | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    losses: LossConfig | None = None
    trains: tuple[PartName, ...] | None = None
    data: tuple[SourceConfig, ...] | None = None
    max_length: int | None = None
    validate_every: int | None = None
    log_every: int = 10
    checkpoint_every: int | None = 200
    ends_with: Literal["last", "best"] = "last"
    quantize_after: int = 0
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    ema_decay: float | None = None
    gradient_checkpointing: bool = False
    packing: bool = False
    compile: bool = False
    balance: BalanceConfig | None = None
    health: HealthConfig = HealthConfig()
    cached_codes: bool | str = False
    drop_prompt: float = 0.1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("micro_batch_size", "max_length", "validate_every", "checkpoint_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1, or null")
        require(
            self.ends_with == "last" or self.validate_every is not None,
            "validate_every",
            None,
            'set with ends_with "best"',
        )
        require(0 <= self.quantize_after < self.steps, "quantize_after", self.quantize_after, "at least 0, below steps")
        if self.quantize_after and self.stage != "tokenizer":
            raise RecipeError(
                "quantize_after belongs to the tokenizer stage: only there may a codebook be placed anew."
            )
        require(self.ema_decay is None or 0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1), or null")
        require(0 <= self.drop_prompt <= 1, "drop_prompt", self.drop_prompt, "in [0, 1]")
        if self.stage in DRAWING and "vision_tokenizer" in self.parts:
            raise RecipeError(
                f"The {self.stage} stage predicts the vision tokenizer's indices, so the tokenizer must stay as it is. Leave "
                "vision_tokenizer out of `trains`."
            )
        if self.stage not in DRAWING and self.losses is not None and self.losses.image_noise > 0:
            raise RecipeError(
                f"losses.image_noise is for pictures that are drawn, in the stages {' and '.join(DRAWING)}. Leave it out."
            )
        if self.stage not in DRAWING and "image_head" in self.parts:
            raise RecipeError(f"Only the stages {' and '.join(DRAWING)} train an image head; take it out of `trains`.")
        if self.trains is not None:
            require(len(self.trains) >= 1, "trains", self.trains, "a non-empty list of parts")
            if self.stage == "tokenizer" and self.trains != ("vision_tokenizer",):
                raise RecipeError(
                    "The tokenizer stage trains the vision tokenizer and nothing else; leave `trains` out."
                )
        if self.balance is not None and (self.stage != "semantic" or self.loss_config.tokenizer_weight == 0):
            raise RecipeError(
                "balance moves alpha between two losses: it belongs to the semantic stage, with the vision tokenizer trained "
                "and losses.tokenizer_weight above 0."
            )
        if self.packing and self.stage in ("tokenizer", "decoder"):
            raise RecipeError(
                f"packing is for conversations, and the {self.stage} stage reads pictures alone. Leave it out."
            )
        if self.packing and (self.micro_batch_size or self.batch_size) == 1:
            raise RecipeError("packing puts several conversations into a row, and a micro-batch has one. Leave it out.")
        if self.data is not None:
            require(len(self.data) >= 1, "data", self.data, "a non-empty list of sources")
        if self.cached_codes and self.loss_config.soft_caption_weight > 0:
            raise RecipeError(
                "losses.soft_caption_weight asks the tokenizer for more than indices, which are all that cached_codes keeps. "
                "Leave one of the two out."
            )
        if self.cached_codes and (self.stage not in CACHEABLE or "vision_tokenizer" in self.parts):
            why = f"trains {', '.join(self.parts)}" if self.stage in CACHEABLE else "reads pictures"
            raise RecipeError(
                f"cached_codes is for the stages {' and '.join(CACHEABLE)} with a frozen vision tokenizer; this {self.stage} "
                f"stage {why}. Leave it out."
            )

    @property
    def parts(self) -> tuple[PartName, ...]:
        """The parts that this stage trains."""
        return self.trains if self.trains is not None else _TRAINS[self.stage]

    @property
    def loss_config(self) -> LossConfig:
        """The weights in force: of what the stage does not learn, 0."""
        given = self.losses or LossConfig()
        if "vision_tokenizer" not in self.parts:
            given = replace(given, tokenizer_weight=0.0)
        if self.stage == "gen":
            return replace(given, caption_weight=0.0)
        return given if self.stage == "joint" else replace(given, image_weight=0.0)

    @property
    def plays(self) -> bool:
        """Whether this stage has a discriminator."""
        return self.loss_config.adversarial_weight > 0 and self.loss_config.tokenizer_weight > 0


def part_of(name: str) -> PartName:
    """The part that a parameter of this dotted name belongs to. The index table is the projector's input, so goes with it."""
    top = name.split(".", 1)[0]
    named: dict[str, PartName] = {
        "vision_tokenizer": "vision_tokenizer",
        "language_model": "language_model",
        "image_head": "image_head",
    }
    return named.get(top, "projector")


def modules_by_part(model: EttForConditionalGeneration) -> dict[str, nn.Module]:
    """The modules whose parameters make up each part; every parameter is in one of them."""
    projector: dict[str, nn.Module] = {"projector": model.projector}
    if model.index_embedding is not None:
        # the name tells the optimizer that this is a table, which does not decay
        projector["index_embedding"] = model.index_embedding
    parts: dict[str, nn.Module] = {
        "vision_tokenizer": model.vision_tokenizer,
        "projector": nn.ModuleDict(projector),
        "language_model": model.language_model,
    }
    if model.image_head is not None:
        parts["image_head"] = model.image_head
    assert {part_of(name) for name, _ in model.named_parameters()} == set(parts)
    return parts


def set_trainable(model: EttForConditionalGeneration, parts: Sequence[PartName], words: bool = True) -> None:
    """Train `parts` and nothing else; of a language model with adapters, the adapters alone; where no `words` are learned, all
    of it but an output layer of its own."""
    has_lora = model.config.lora is not None
    for name, parameter in model.named_parameters():
        part = part_of(name)
        trainable = part in parts
        if part == "language_model" and has_lora:
            trainable = trainable and is_lora_parameter(name)
        parameter.requires_grad_(trainable)
    if not words and not (model.image_head is not None and model.image_head.shares_softmax):
        output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if output.weight is not embedding.weight:
            output.requires_grad_(False)
    _check_trainable(model, parts)


def check_parts(model: EttForConditionalGeneration, config: StageConfig) -> None:
    """Refuse a stage that trains a part which the model has not.

    Raises:
        RecipeError: it learns to draw, and there is no image head.
    """
    if config.stage in DRAWING and model.image_head is None:
        raise RecipeError(
            f"The {config.stage} stage trains an image head, and the model has none. Set model.image_head, for example to "
            "{kind: tied}."
        )


def _check_trainable(model: nn.Module, parts: Sequence[PartName]) -> None:
    found = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found == set(parts), f"declared {sorted(parts)}, but {sorted(found)} would train"


def train_decoder(tokenizer: VisionTokenizer) -> None:
    """Train what turns codebook embeddings into pixels, and nothing else of `tokenizer`: the parameters that `decode` uses."""
    side = tokenizer.downsample
    tokenizer.requires_grad_(True)
    with torch.enable_grad():
        shape = tokenizer.encode(torch.zeros(1, 3, 2 * side, 2 * side, device=tokenizer.encoder_output.device)).shape
        pixels = tokenizer.decode(torch.zeros(shape, device=tokenizer.encoder_output.device))
    parameters = list(tokenizer.parameters())
    reached = torch.autograd.grad(pixels.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, reached, strict=True):
        parameter.requires_grad_(gradient is not None)


def checkpoint_activations(language_model: PreTrainedModel) -> None:
    """Have the layers' activations recomputed on the way back instead of kept."""
    # named anew on the way from transformers 5.17 to 5.23, where the old name warns
    enable = getattr(language_model, "activation_checkpointing_enable", None)
    (enable or language_model.gradient_checkpointing_enable)({"use_reentrant": False})


def train_mode(model: EttForConditionalGeneration, parts: Sequence[PartName]) -> None:
    """Training mode for the parts that train; frozen parts stay in evaluation mode (no dropout, no rank statistics)."""
    model.train()
    model.vision_tokenizer.train("vision_tokenizer" in parts)
    model.language_model.train("language_model" in parts)
    model.projector.train("projector" in parts)
    if model.image_head is not None:
        model.image_head.train("image_head" in parts)


@dataclass(frozen=True)
class Reach:
    """Norm of the gradient of one loss at each probe; 0 where it does not reach.

    Args:
        norms: by probe. vanished: probes that the loss depends on, with a gradient of exactly 0.
    """

    norms: dict[str, float] = field(default_factory=dict)
    vanished: frozenset[str] = frozenset()


def _probes(model: EttForConditionalGeneration) -> Iterator[tuple[str, Tensor]]:
    """One parameter for each place that a stage trains or freezes."""
    yield from tokenizer_probes(model.vision_tokenizer).items()
    yield "projector", next(model.projector.parameters())
    # of an adapter the factor that starts at 0: the other one gets no gradient until this has moved
    adapters = (p for name, p in model.language_model.named_parameters() if ".lora_B" in name)
    yield "language_model", next(adapters, next(model.language_model.parameters()))
    if model.image_head is not None:
        yield "image_head", next(model.image_head.parameters())


def caption_reach(model: EttForConditionalGeneration, batch: Batch, losses: LossConfig) -> Reach:
    """Where the loss of predicted tokens, words and image tokens, of `batch` sends gradient: encoder, codebook, projector,
    language model, image head.

    Model parameters' ``.grad`` are left alone; the model's mode and random state are restored.
    """
    before = random_state()
    probes = [(name, tensor) for name, tensor in _probes(model) if tensor.requires_grad]
    output = run_model(model, batch, replace(losses, tokenizer_weight=0.0))
    assert output.losses is not None
    predicted = [output.losses[name] for name in ("caption_loss", "image_loss") if name in output.losses]
    grads = torch.autograd.grad(torch.stack(predicted).sum(), [tensor for _, tensor in probes], allow_unused=True)
    restore_random_state(before)
    norms = {name: 0.0 for name, _ in _probes(model)}
    for (name, _), grad in zip(probes, grads, strict=True):
        norms[name] = 0.0 if grad is None else float(grad.norm())
    return Reach(
        norms,
        frozenset(name for (name, _), grad in zip(probes, grads, strict=True) if grad is not None and norms[name] == 0),
    )


def check_reach(reach: Reach, stage: StageConfig, visual_input: str) -> None:
    """Assert that the loss of predicted tokens reaches exactly what the stage says it trains.

    Raises:
        AssertionError: a frozen part receives gradient, or a trained one does not.
        ModelError: a part would train, and its gradient is exactly 0: a softmax over codes that has settled on one of them.
    """
    through = stage.loss_config.caption_reaches_tokenizer and visual_input == "embedding"
    tokenizer = "vision_tokenizer" in stage.parts and through
    expected = {
        "encoder": tokenizer,
        "codebook": tokenizer,
        "projector": "projector" in stage.parts,
        "language_model": "language_model" in stage.parts,
        "image_head": "image_head" in stage.parts,
    }
    for name, wanted in expected.items():
        if name in ("codebook", "image_head") and name not in reach.norms:
            continue
        if wanted and name in reach.vanished:
            raise ModelError(_vanished(stage.stage, name))
        assert (reach.norms[name] > 0) == wanted, (
            f"stage {stage.stage}: the loss of tokens {'does not reach' if wanted else 'reaches'} the {name} "
            f"(gradient norms {reach.norms})"
        )


def _vanished(stage: str, part: str) -> str:
    """What to do about a gradient of exactly 0."""
    if part != "encoder":
        return (
            f"Stage {stage}: the gradient of the loss of predicted tokens is exactly 0 at the {part}, so it would not "
            "learn. Are its weights all 0? Start from another model.init."
        )
    return (
        f"Stage {stage}: the caption loss reaches the encoder with a gradient of exactly 0, so captions would not tune the "
        "tokenizer. The index softmax has all of its mass on one code: the codebook has collapsed, or its scale is too "
        "high. `ett tokenizer-report` says how many codes are in use; start from a tokenizer that uses more of them, or raise "
        "model.vision_tokenizer.temperature."
    )
