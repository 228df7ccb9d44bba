"""Low-rank adapters inside the language model, through PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn

from ett.errors import ModelError


def inject_lora(language_model: nn.Module, settings: dict[str, Any]) -> None:
    """Put adapters into `language_model` in place; the base weights stay as they are, under ``base_layer``.

    Args:
        language_model: a causal LM.
        settings: keyword arguments of ``peft.LoraConfig`` (``r``, ``lora_alpha``, ``lora_dropout``, ``target_modules``).

    Raises:
        ModelError: PEFT is not installed, or the settings name no module of this language model.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ModelError("LoRA needs the package peft: pip install 'ett-tuning[lora]'.") from error
    try:
        inject_adapter_in_model(LoraConfig(**settings), language_model)
    except (ValueError, TypeError) as error:
        raise ModelError(f"The LoRA settings do not fit this language model: {error}") from error


def merge_lora(language_model: nn.Module) -> None:
    """Fold the adapters into the base weights and remove them, in place; the function computed stays the same."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(language_model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent_name, _, child = name.rpartition(".")
            setattr(language_model.get_submodule(parent_name), child, module.get_base_layer())


def is_lora_parameter(name: str) -> bool:
    """Whether a parameter of this dotted name belongs to an adapter."""
    return ".lora_" in name
