"""A saved model with its own code beside the weights: transformers loads it where this package is not installed.

transformers follows ``auto_map`` in the configurations to files in the same folder (``trust_remote_code=True``). Two are
written, from this package's own source (`ett.export.bundle`): ``modeling_ett.py``, configuration and model, and
``processing_ett.py``. They read, answer, reconstruct and draw; training is left out.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ett import __version__
from ett.errors import ModelError
from ett.export.bundle import Bundle, Shape
from ett.export.card import model_card
from ett.model.configuration import EttConfig
from ett.model.ett import EttForConditionalGeneration
from ett.model.loading import load_model
from ett.model.lora import merge_lora
from ett.tokenizers import VisionTokenizer

MODELING, PROCESSING, CARD = "modeling_ett.py", "processing_ett.py", "README.md"
AUTO_MAPS = {
    "config.json": {
        "AutoConfig": "modeling_ett.EttConfig",
        "AutoModelForImageTextToText": "modeling_ett.EttForConditionalGeneration",
    },
    "processor_config.json": {"AutoProcessor": "processing_ett.EttProcessor"},
}
IMAGE_PROCESSOR = {"AutoImageProcessor": "processing_ett.EttImageProcessor"}

ENTRIES = {
    "forward",
    "generate_images",
    "get_input_embeddings",
    "get_output_embeddings",
    "set_input_embeddings",
    "set_output_embeddings",
    "prepare_inputs_for_generation",
    "tokenize",
    "detokenize",
    "_init_weights",
    "_expand_inputs_for_generation",
    "_apply",
}
"""Methods of the model and its parts that users and transformers call."""
PROCESSOR_ENTRIES = {"preprocess", "apply_chat_template", "model_input_names", "drawing_inputs"}

QUANTIZERS = ("ett.tokenizers.quantizer", "ett.tokenizers.implicit", "ett.tokenizers.fsq", "ett.tokenizers.lfq")


def forward(
    self: Any,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    image_indices: Tensor | None = None,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> CausalLMOutputWithPast:
    """Logits of a conversation with pictures; no loss.

    Args:
        input_ids: int64[B, T], image placeholders where visual positions go.
        pixel_values: float[I, 3, H, W] in [-1, 1], in reading order over the batch.
        attention_mask: int64[B, T], 1 where real; padding on either side.
        logits_to_keep: as in transformers.
        image_indices: int64[I, h, w] in [0, K), in place of `pixel_values`.
    """
    if labels is not None:
        raise ValueError("This file is for inference and has no loss. Train the model with the package ett-tuning.")
    if pixel_values is not None and len(pixel_values) > 0:
        image_indices = self.vision_tokenizer.tokenize(pixel_values)
    if inputs_embeds is None:
        if input_ids is None:
            raise ValueError("Give input_ids or inputs_embeds.")
        visual = None if image_indices is None else self.visual_embeddings(image_indices)
        inputs_embeds = self.embed(input_ids, visual)
    if position_ids is None and past_key_values is None and attention_mask is not None and attention_mask.dim() == 2:
        position_ids = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    outputs: CausalLMOutputWithPast = self.language_model(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        logits_to_keep=logits_to_keep,
        return_dict=True,
        **kwargs,
    )
    return outputs


def _fresh_language_model(self: Any, config: EttConfig) -> PreTrainedModel:
    # adapters were merged
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config.text_config))


def modeling_source(tokenizer: VisionTokenizer) -> str:
    """``modeling_ett.py`` for a model with a tokenizer of this class."""
    kind = type(tokenizer)
    shape = Shape(
        roots=(
            (kind.__module__, kind.__name__),
            (__name__, "CausalLMOutputWithPast"),
            ("ett.model.configuration", "EttConfig"),
            ("ett.model.ett", "EttForConditionalGeneration"),
        ),
        entries=ENTRIES,
        replaced={
            f"EttForConditionalGeneration.{name.__name__}": inspect.getsource(name)
            for name in (forward, _fresh_language_model)
        },
        left_out=_trains,
    )
    return (
        _head(f"Configuration and model, for inference with the vision tokenizer {kind.tokenizer_type!r}")
        + Bundle(shape).text()
    )


def processing_source() -> str:
    """``processing_ett.py``: pictures and conversations to the model's tensors."""
    roots = (("ett.model.processing", "EttImageProcessor"), ("ett.model.processing", "EttProcessor"))
    return _head("Pictures and conversations to the model's tensors") + Bundle(Shape(roots, PROCESSOR_ENTRIES)).text()


def export_model(
    source: Path, destination: Path, *, license_name: str | None = None, metrics: Path | None = None
) -> Path:
    """Write the model in `source` with its code, processor and card into `destination`, a new or empty folder.

    Adapters are merged into the language model. The folder appears whole or not at all.

    Args:
        source: a saved model's folder, as `load_model` takes it.
        license_name, metrics: for the card (`model_card`).

    Raises:
        ModelError: no complete model in `source`, or something in `destination`. DataError: no metrics in that file.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ModelError(f"{destination} is not empty. Give a new folder for the export.")
    model, processor = load_model(source)
    merged(model)
    destination.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        model.save_pretrained(work)
        processor.save_pretrained(work)
        add_code(work, model)
        card = model_card(source, model, processor, license_name, metrics)
        (work / CARD).write_text(card, encoding="utf-8")
        work.chmod(0o777 & ~_umask())
        if destination.exists():
            destination.rmdir()
        work.rename(destination)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return destination


def merged(model: EttForConditionalGeneration) -> EttForConditionalGeneration:
    """`model` itself, its adapters, where it has any, in the language model's weights."""
    if model.config.lora is not None:
        merge_lora(model.language_model)
        model.config.lora = None
    return model


def add_code(folder: Path, model: EttForConditionalGeneration | None = None) -> None:
    """Put the files beside a saved model, a processor or both, and point the configurations that are there at them."""
    if model is not None:
        (folder / MODELING).write_text(modeling_source(model.vision_tokenizer), encoding="utf-8")
    (folder / PROCESSING).write_text(processing_source(), encoding="utf-8")
    for name, auto_map in AUTO_MAPS.items():
        path = folder / name
        if not path.is_file():
            continue
        values = json.loads(path.read_text(encoding="utf-8"))
        values["auto_map"] = auto_map
        if isinstance(values.get("image_processor"), dict):
            values["image_processor"]["auto_map"] = IMAGE_PROCESSOR
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _trains(module: str, owner: str, method: str) -> bool:
    """What only training needs: indices come from `nearest`, their embeddings from `lookup`."""
    return method == "forward" and (module in QUANTIZERS or owner == "VisionTokenizer")


def _head(what: str) -> str:
    return (
        f'"""{what}.\n\nWritten by ett-tuning {__version__} (Apache-2.0) from its own source, to be loaded with '
        'trust_remote_code=True.\nChange the package ett-tuning, not this file.\n"""\n\n'
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
