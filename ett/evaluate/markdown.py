"""An evaluation as Markdown: a table of figures for a README, an issue or a log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ett.evaluate.charts import number
from ett.evaluate.html import titled
from ett.evaluate.page import DESCRIPTIONS


def markdown(content: Mapping[str, Any]) -> str:
    """What `Evaluation.to_json` gives, as Markdown: a row for each measure, a column for each source, intervals beside the
    values, and below what was measured with what."""
    rows: dict[str, dict[str, str]] = {}
    for name, found in content["metrics"].items():
        source, _, metric = name.rpartition(".")
        rows.setdefault(metric, {})[source] = _figure(found)
    sources = list(dict.fromkeys(source for row in rows.values() for source in row))
    lines = [_line("Measure", *(source or content["data"][0]["name"] for source in sources))]
    lines += [_line("---", *("---:" for _ in sources))]
    for metric, row in rows.items():
        label, unit, way = DESCRIPTIONS.get(metric, (titled(metric), "", ""))
        notes = ", ".join(note for note in (unit, way) if note)
        lines.append(_line(f"{label} ({notes})" if notes else label, *(row.get(source, "–") for source in sources)))
    data = ", ".join(
        f"{each['name']} ({each['num_examples']} of {each['available']} examples)" for each in content["data"]
    )
    model = content["model"]
    size = " x ".join(map(str, model["image_size"]))
    described = f"{model['kind']}, {model['num_parameters']:,} parameters, pictures of {size} pixels"
    versions = ", ".join(f"{package} {version}" for package, version in content["versions"].items())
    below = [
        "In brackets the 95 % bootstrap interval over examples, then how many there were.",
        f"Model: {described}.",
        f"Data: {data}.",
        f"Versions: {versions}.",
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in below)]) + "\n"


def _figure(found: Mapping[str, Any]) -> str:
    value, interval = found["value"], found["interval"]
    between = f" [{number(interval[0])}, {number(interval[1])}]" if interval else ""
    return f"{'–' if value is None else number(value)}{between}, n = {found['num_examples']}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
