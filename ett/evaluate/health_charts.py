"""The tokenizer's health in a run's report: the series of the log's ``health`` events, and the warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ett.evaluate.charts import Series, line_chart
from ett.evaluate.html import finite, safe, titled
from ett.evaluate.run_folder import RunFacts

_CHARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Codes in use", "share of those that could be", {"usage": "in use"}),
    ("Perplexity", "codes", {"index_perplexity": "indices", "softmax_perplexity": "index softmax"}),
    ("Index softmax", "share", {"top1_mass": "mass of the largest code", "nearest_share": "nearest code chosen"}),
    ("Entropy terms", "nats", {"row_entropy": "of a token", "usage_entropy": "of the usage"}),
    ("Tokens with another index than at first", "share", {"indices_changed": "changed"}),
    ("Reconstruction against the first", "dB of PSNR", {"reconstruction_drift_psnr": "now and then"}),
)
"""(title, unit, value in the log -> its line's name)."""
_PLACES = {"encoder": "the encoder's last layer", "codebook": "the codebook"}


def health_charts(facts: RunFacts, stage: str) -> str:
    """HTML of one stage's charts and warnings; empty where the log has neither."""
    events, warnings = facts.of(stage, "health"), facts.of(stage, "warning")
    charts = [
        line_chart(
            title, [Series(name, _points(events, "values", value)) for value, name in lines.items()], "step", unit
        )
        for title, unit, lines in _CHARTS
    ]
    norms = [{place: _mapping(terms) for place, terms in _mapping(e.get("gradient_norms")).items()} for e in events]
    for place, words in _PLACES.items():
        terms = dict.fromkeys(str(term) for found in norms for term in found.get(place, {}))
        by_place = [{"step": e["step"], place: found.get(place)} for e, found in zip(events, norms, strict=True)]
        lines = [Series(titled(term), _points(by_place, place, term)) for term in terms]
        charts.append(line_chart(f"Gradient norms at {words}", lines, "step", "of unweighted losses"))
    drawn = f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""
    told = "".join(f"<li>Step {e['step']}: {safe(e.get('message', ''))}</li>" for e in warnings)
    content = (f"<ul>{told}</ul>" if told else "") + drawn
    return f"<h3>{safe(stage)}</h3>{content}" if content else ""


def _points(events: Sequence[Mapping[str, Any]], group: str, name: str) -> list[tuple[float, float]]:
    found = [(event["step"], finite(_mapping(event.get(group)))) for event in events]
    return [(float(step), values[name]) for step, values in found if name in values]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
