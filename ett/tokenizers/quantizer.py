"""Quantizers: features -> codebook embeddings. `IndexBackpropagationQuantizer` is IBQ's, exact and without N x K."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Self, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ett.config import require
from ett.errors import RecipeError
from ett.tokenizers.index_backprop import index_backprop, nearest_logit
from ett.tokenizers.softmax_statistics import SoftmaxStatistics, softmax_statistics
from ett.types import Quantized

BETA = 0.25
"""Weight of the codebook term ``mean((hard - sg(z))^2)`` in L_quant (IBQ)."""
ATTENTION_WIDTH = 8
"""Widths that are a multiple of it suit all of attention's kernels; others may fall back to one that holds N x K."""
SCALES = ("distance_unit", "log_scale")
"""Tensors that only set the scale of the logits: a quantizer of another similarity has others, or none."""
REFERENCE_LOGIT_STD = 32**0.5
"""Spread of the index logits at the start for unit-variance features: neither saturated nor diffuse (docs/method.md)."""


KMEANS_ROUNDS = 10
"""Lloyd iterations of `IndexBackpropagationQuantizer.place_codes`."""

Similarity = Literal["dot", "distance"]
Gradient = Literal["index_backprop", "straight_through"]


class Quantizer(nn.Module, ABC):
    """Maps features to a finite codebook. Computes in float32 whatever surrounds it."""

    codebook_size: int
    codebook_dim: int

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """float32[K, D], the embeddings that indices stand for; differentiable where the codebook is trained.

        A trained codebook is the quantizer's parameter; a quantizer without parameters has a codebook fixed by rule.
        """

    @abstractmethod
    def forward(self, features: Tensor, entropy: bool = True) -> Quantized:
        """Quantize float[B, D, h, w]; `entropy=False` spares the entropy term where its weight is 0."""

    @abstractmethod
    def nearest(self, features: Tensor) -> Tensor:
        """int64[B, h, w]: the indices that `forward` would give, without losses or gradients."""

    def softmax_statistics(self, features: Tensor) -> SoftmaxStatistics | None:
        """How sharp the index softmax is on float[B, D, h, w]; None for a quantizer without one."""
        return None

    def soft(self, features: Tensor, temperature: float = 1.0) -> Tensor:
        """float32[B, D, h, w]: the mean of all embeddings under the index softmax at `temperature`, of float[B, D, h, w].

        Raises:
            RecipeError: this quantizer has no index softmax.
        """
        raise RecipeError(f"{type(self).__name__} has no index softmax, so there is no soft read-out of its codes.")

    def lookup(self, indices: Tensor) -> Tensor:
        """float32[B, D, h, w]: the embeddings of int64[B, h, w] indices in [0, K)."""
        return F.embedding(indices, self.codebook).permute(0, 3, 1, 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(bfloat16), .half() and model-wide casts move the quantizer but never round it: bf16 flips indices
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if narrowed and not moved.is_meta else moved

        return super()._apply(keep_precision, recurse)


def spans_ranks(module: nn.Module) -> bool:
    """Whether `module` trains in one of several processes: all of them then run it together, one without pictures on none."""
    return module.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class IndexBackpropagationQuantizer(Quantizer):
    """IBQ: the index with the largest logit; gradients through the softmax over all codes (docs/method.md).

    Values: ``embeddings = E[argmax(z @ E.T)]``. Losses: ``L_quant = mean((z_q - z)^2) + mean((sg(E[k]) - z)^2) +
    0.25 * mean((E[k] - sg(z))^2)``, ``L_entropy = mean_n H(softmax(l_n / T)) - H(mean_n softmax(l_n / T))`` with the mean
    over n taken over all ranks while training.

    Args:
        codebook_size: K >= 2.
        codebook_dim: D >= 1.
        temperature: of the index softmax, > 0; above 1 it spreads the gradient over more codes. Indices do not depend on it.
        normalize: compare and return l2-normalised codes; the logits are then ``s * cos(z, e)`` with a learned scale s.
        radius: length of normalised features and codes, > 0; for a decoder that learned on longer ones. No logit depends on it.
        entropy_temperature: T of the entropy term, > 0.
        similarity: what a logit is, ``"dot"``: z . e, as in the paper, or ``"distance"``: -|z - e|^2 / u, so that the index is
            always the nearest code's. The unit u is the mean squared distance to the nearest code when `place_codes` or
            `fit_unit` was last called (1 before), so that temperatures mean the same at every scale of the features.
        gradient: of the embeddings. ``"index_backprop"``: IBQ's, through the softmax over all codes.
            ``"straight_through"``: ``E[k] + z - sg(z)``, the identity to the features and to the chosen code; L_quant then
            has no soft term and is VQ-VAE's, ``mean((sg(E[k]) - z)^2) + 0.25 * mean((E[k] - sg(z))^2)``.
        unit_embeddings: search among the codes as they are, return them l2-normalised (the Janus tokenizer of transformers);
            `normalize` normalises both.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        temperature: float = 1.0,
        normalize: bool = False,
        radius: float = 1.0,
        entropy_temperature: float = 0.01,
        similarity: Similarity = "dot",
        gradient: Gradient = "index_backprop",
        unit_embeddings: bool = False,
    ) -> None:
        super().__init__()
        require(codebook_size >= 2, "codebook_size", codebook_size, "at least 2")
        require(codebook_dim >= 1, "codebook_dim", codebook_dim, "at least 1")
        require(temperature > 0, "temperature", temperature, "above 0")
        require(radius > 0, "radius", radius, "above 0")
        require(entropy_temperature > 0, "entropy_temperature", entropy_temperature, "above 0")
        require(similarity in get_args(Similarity), "similarity", similarity, f"one of {get_args(Similarity)}")
        require(
            not (normalize and similarity == "distance"), "similarity", similarity, '"dot" where codes are normalised'
        )
        require(gradient in get_args(Gradient), "gradient", gradient, f"one of {get_args(Gradient)}")
        self.similarity = similarity
        self.gradient = gradient
        self.unit_embeddings = unit_embeddings
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.temperature = temperature
        self.normalize = normalize
        self.radius = radius
        self.entropy_temperature = entropy_temperature
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.normal_(self.embedding.weight, std=REFERENCE_LOGIT_STD / codebook_dim**0.5)
        self.log_scale = (
            nn.Parameter(torch.tensor(REFERENCE_LOGIT_STD * codebook_dim**0.5).log()) if normalize else None
        )
        self.distance_unit: Tensor | None
        self.register_buffer("distance_unit", torch.ones(()) if similarity == "distance" else None)

    @property
    def codebook(self) -> Tensor:
        codes = self._codes()
        return F.normalize(codes, dim=1) if self.unit_embeddings else codes

    def _codes(self) -> Tensor:
        """float32[K, D]: what features are compared with."""
        weight: Tensor = self.embedding.weight
        if weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"The codebook is {weight.dtype}, it must stay float32: a narrower type changes indices. Under FSDP, give "
                "the quantizer its own unit without param_dtype (ett.train.precision.shard_quantizer does)."
            )
        return self._on_sphere(weight) if self.normalize else weight

    def forward(self, features: Tensor, entropy: bool = True) -> Quantized:
        """Quantize features.

        Args:
            features: float[B, D, h, w].
            entropy: False leaves the entropy term out (its value is then 0) and saves its passes.

        Raises:
            ValueError: the features' channels are not D.
        """
        with torch.autocast(features.device.type, enabled=False):
            z = self._rows(features)
            # the query already carries 1 / temperature: the entropy softmax is of l / T, whatever the index softmax's is
            entropy_temperature = self.entropy_temperature / self.temperature if entropy else None
            found = index_backprop(
                self._query(z),
                self._keys(),
                entropy_temperature,
                all_ranks=spans_ranks(self),
                through_softmax=self.gradient == "index_backprop",
            )
            codes = slice(0, self.codebook_dim)
            values = slice(-self.codebook_dim, None) if self.unit_embeddings else codes
            hard = found.hard[:, codes]
            commitment = F.mse_loss(hard.detach(), z)
            if self.gradient == "index_backprop":
                embeddings = found.soft[:, values]
                commitment = F.mse_loss(found.soft[:, codes], z) + commitment
            else:
                embeddings = found.hard[:, values] + (z - z.detach())
            quantization_loss = commitment + BETA * F.mse_loss(hard, z.detach())
        batch, _, height, width = features.shape
        return Quantized(
            embeddings=embeddings.view(batch, height, width, self.codebook_dim).permute(0, 3, 1, 2),
            indices=found.indices.view(batch, height, width),
            quantization_loss=quantization_loss,
            entropy_loss=found.entropy,
            usage=found.usage,
        )

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            found = nearest_logit(self._query(self._rows(features)), self._keys())
        batch, _, height, width = features.shape
        return found.view(batch, height, width)

    def soft(self, features: Tensor, temperature: float = 1.0) -> Tensor:
        """``softmax(l / temperature) @ E``, l the logits before `self.temperature`; differentiable in features and codes.

        It is attention over the codebook, which need not hold the N x K weights.
        """
        with torch.autocast(features.device.type, enabled=False):
            query, keys = self._query(self._rows(features)), self._keys()
            codes = slice(0, self.codebook_dim) if not self.unit_embeddings else slice(-self.codebook_dim, None)
            # attention's fast kernels want one width for all three, of whole vectors; zeros change nothing
            width = -(-keys.shape[1] // ATTENTION_WIDTH) * ATTENTION_WIDTH
            query, keys, values = (
                F.pad(each, (0, width - each.shape[1]))[None, None] for each in (query, keys, keys[:, codes])
            )
            scale = self.temperature / temperature
            found = F.scaled_dot_product_attention(query, keys, values, scale=scale)
        batch, _, height, width = features.shape
        return found[0, 0, :, : self.codebook_dim].view(batch, height, width, self.codebook_dim).permute(0, 3, 1, 2)

    @torch.no_grad()
    def softmax_statistics(self, features: Tensor) -> SoftmaxStatistics:
        """Of the softmax that carries the gradient, `temperature` included; "nearest" is by Euclidean distance."""
        with torch.autocast(features.device.type, enabled=False):
            z = self._rows(features)
            nearest = nearest_logit(*_as_dot(z, self._codes()))
            entropy_temperature = self.entropy_temperature / self.temperature
            return softmax_statistics(self._query(z), self._keys(), nearest, entropy_temperature)

    @torch.no_grad()
    def fit_unit(self, features: Tensor) -> float:
        """Measure the unit of `similarity` "distance" on features of a codebook that is kept, in place.

        Args:
            features: float[I, D, h, w] of a few pictures.

        Returns:
            The mean squared distance of a feature to its nearest code, >= 0.

        Raises:
            ValueError: the similarity is "dot", which has no unit.
        """
        if self.distance_unit is None:
            raise ValueError('similarity "dot" has no unit to fit; it belongs to similarity "distance".')
        with torch.autocast(features.device.type, enabled=False):
            distance = _mean_distance(self._rows(features), self._codes())
        self.distance_unit.copy_(distance.clamp(min=1e-6))
        return float(distance)

    @torch.no_grad()
    def place_codes(self, features: Tensor, seed: int = 0) -> float:
        """Put the codes where features are (k-means), in place.

        Args:
            features: float[I, D, h, w] of many pictures, I * h * w >= K; all of it is held in memory.
            seed: of the codes that k-means starts from.

        Returns:
            The mean squared distance of a feature to its nearest code, >= 0; 0 means that there are too few features.

        Raises:
            ValueError: fewer features than codes.
        """
        rows = self._rows(features)
        if len(rows) < self.codebook_size:
            raise ValueError(f"{len(rows)} features cannot place {self.codebook_size} codes. Give at least as many.")
        generator = torch.Generator().manual_seed(seed)
        codes = rows[torch.randperm(len(rows), generator=generator)[: self.codebook_size].to(rows.device)].clone()
        for _ in range(KMEANS_ROUNDS):
            found = nearest_logit(*_as_dot(rows, codes))
            counts = torch.bincount(found, minlength=self.codebook_size).to(rows.dtype)
            sums = torch.zeros_like(codes).index_add_(0, found, rows)
            # a code that nothing chose starts again at a feature
            spare = rows[torch.randint(len(rows), (self.codebook_size,), generator=generator).to(rows.device)]
            codes = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], spare)
            codes = self._on_sphere(codes) if self.normalize else codes
        distance = _mean_distance(rows, codes)
        self.embedding.weight.copy_(codes)
        if self.distance_unit is not None:
            self.distance_unit.copy_(distance.clamp(min=1e-6))
        return float(distance)

    def _rows(self, features: Tensor) -> Tensor:
        """float32[N, D] with N = B * h * w: z of the losses, l2-normalised where codes are."""
        if features.dim() != 4 or features.shape[1] != self.codebook_dim:
            raise ValueError(
                f"Expected features of shape [B, {self.codebook_dim}, h, w], got {list(features.shape)}. The channels must "
                "equal codebook_dim."
            )
        rows = features.permute(0, 2, 3, 1).reshape(-1, self.codebook_dim).to(self.embedding.weight.dtype)
        return self._on_sphere(rows) if self.normalize else rows

    def _on_sphere(self, rows: Tensor) -> Tensor:
        return self.radius * F.normalize(rows, dim=1)

    def _query(self, z: Tensor) -> Tensor:
        """float[N, Q]: its dot product with `_keys` is the logit / temperature."""
        if self.distance_unit is not None:
            query = _distance_query(z) / (self.distance_unit * self.temperature)
        else:
            scale: Any = 1.0 if self.log_scale is None else self.log_scale.exp() / self.radius**2
            query = z * (scale / self.temperature)
        return torch.cat([query, torch.zeros_like(z)], dim=1) if self.unit_embeddings else query

    def _keys(self) -> Tensor:
        """float[K, Q]: the codes in the first D columns; unit embeddings in the last D, which the query meets with zeros."""
        codes = self._codes()
        keys = codes if self.distance_unit is None else _distance_keys(codes)
        return torch.cat([keys, F.normalize(codes, dim=1)], dim=1) if self.unit_embeddings else keys


def _distance_query(z: Tensor) -> Tensor:
    """float[N, D + 1]; its dot product with `_distance_keys(e)` is -|z - e|^2 up to what no softmax over codes sees."""
    return torch.cat([2 * z, -torch.ones_like(z[:, :1])], dim=1)


def _distance_keys(codes: Tensor) -> Tensor:
    return torch.cat([codes, codes.pow(2).sum(dim=1, keepdim=True)], dim=1)


def _as_dot(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return _distance_query(z), _distance_keys(codes)


def _mean_distance(rows: Tensor, codes: Tensor) -> Tensor:
    """float[]: mean squared distance of float[N, D] rows to the nearest of float[K, D] codes."""
    return (rows - codes[nearest_logit(*_as_dot(rows, codes))]).pow(2).sum(dim=1).mean()
