"""What judges reconstructions beside the pixels: a perceptual network that is frozen, a discriminator that learns.

They belong to the stage, not to the model: a saved model carries neither, and a foreign trainer sees the model's own loss.
The same two serve stage 0 and the alpha * L_vq of the semantic stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ett.losses.adversarial import DiscriminatorConfig, LeCam, PatchDiscriminator, discriminator_hinge, generator_loss
from ett.losses.joint import LossConfig
from ett.losses.perceptual import load_perceptual
from ett.tokenizers import VisionTokenizer
from ett.train.inheritance import Inheritance, save_discriminator
from ett.train.objectives import Losses
from ett.train.teacher import Teacher


class Critics:
    """The perceptual, the adversarial and the distillation term of L_vq, and the discriminator's own steps.

    Args:
        losses: weights; a term of weight 0 is not made.
        config: of the discriminator.
        learning_rate: of the discriminator where its configuration names none.
        accelerator: its device, and how many processes there are.
        tokenizer: that trains, as its stage found it; for distillation alone.
        inherited: the discriminator that came with the tokenizer; None starts a fresh one.

    Attributes:
        inherited: whether the discriminator came with the tokenizer, which then hears it from the first step.

    Raises:
        ModelError: the perceptual network's package is not installed.
        RecipeError: the discriminator that came has another shape than `config` says.
    """

    def __init__(
        self,
        losses: LossConfig,
        config: DiscriminatorConfig,
        learning_rate: float,
        accelerator: Accelerator,
        tokenizer: VisionTokenizer | None = None,
        inherited: Inheritance | None = None,
    ) -> None:
        self.losses, self.config, self.accelerator = losses, config, accelerator
        self.inherited = False
        self.perceptual: nn.Module | None = None
        self.discriminator: PatchDiscriminator | None = None
        self.teacher: Teacher | None = None
        if losses.distillation_weight > 0:
            assert tokenizer is not None, "distillation needs the tokenizer that it holds on to"
            self.teacher = Teacher(tokenizer, losses.reconstruction)
        if losses.perceptual is not None and losses.perceptual_weight > 0:
            self.perceptual = load_perceptual(losses.perceptual).to(accelerator.device)
        if losses.adversarial_weight > 0:
            self.discriminator = PatchDiscriminator(config).to(accelerator.device)
            self.peak = config.learning_rate or learning_rate
            self.optimizer = torch.optim.Adam(
                self.discriminator.parameters(), lr=self.peak, betas=config.betas, fused=True
            )
            self.lecam = LeCam(config.lecam_decay).to(accelerator.device)
            self._share_weights()
            if inherited is not None and config.inherit:
                self._take_over(inherited)

    def _take_over(self, found: Inheritance) -> None:
        assert self.discriminator is not None
        found.check(self.config)
        self.discriminator.load_state_dict(dict(found.discriminator))
        if found.lecam:
            self.lecam.load_state_dict(dict(found.lecam))
        names = [name for name, _ in self.discriminator.named_parameters()]
        if found.moments:
            # rates and betas are the recipe's
            groups = self.optimizer.state_dict()["param_groups"]
            state = {i: dict(found.moments[name]) for i, name in enumerate(names) if name in found.moments}
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.inherited = True

    def hears(self, step: int) -> bool:
        """Whether the tokenizer hears the discriminator in step `step` (0-based)."""
        return self.discriminator is not None and (self.inherited or step >= self.config.generator_start)

    def save(self, folder: Path) -> None:
        """Leave the discriminator, its Adam and the LeCam averages in `folder` for the next stage; nothing without one."""
        if self.discriminator is not None:
            names = [name for name, _ in self.discriminator.named_parameters()]
            save_discriminator(folder, self.state_dict(), names)

    @staticmethod
    def wanted(losses: LossConfig) -> bool:
        """Whether these weights ask for a critic at all."""
        perceptual = losses.perceptual is not None and losses.perceptual_weight > 0
        others = losses.adversarial_weight > 0 or losses.distillation_weight > 0
        return losses.tokenizer_weight > 0 and (perceptual or others)

    def judge(self, reconstruction: Tensor, pixels: Tensor, step: int) -> tuple[Tensor, Losses]:
        """The tokenizer's side.

        Args:
            reconstruction: float[R, 3, H, W], about [-1, 1]; gradients flow to it. R = 0 on a rank without pictures.
            pixels: float[R, 3, H, W] in [-1, 1].
            step: 0-based.

        Returns:
            (weighted sum float[], terms by name, unweighted): ``perceptual_loss``, ``distillation_loss`` and
            ``adversarial_loss``.
        """
        if len(reconstruction) == 0:
            return reconstruction.new_zeros(()), self._judge_nothing(step)
        total, terms = reconstruction.new_zeros(()), Losses()
        if self.perceptual is not None:
            terms["perceptual_loss"] = self.perceptual(reconstruction, pixels).mean()
            total = total + self.losses.perceptual_weight * terms["perceptual_loss"]
        if self.teacher is not None:
            terms["distillation_loss"] = self.teacher.distance(reconstruction, pixels)
            total = total + self.losses.distillation_weight * terms["distillation_loss"]
        if self.discriminator is not None and self.hears(step):
            # its own parameters must gather nothing from this pass
            self.discriminator.requires_grad_(False)
            terms["adversarial_loss"] = generator_loss(self.discriminator(reconstruction), self.config.generator)
            self.discriminator.requires_grad_(True)
            total = total + self.losses.adversarial_weight * terms["adversarial_loss"]
        return total, terms

    def learn(self, reconstruction: Tensor, pixels: Tensor, share: float) -> Losses:
        """The discriminator's side: its gradients of a micro-batch, added up until `step`.

        Args:
            reconstruction, pixels: as in `judge`; no gradient flows to them.
            share: of this micro-batch's pictures in the step.

        Returns:
            ``discriminator_loss`` and, where it is in use, ``lecam_loss``, float[] each; empty without a discriminator.
        """
        if self.discriminator is None:
            return {}
        if len(pixels) == 0:
            return self._learn_nothing()
        # two passes: batch statistics of the fakes alone are what it sees when the tokenizer hears it
        real, fake = self.discriminator(pixels), self.discriminator(reconstruction.detach())
        terms = {"discriminator_loss": discriminator_hinge(real, fake)}
        loss = terms["discriminator_loss"]
        if self.config.lecam_weight > 0:
            terms["lecam_loss"] = self.lecam(real, fake)
            loss = loss + self.config.lecam_weight * terms["lecam_loss"]
        (loss * share).backward()
        return {name: value.detach() for name, value in terms.items()}

    def _judge_nothing(self, step: int) -> Losses:
        """The terms of `judge` on a rank without pictures: all ranks log the same names."""
        used = {
            "perceptual_loss": self.perceptual is not None,
            "distillation_loss": self.teacher is not None,
            "adversarial_loss": self.hears(step),
        }
        return {name: torch.zeros((), device=self.accelerator.device) for name, there in used.items() if there}

    def _learn_nothing(self) -> Losses:
        """`learn` on a rank without pictures: the same names, and its part in what ranks share."""
        names = ["discriminator_loss"]
        if self.config.lecam_weight > 0:
            names.append("lecam_loss")
            self.lecam.move_with_others()
        return {name: torch.zeros((), device=self.accelerator.device) for name in names}

    def gather(self) -> float:
        """Share among ranks what each has learned; returns the norm of the discriminator's gradient, 0 without one."""
        if self.discriminator is None:
            return 0.0
        self._average_gradients()
        gradients = [each.grad for each in self.discriminator.parameters() if each.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def step(self, factor: float) -> None:
        """Move the discriminator by what it learned (`gather`), at `factor` of its peak learning rate, in [0, 1]."""
        if self.discriminator is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def statistics(self) -> list[Tensor]:
        """Copies of what a forward pass moves beside gradients: statistics of norms, LeCam averages."""
        return [buffer.clone() for buffer in self._statistics()]

    @torch.no_grad()
    def drop_step(self, statistics: list[Tensor]) -> None:
        """Forget what was learned since `step`, and put `statistics` back."""
        if self.discriminator is not None:
            self.optimizer.zero_grad(set_to_none=True)
        for buffer, kept in zip(self._statistics(), statistics, strict=True):
            buffer.copy_(kept)

    def _statistics(self) -> list[Tensor]:
        if self.discriminator is None:
            return []
        return [*self.discriminator.buffers(), *self.lecam.buffers()]

    @torch.no_grad()
    def measure(self, reconstruction: Tensor, pixels: Tensor, step: int) -> Losses:
        """The terms of `judge` for validation: nothing learns, no statistics move."""
        if self.discriminator is not None:
            self.discriminator.eval()
        terms = self.judge(reconstruction, pixels, step)[1]
        if self.discriminator is not None:
            self.discriminator.train()
        return terms

    def _share_weights(self) -> None:
        """Every rank starts from the first one's."""
        assert self.discriminator is not None
        if self.accelerator.num_processes > 1:
            for tensor in self.discriminator.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)

    def _average_gradients(self) -> None:
        # by hand: DDP would broadcast the norms' statistics between the two passes, and backward needs them as they were
        assert self.discriminator is not None
        if self.accelerator.num_processes > 1:
            for parameter in self.discriminator.parameters():
                # a rank without pictures in this step has learned nothing
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.distributed.all_reduce(gradient)
                parameter.grad = gradient / self.accelerator.num_processes

    def state_dict(self) -> dict[str, Any]:
        """What learns: discriminator, its optimizer, the LeCam averages."""
        if self.discriminator is None:
            return {}
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lecam": self.lecam.state_dict(),
            "inherited": self.inherited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.lecam.load_state_dict(state["lecam"])
            # a checkpoint from before discriminators were handed on has none that was
            self.inherited = bool(state.get("inherited", False))
