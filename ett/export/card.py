"""The model card (README.md) of an exported model: what it is, what it learned from, how well, under which licence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ett import __version__
from ett.config import to_mapping
from ett.data.mixture import SourceConfig
from ett.errors import DataError
from ett.experiments.folder import RECIPE_NAME
from ett.experiments.recipe import SHIPPED, Recipe, load_recipe
from ett.model.ett import EttForConditionalGeneration
from ett.model.loading import SHIPPED_WEIGHTS
from ett.model.processing import EttProcessor
from ett.train.log import LOG_NAME, read_log

SOURCES = {
    "names": "names of pictures from six open emoji sets, built in (licences: `ett/data/builtin/NOTICE` of the package)",
    "questions": "questions on the metadata of six open emoji sets, built in (licences: as for names)",
    "facts": "questions on the names of these pictures, in words alone, built in (licences: as for names)",
    "drawn_text": "text drawn in open fonts, built in (licences: as for names)",
    "drawn_scenes": "coloured shapes drawn from a seed, built in",
}
TAGS = ["ett", "vision-tokenizer", "vector-quantization", "image-text-to-text"]


def model_card(
    source: Path | None,
    model: EttForConditionalGeneration,
    processor: EttProcessor | None,
    license_name: str | None = None,
    metrics: Path | None = None,
    *,
    name: str = "",
    tags: Sequence[str] = (),
) -> str:
    """Markdown with the hub's header.

    Args:
        source: the model's folder; where it lies in a run's, recipe, data and validation losses are told. None: not known.
        processor: None where it is shared apart.
        license_name: identifier such as "apache-2.0"; None says that it is not stated.
        metrics: what ``ett evaluate --json`` wrote for this model.
        name: where `source` has none. tags: beside `TAGS`.

    Raises:
        DataError: `metrics` is no such file.
    """
    recipe, log, stages = (None, [], 0) if source is None else _run_of(source)
    shipped = source is not None and _is_shipped(source)
    if source is not None:
        # an arm's recipe is named after the arm, the run's folder after what it is for
        name = source.name if recipe is None or shipped else source.resolve().parent.parent.name
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": list(dict.fromkeys([*TAGS, *tags])),
    }
    if license_name is not None:
        header["license"] = license_name
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {name}",
        "A language model that reads the codebook embeddings of a discrete vision tokenizer, both tuned together "
        "(*End-to-End Vision Tokenizer Tuning*, [arXiv 2505.10562](https://arxiv.org/abs/2505.10562)), with "
        f"ett-tuning {__version__}.",
        "## Use\n\n" + _USE.strip(),
        "## Architecture\n\n" + _table(("part", "what"), _architecture(model, processor)),
    ]
    if recipe is not None:
        starts = [_SHIPPED] if shipped else _starts(recipe)
        parts += ["## Training", _table(_STAGE_COLUMNS, _stage_rows(recipe, stages)), *starts]
        used = [each for stage in recipe.stages[:stages] for each in (stage.data or recipe.data)]
        parts += ["### Data", _list(_described(used))]
        plain = yaml.safe_dump(_without_folders(to_mapping(recipe)), sort_keys=False, allow_unicode=True)
        parts.append(f"<details><summary>The whole recipe</summary>\n\n```yaml\n{plain}```\n\n</details>")
    else:
        parts += ["## Training", _UNKNOWN]
    parts.append("## Metrics")
    parts += _metrics(log, metrics) or ["None were kept with this model."]
    parts += ["## Limits", _list(_LIMITS)]
    stated = f"{license_name}." if license_name is not None else "Not stated by who exported this model."
    parts += [
        "## Licence",
        f"{stated} The code files are Apache-2.0. Language model and data have licences of their own.",
    ]
    return "\n\n".join(parts) + "\n"


_USE = """
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER_OR_ID, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(FOLDER_OR_ID, trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image", "path": "cat.jpg"}, {"type": "text", "text": "What is this?"}]}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```

The code is in `modeling_ett.py` and `processing_ett.py`, for inference; to train on, `pip install ett-tuning`.
"""

_LIMITS = (
    "Every picture is fitted to the size above first; what is smaller than a few pixels there is lost.",
    "Indices are computed in float32. Another precision of encoder or quantizer changes some of them.",
    "Answers are a language model's: fluent, and wrong where the pictures are unlike the training data.",
)
_UNKNOWN = (
    "Not known: these weights did not lie in the folder of the run that made them, so recipe and data are not told here. Who "
    "shares them should say what they learned from."
)
_SHIPPED = (
    "It is shipped with ett-tuning, as is this recipe. The weights that the recipe starts from are the result of another "
    "one of the package, on built-in data too."
)
_PROSE = ("chat_template", "prompt")
"""Keys of a recipe whose text is no path, whatever is in it."""
_FROM_A_HUB = ("language_model", "text_tokenizer")
"""Keys under which "owner/name" may be a hub's, which says whose licence counts."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_STAGE_COLUMNS = ("stage", "trained", "steps", "batch", "learning rate")


def _architecture(model: EttForConditionalGeneration, processor: EttProcessor | None) -> list[tuple[str, str]]:
    tokenizer, text = model.vision_tokenizer, model.config.text_config.get_text_config()
    return [
        *([] if processor is None else [("pictures", _picture_size(processor, tokenizer.downsample))]),
        (
            "vision tokenizer",
            f"{tokenizer.tokenizer_type}, K = {tokenizer.codebook_size:,}, D = {tokenizer.codebook_dim}, "
            f"1 / {tokenizer.downsample}, {_millions(tokenizer.parameters())} parameters, encoder in {tokenizer.precision}",
        ),
        ("projector", f"{_millions(model.projector.parameters())} parameters, reads {model.config.visual_input}s"),
        (
            "language model",
            f"{text.model_type}, {getattr(text, 'num_hidden_layers', '?')} layers of width {text.hidden_size}, "
            f"{_millions(model.language_model.parameters())} parameters",
        ),
    ]


def _picture_size(processor: EttProcessor, downsample: int) -> str:
    images = processor.image_processor
    tokens = (images.height // downsample) * (images.width // downsample)
    return f"{images.height} x {images.width} pixels, {tokens} tokens, {processor.num_image_positions} positions"


def _stage_rows(recipe: Recipe, stages: int) -> list[tuple[str, ...]]:
    return [
        (name, ", ".join(stage.parts), f"{stage.steps:,}", str(stage.batch_size), f"{stage.optimizer.learning_rate:g}")
        for name, stage in list(zip(recipe.stage_names, recipe.stages, strict=True))[:stages]
    ]


def _starts(recipe: Recipe) -> list[str]:
    """What the weights were before the first stage, where not fresh."""
    spec = recipe.model
    language_model = spec.language_model.path if spec.language_model is not None else None
    given = {
        "model": spec.init,
        "vision_tokenizer": spec.vision_tokenizer.get("path"),
        "language_model": language_model,
    }
    named = _without_folders({part: path for part, path in given.items() if path is not None})
    lines = [f"{part.replace('_', ' ')}: `{path}`" for part, path in named.items()]
    return ["It started from trained weights, which had data and licences of their own:", _list(lines)] if lines else []


def _described(sources: Sequence[SourceConfig]) -> list[str]:
    """One line a source, each once; of the user's own files the name alone."""
    lines = [
        SOURCES.get(each.source, f"`{_without_folders(each.path or '')}`, not part of this package") for each in sources
    ]
    return list(dict.fromkeys(lines))


def _without_folders(value: Any, *, hub: bool = False) -> Any:
    """Of paths the last part: what someone's folders are called is nobody's business. Where a `hub`'s id may stand, one stays
    unless there is a folder of that name."""
    if isinstance(value, Mapping):
        return {
            key: item if key in _PROSE else _without_folders(item, hub=hub or key in _FROM_A_HUB)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_folders(item, hub=hub) for item in value]
    if not isinstance(value, str) or (hub and _HUB_ID.fullmatch(value) and not Path(value).exists()):
        return value
    if "://" in value:
        # an address may end in its owner's key
        value = re.split(r"[?#]", value)[0]
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1]


def _is_shipped(source: Path) -> bool:
    return source.resolve().parent == SHIPPED_WEIGHTS and (SHIPPED / f"{source.name}.yaml").is_file()


def _metrics(log: Sequence[Mapping[str, Any]], metrics: Path | None) -> list[str]:
    found = []
    held = [event for event in log if event["event"] == "validation"]
    if held:
        rows = [(name, f"{value:.4f}") for name, value in held[-1]["losses"].items()]
        found += [
            f"Validation after step {held[-1]['step']} of {held[-1]['stage']}:",
            _table(("figure", "value"), rows),
        ]
    if metrics is not None:
        found += ["Measured by `ett evaluate`, with 95 % bootstrap intervals:", _measured(metrics)]
    return found


def _measured(path: Path) -> str:
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        rows = []
        for name, each in figures.items():
            interval = each.get("interval")
            shown = f"[{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            rows.append((name, f"{each['value']:.4f}", shown, str(each["num_examples"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds no metrics: write it with `ett evaluate MODEL --json FILE`.") from error
    return _table(("figure", "value", "interval", "examples"), rows)


def _run_of(source: Path) -> tuple[Recipe | None, list[dict[str, Any]], int]:
    """(recipe, log, stages that the model went through) of the run that a folder belongs to, or of the recipe that
    made a shipped model; (None, [], 0) without one."""
    if _is_shipped(source):
        made = load_recipe(source.name)
        return made, [], len(made.stages)
    run = source.resolve().parent.parent
    number = source.name.split("-")[0]
    if source.resolve().parent.name != "stages" or not (run / RECIPE_NAME).is_file() or not number.isdecimal():
        return None, [], 0
    recipe = load_recipe(run / RECIPE_NAME)
    done = int(number) + 1
    log = read_log(run / LOG_NAME) if (run / LOG_NAME).is_file() else []
    return recipe, [event for event in log if event["stage"] in recipe.stage_names[:done]], done


def _millions(parameters: Iterable[Any]) -> str:
    return f"{sum(each.numel() for each in parameters) / 1e6:.2f}M"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
