"""Measurements -> warnings that name the cause and the knob."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ett.tokenizers import Quantizer
from ett.tokenizers.quantizer import IndexBackpropagationQuantizer

SATURATED_MASS = 0.9
"""Mean top-1 mass of the index softmax above which hardly any gradient passes it."""
DIFFUSE_MASS, DIFFUSE_NEAREST = 0.1, 0.5
"""Top-1 mass and nearest-code share below which the index belongs to a mixture instead of a code (docs/recipes.md)."""
UNIFORM_SHARE = 0.5
"""Perplexity of the index softmax, as a share of K, above which it tells no code from another."""
FALLING_SHARE = 0.5
"""Usage, as a share of the stage's first, under which it is said to fall."""
VANISHING = 1e-6
"""The caption loss's gradient at the encoder, as a share of the reconstruction loss's, under which it counts as none."""
STILL_STEPS, STILL_PSNR = 200, 60.0
"""Steps after which a tokenizer should have moved; PSNR between its reconstructions then and now [dB] that is no move."""


@dataclass(frozen=True)
class Situation:
    """What was measured, and on what.

    Attributes:
        step: finished steps.
        quantizer: its settings are the knobs.
        values, gradient_norms: as in the log's event ``health``.
        first_usage: ``usage`` as the stage began; None where that says nothing (codes that were not placed yet).
        caption_expected: whether the caption loss is meant to reach the encoder.
    """

    step: int
    quantizer: Quantizer
    values: Mapping[str, float]
    gradient_norms: Mapping[str, Mapping[str, float]]
    first_usage: float | None = None
    caption_expected: bool = False


def diagnose(found: Situation) -> dict[str, str]:
    """Warnings by kind: "saturated", "diffuse", "usage_falls", "no_caption_gradient", "still". Empty where all is well."""
    return {**_softmax(found), **_usage(found), **_caption(found), **_movement(found)}


def _softmax(found: Situation) -> dict[str, str]:
    quantizer, values = found.quantizer, found.values
    through_softmax = isinstance(quantizer, IndexBackpropagationQuantizer) and quantizer.gradient == "index_backprop"
    if not through_softmax or "top1_mass" not in values:
        return {}
    assert isinstance(quantizer, IndexBackpropagationQuantizer)
    mass, nearest = values["top1_mass"], values["nearest_share"]
    knob = f"vision_tokenizer.temperature (now {quantizer.temperature:g})"
    if mass > SATURATED_MASS:
        scale = (
            "its learned scale is too high" if quantizer.normalize else "the scale of features and codes is too high"
        )
        return {
            "saturated": f"The index softmax is saturated: {mass:.1%} of its mass lies on one code, so hardly any gradient "
            f"passes to encoder and codebook; {scale}. Raise {knob}."
        }
    uniform = values["softmax_perplexity"] > UNIFORM_SHARE * quantizer.codebook_size
    if uniform or (mass < DIFFUSE_MASS and nearest < DIFFUSE_NEAREST):
        measured = quantizer.similarity == "distance" or quantizer.normalize
        other = "" if measured else '; a tokenizer trained anew can have vision_tokenizer.similarity "distance" instead'
        return {
            "diffuse": f"The index softmax is diffuse: {mass:.1%} of its mass lies on the chosen code, which is the nearest "
            f"one for {nearest:.0%} of the tokens, so gradients belong to a mixture of codes. Lower {knob}{other}."
        }
    return {}


def _usage(found: Situation) -> dict[str, str]:
    usage, first = found.values["usage"], found.first_usage
    if first is None or usage >= FALLING_SHARE * first:
        return {}
    return {
        "usage_falls": f"Codebook usage has fallen from {first:.1%} to {usage:.1%} since the stage began: fewer and fewer "
        "codes win. Raise losses.entropy_weight, or lower optimizer.learning_rates.vision_tokenizer."
    }


def _caption(found: Situation) -> dict[str, str]:
    norms = found.gradient_norms.get("encoder", {})
    if not found.caption_expected or "caption_loss" not in norms:
        return {}
    if norms["caption_loss"] > VANISHING * norms.get("reconstruction_loss", 0.0):
        return {}
    return {
        "no_caption_gradient": f"The caption loss does not reach the encoder (gradient norm {norms['caption_loss']:.2g} at its "
        "last layer), so captions do not tune the tokenizer: the index softmax lets nothing through, or the language model "
        "does not look at the picture yet. Raise vision_tokenizer.temperature, or train an align stage first."
    }


def _movement(found: Situation) -> dict[str, str]:
    values = found.values
    if found.step < STILL_STEPS or values.get("indices_changed", 1.0) > 0:
        return {}
    if values["reconstruction_drift_psnr"] < STILL_PSNR:
        return {}
    psnr = values["reconstruction_drift_psnr"]
    return {
        "still": f"After {found.step} steps the tokenizer has not moved: no index has changed, and reconstructions are what "
        f"they were to {psnr:.0f} dB. Raise optimizer.learning_rates.vision_tokenizer, or losses.tokenizer_weight."
    }
