"""The semantic step of the demo's model: ours against the straightforward composition, alternately in one process.

    python benchmarks/training_step.py                  # quickstart, arm ett, from the shipped weights: a minute on one core
    python benchmarks/training_step.py --recipe mine.yaml arm=ett --steps 20 --device cuda

Both sides start from the same weights and take the same steps on the same batches of the recipe's own data: forward, backward,
gradient clipping and AdamW at the recipe's rates, in the same type and threads, nothing compiled. The baseline is what one
writes first: IBQ with an N x K softmax, batches padded to their longest, the logits of every position, PyTorch's own norm,
swish and doubling one after the other, its default layout and optimizer. It comes twice: "encoding once" shares one pass of
encoder and quantizer between both losses, as we do; "encoding twice" puts two finished parts together, a tokenizer whose
forward returns its loss and an encoding of the same pictures for the language model. The share of pictures that is decoded is
the recipe's on all sides. Losses are compared at every step.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor

from ett.data.mixture import build_mixture
from ett.experiments.recipe import load_recipe
from ett.experiments.run import resolve_model_folder
from ett.losses.joint import LossConfig
from ett.model.build import start_from
from ett.model.ett import EttForConditionalGeneration
from ett.model.loading import find_weights
from ett.tokenizers import norm_swish, upsampling
from ett.tokenizers.quantizer import BETA, IndexBackpropagationQuantizer
from ett.train.objectives import JointObjective, Shares
from ett.train.optim import OptimizerConfig, build_optimizer, schedule_factor
from ett.train.stages import set_trainable, train_mode
from ett.types import Batch

Loss = Callable[[Batch], Tensor]


class Straightforward:
    """L_cap + alpha * L_vq as one writes it first, on the same parts.

    Args:
        twice: whether either loss encodes the pictures for itself.
    """

    def __init__(self, model: EttForConditionalGeneration, weights: LossConfig, *, twice: bool) -> None:
        self.model, self.weights, self.twice = model, weights, twice
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()

    def __call__(self, batch: Batch) -> Tensor:
        with patch.object(norm_swish, "FROM_ELEMENTS", math.inf), patch.object(upsampling, "FASTER_FROM", math.inf):
            return self.loss(batch)

    def loss(self, batch: Batch) -> Tensor:
        model, weights = self.model, self.weights
        tokenizer = model.vision_tokenizer
        embeddings, quantization_loss = self.quantize(tokenizer._encode(batch.pixel_values))
        visual = model.projector(embeddings)
        is_image = (batch.input_ids == model.config.image_token_id).unsqueeze(-1)
        text = model.get_input_embeddings()(batch.input_ids.masked_fill(is_image.squeeze(-1), 0))
        output = model.language_model(
            inputs_embeds=text.masked_scatter(is_image, visual),
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            use_cache=False,
        )
        if self.twice:
            embeddings, quantization_loss = self.quantize(tokenizer._encode(batch.pixel_values))
        shown = batch.pixel_values[: math.ceil(weights.reconstruction_share * len(batch.pixel_values))]
        difference = tokenizer._decode(embeddings[: len(shown)]) - shown
        reconstruction = difference.abs().mean() if weights.reconstruction == "l1" else difference.pow(2).mean()
        vq = weights.reconstruction_weight * reconstruction + weights.quantization_weight * quantization_loss
        return weights.caption_weight * output.loss + weights.tokenizer_weight * vq

    def quantize(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(float[B, D, h, w], L_quant) with every N x K matrix held."""
        quantizer = self.model.vision_tokenizer.quantize
        assert isinstance(quantizer, IndexBackpropagationQuantizer)
        codes = quantizer.embedding.weight
        z = features.permute(0, 2, 3, 1).reshape(-1, codes.shape[1])
        logits = z @ codes.T
        if quantizer.distance_unit is not None:
            logits = (2 * logits - codes.pow(2).sum(dim=1)) / quantizer.distance_unit
        p = (logits / quantizer.temperature).softmax(dim=1)
        indices = logits.argmax(dim=1)
        onehot = F.one_hot(indices, len(codes)).to(p.dtype)
        soft, hard = (onehot - p.detach() + p) @ codes, codes[indices]
        loss = F.mse_loss(soft, z) + F.mse_loss(hard.detach(), z) + BETA * F.mse_loss(hard, z.detach())
        batch, _, height, width = features.shape
        return soft.view(batch, height, width, -1).permute(0, 3, 1, 2), loss


class Side:
    """One of them: its copy of the model, its loss, its optimizer."""

    def __init__(
        self, loss: Loss, model: EttForConditionalGeneration, optimizer: torch.optim.Optimizer, max_norm: float
    ) -> None:
        self.loss, self.model, self.optimizer, self.max_norm = loss, model, optimizer, max_norm
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def step(self, batch: Batch, factor: float) -> tuple[float, float, float]:
        """(loss, seconds, seconds of CPU time) of a step at `factor` of the peak learning rates."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        _wait(batch)
        started, busy = time.perf_counter(), time.process_time()
        loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        _wait(batch)
        return float(loss.detach()), time.perf_counter() - started, time.process_time() - busy


def _wait(batch: Batch) -> None:
    if batch.input_ids.is_cuda:
        torch.cuda.synchronize()


def sides(
    model: EttForConditionalGeneration, parts: dict[str, torch.nn.Module], weights: LossConfig, config: OptimizerConfig
) -> dict[str, Side]:
    """Ours, and the straightforward composition in both forms, each on a copy of the model."""
    max_norm = config.max_grad_norm or math.inf
    optimizer = build_optimizer(parts, config)
    rates = {group["part"]: group["peak_lr"] for group in optimizer.param_groups}
    objective = JointObjective(model)

    def ours(batch: Batch) -> Tensor:
        loss: Tensor = objective(batch, weights, Shares(float(batch.num_supervised), 1.0)).loss
        return loss

    def straightforward(*, twice: bool) -> Side:
        plain = copy.deepcopy(model)
        groups = [{"params": getattr(plain, part).parameters(), "lr": rate} for part, rate in rates.items()]
        default = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
        return Side(Straightforward(plain, weights, twice=twice), plain, default, max_norm)

    return {
        "encoding once": straightforward(twice=False),
        "encoding twice": straightforward(twice=True),
        "ours": Side(ours, model, optimizer, max_norm),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=["quickstart", "arm=ett"], help="with overrides")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe[0], arguments.recipe[1:])
    stage = recipe.stages[-1]
    if stage.stage != "semantic" or recipe.model.init is None or stage.loss_config.entropy_weight > 0:
        raise SystemExit(
            "Give a recipe that starts from a saved model, whose last stage is semantic, without entropy term."
        )
    torch.manual_seed(0)
    model, processor = start_from(resolve_model_folder(find_weights(recipe.model.init)), recipe.model)
    model = model.to(arguments.device)
    set_trainable(model, stage.parts)
    train_mode(model, stage.parts)
    mixture = build_mixture(stage.data or recipe.data, recipe.seed)
    parts = {"vision_tokenizer": model.vision_tokenizer, "projector": model.projector}
    both = sides(model, {**parts, "language_model": model.language_model}, stage.loss_config, stage.optimizer)
    print(
        f"{recipe.name}: batches of {stage.batch_size}, float32, {torch.get_num_threads()} threads, {arguments.device}, "
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}"
    )
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in both}
    orders = list(itertools.permutations(both))
    for step in range(arguments.steps + 1):
        draws = range(step * stage.batch_size, (step + 1) * stage.batch_size)
        batch = processor.collate([processor.encode(mixture[draw]) for draw in draws])
        batch = batch.to(torch.device(arguments.device))
        # every order as often: who comes first finds the machine's caches full of another's
        for name in orders[step % len(orders)]:
            found[name].append(both[name].step(batch, schedule_factor(stage.optimizer, step, stage.steps)))
    ours = found.pop("ours")
    for name, steps in {"ours": ours, **found}.items():
        seconds = [each[1] for each in steps[1:]]  # the first one warms up
        print(
            f"{name:<16} median {statistics.median(seconds):7.3f} s a step (min {min(seconds):.3f}, max {max(seconds):.3f}), "
            f"{stage.batch_size / statistics.median(seconds):6.1f} samples/s, CPU time "
            f"{statistics.median(each[2] for each in steps[1:]):.3f} s, last loss {steps[-1][0]:.5f}"
        )
    for name, steps in found.items():
        for label, column in (("time", 1), ("CPU time", 2)):
            ratios = [b[column] / a[column] for a, b in zip(ours[1:], steps[1:], strict=True)]
            shown = f"{statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})"
            print(f"{name} / ours, {label}: {shown}")
        apart = [abs(a[0] - b[0]) for a, b in zip(ours, steps, strict=True)]
        each = ", ".join(f"{difference:.0e}" for difference in apart)
        print(f"{name}: losses apart by at most {max(apart):.1e} over {len(apart)} steps ({each})")


if __name__ == "__main__":
    main()
