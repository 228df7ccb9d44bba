"""The processor of a saved model, or of the model that a recipe describes, without its weights."""

from __future__ import annotations

from pathlib import Path

from ett.errors import ModelError
from ett.experiments.plan.skeleton import recipes_of, skeleton
from ett.experiments.recipe import SHIPPED
from ett.experiments.run import resolve_model_folder
from ett.model.ett import EttForConditionalGeneration
from ett.model.loading import SHIPPED_WEIGHTS, find_weights, load_model
from ett.model.processing import EttProcessor
from ett.tokenizers import VisionTokenizer


def find_processor(given: str) -> tuple[EttProcessor, int | None]:
    """(processor, positions that an example may have, where that is known).

    Args:
        given: the folder of a model or a run, the name of shipped weights, a recipe's file or a shipped recipe's name. Of a
            recipe the last stage counts, of one that compares arms the first arm; a name that both have is the weights'.

    Raises:
        UserError: there is no such thing, or it has no language model.
    """
    model: EttForConditionalGeneration | VisionTokenizer
    max_length = None
    is_folder = Path(given).is_dir() or (SHIPPED_WEIGHTS / given).is_dir()
    if Path(given).is_file() or (not is_folder and (SHIPPED / f"{given}.yaml").is_file()):
        recipe = recipes_of(given)[0]
        model, processor = skeleton(recipe, len(recipe.stages) - 1)
        max_length = recipe.stages[-1].max_length
    else:
        model, processor = load_model(resolve_model_folder(find_weights(given)), weights=False)
    if isinstance(model, VisionTokenizer):
        raise ModelError(
            f"{given} trains a vision tokenizer alone, which reads no text. Give one with a language model."
        )
    return processor, max_length or getattr(model.config.text_config, "max_position_embeddings", None)
