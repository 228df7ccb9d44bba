"""What a comparison shows, by rule: each arm's paired difference from the reference arm in plain words.

A difference counts where its 95 % interval lies on one side of zero; everything else is a null result, and is called one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ett.evaluate.charts import Point, number
from ett.evaluate.html import words
from ett.evaluate.page import DESCRIPTIONS, HIGHER

INTERVAL = "95\u00a0% interval"
Outcome = Literal["better", "worse", "null", "unknown"]

MAIN_MEASURES: dict[str, tuple[str, str]] = {
    "caption_loss": (
        "caption loss",
        "how unexpected the right answer is to the language model, over all sources",
    ),
    "drawn_text.caption_loss_per_character": (
        "caption loss per letter of drawn text",
        "the same for each letter of words that have to be read from the picture",
    ),
    "drawn_text.character_error_rate": (
        "character error rate on drawn text",
        "letters to change until the model's answer is the right one, for each letter of it",
    ),
    "drawn_text.exact_match": (
        "texts read exactly",
        "share of drawn texts in which every letter of the model's answer is right",
    ),
    "drawn_scenes.exact_match": (
        "scenes answered right",
        "share of questions about drawn scenes, or descriptions of them, that the model answers exactly",
    ),
    "text_questions.vqa_accuracy": (
        "questions about text answered right",
        "share of questions about single characters of drawn texts that the model answers right",
    ),
    "names.naming_rank": (
        "rank of the right name",
        "place of the picture's name among other names, ordered by likelihood; 1 is best",
    ),
    "drawn_scenes.drawn_scenes_right": (
        "scenes drawn right",
        "share of drawings in which shapes, counts, colours and places are what the prompt asks for",
    ),
    "names.drawn_choice": (
        "drawings told by name",
        "share of drawings that are nearer to a real picture of their name than to nine of other names",
    ),
    "drawn_text.drawn_words_read": (
        "drawn words read",
        "share of drawings of words in which the OCR judge reads the word",
    ),
    "psnr": (
        "PSNR of reconstructions",
        "how well the picture survives the tokenizer",
    ),
}
"""Metric -> (what it is called inside a sentence, what it says in plain words). The verdict is about these."""

POOLED_MEASURES: dict[str, tuple[str, str]] = {
    "caption_loss_per_character": (
        "caption loss per letter",
        "how unexpected each letter of the right answer is to the language model",
    ),
    "character_error_rate": (
        "character error rate",
        "letters to change until the model's answer is the right one, for each letter of it",
    ),
    "exact_match": ("answers exactly right", "share of answers that are the right one, letter by letter"),
    "vqa_accuracy": ("questions answered right", "share of short answers that are right, by the VQA challenge's rules"),
}
"""The same over all sources, where none of the main measures' own is among them."""


@dataclass(frozen=True)
class Finding:
    """The reference arm against another on one metric.

    Attributes:
        metric: dotted name. title: what it is called inside a sentence.
        other: the other arm.
        outcome: of the reference arm: "better", "worse", "null" where the interval holds zero, "unknown" where nothing was
            measured or there is no interval.
        values: of the reference arm and of the other.
        change: reference minus other. interval: of `change`, 95 %, paired.
        gain: `change` turned so that above zero the reference is better. gain_interval: of `gain`.
        places: decimal places in which the metric's figures are written, the same for all arms.
    """

    metric: str
    title: str
    other: str
    outcome: Outcome
    values: tuple[float | None, float | None]
    change: float | None
    interval: Point | None
    gain: float | None
    gain_interval: Point | None
    places: int


def figure(metrics: Mapping[str, Any] | None, metric: str) -> Mapping[str, Any]:
    """One metric's ``{"value", "interval", "num_examples"}``; {} where it was not measured."""
    found = (metrics or {}).get(metric)
    return found if isinstance(found, Mapping) else {}


def value_of(found: Mapping[str, Any]) -> float | None:
    value = found.get("value")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def interval_of(found: Mapping[str, Any]) -> Point | None:
    ends = found.get("interval")
    if not isinstance(ends, Sequence) or len(ends) != 2:
        return None
    good = all(isinstance(end, int | float) and math.isfinite(end) for end in ends)
    return (float(ends[0]), float(ends[1])) if good else None


def main_metrics(summary: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """`MAIN_MEASURES` as far as the reference arm was measured on them: of others nothing can be said for or against it.

    Where no family of a metric is among the sources (someone's own manifest), the metric pooled over all sources
    takes its place.
    """
    measured = set(summary["arms"][summary["reference"]]["metrics"])
    families = {metric.rpartition(".")[2] for metric in MAIN_MEASURES if metric in measured}
    found: dict[str, tuple[str, str]] = {}
    for metric, (title, meaning) in MAIN_MEASURES.items():
        plain = metric.rpartition(".")[2]
        if metric in measured:
            found[metric] = (title, meaning)
        elif plain in measured and plain not in families:
            found.setdefault(plain, POOLED_MEASURES.get(plain, (title, meaning)))
    return found


def findings(summary: Mapping[str, Any]) -> dict[str, list[Finding]]:
    """Main metric -> what it says of the reference arm against each other arm."""
    reference = summary["reference"]
    differences = {
        other: summary["differences"].get(f"{other} - {reference}", {})
        for other in summary["arms"]
        if other != reference
    }
    found: dict[str, list[Finding]] = {}
    for metric, (title, _) in main_metrics(summary).items():
        values = {arm: value_of(figure(content["metrics"], metric)) for arm, content in summary["arms"].items()}
        places = decimals(*(interval_of(figure(metrics, metric)) for metrics in differences.values()))
        found[metric] = [
            _finding(metric, title, other, figure(metrics, metric), (values.get(reference), values[other]), places)
            for other, metrics in differences.items()
        ]
    return found


def against(found: Mapping[str, Sequence[Finding]]) -> dict[str, list[Finding]]:
    """`findings` by the other arm instead."""
    turned: dict[str, list[Finding]] = {}
    for each in found.values():
        for finding in each:
            turned.setdefault(finding.other, []).append(finding)
    return turned


def _finding(
    metric: str,
    title: str,
    other: str,
    difference: Mapping[str, Any],
    values: tuple[float | None, float | None],
    places: int,
) -> Finding:
    value, ends = value_of(difference), interval_of(difference)
    higher = DESCRIPTIONS[metric.rpartition(".")[2]][2] == HIGHER
    # the summary has other minus reference
    change = None if value is None else -value
    interval = None if ends is None else (-ends[1], -ends[0])
    gain, gains = (change, interval) if higher else (value, ends)
    outcome: Outcome = "unknown"
    if gain is not None and gains is not None:
        outcome = "better" if gains[0] > 0 else "worse" if gains[1] < 0 else "null"
    return Finding(metric, title, other, outcome, values, change, interval, gain, gains, places)


# -- in words ----------------------------------------------------------------------------------------------------------


def arm_title(arm: str) -> str:
    """An arm's name inside a sentence, plain text."""
    return "tuned (ett)" if arm == "ett" else words(arm)


def sentence(finding: Finding, reference: str) -> str:
    """One finding as plain text, to stand below what was measured, for example:

    "tuned (ett) 2.31, embedding frozen 2.50: lower by 0.19 (95 % interval 0.12 to 0.25)"
    """
    places = finding.places
    own, other = (fixed(value, places) for value in finding.values)
    start = f"{arm_title(reference)} {own}, {arm_title(finding.other)} {other}"
    if finding.change is None:
        return f"{start}: not compared, for it was not measured in both arms"
    unit = DESCRIPTIONS[finding.metric.rpartition(".")[2]][1]
    size = fixed(abs(finding.change), places) + (f" {unit}" if unit == "dB" else "")
    way = "the same" if finding.change == 0 else f"lower by {size}" if finding.change < 0 else f"higher by {size}"
    if finding.interval is None:
        return f"{start}: {way}; there is no interval, so nothing is claimed"
    low, high = finding.interval
    if finding.change < 0:
        low, high = -high, -low
    interval = f"{INTERVAL} {fixed(low, places)} to {fixed(high, places)}"
    if finding.outcome == "null":
        return f"{start}: no difference shown ({way}; {interval}, which includes 0)"
    worse = ": worse" if finding.outcome == "worse" else ""
    return f"{start}: {way} ({interval}){worse}"


def headline(found: Mapping[str, Sequence[Finding]], reference: str, adjective: str) -> str:
    """The whole in one sentence, plain text: the first main metric against every arm, or that nothing was shown.

    Args:
        found: by metric, as `findings` gives it. adjective: of the data ("held-out").
    """
    everything = [finding for each in found.values() for finding in each]
    if not everything or all(finding.outcome == "unknown" for finding in everything):
        return "Nothing can be said: no difference between the arms was measured."
    name = capital(arm_title(reference))
    if all(finding.outcome in ("null", "unknown") for finding in everything):
        return (
            f"A null result: no difference shown between {arm_title(reference)} and any other arm on any main measure."
        )
    firsts = next(each for each in found.values() if each)
    phrases = {
        "better": "better than {}",
        "worse": "worse than {}",
        "null": "no difference shown from {}",
        "unknown": "not compared with {}",
    }
    if all(finding.outcome == "null" for finding in firsts):
        others = [arm_title(finding.other) for finding in firsts]
        title = f"A null result on {adjective} {firsts[0].title}"
        return f"{title}: no difference shown between {arm_title(reference)} and {_listed(others)}."
    said = []
    for outcome, phrase in phrases.items():
        others = [arm_title(finding.other) for finding in firsts if finding.outcome == outcome]
        if others:
            said.append(phrase.format(_listed(others)))
    return f"{name} on {adjective} {firsts[0].title}: {'; '.join(said)}."


def tally(each: Sequence[Finding]) -> str:
    """How often the reference arm is better, worse or neither than one other arm; plain text, worse ones by name."""
    said = []
    for outcome, phrase in (
        ("better", "better on {n} of {all} main measures"),
        ("worse", "worse on {n} ({titles})"),
        ("null", "no difference shown on {n}"),
        ("unknown", "not compared on {n}"),
    ):
        chosen = [finding.title for finding in each if finding.outcome == outcome]
        if chosen or outcome == "better":
            said.append(phrase.format(n=len(chosen) or "none", all=len(each), titles=_listed(chosen)))
    return f"{'; '.join(said)}."


def capital(text: str) -> str:
    """`text` with a capital first, the rest as it is."""
    return text[:1].upper() + text[1:]


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def decimals(*intervals: Point | None) -> int:
    """Decimal places that show one or two digits of the narrowest interval, and no end as zero that is not; -1 for none."""
    widths = [high - low for low, high in filter(None, intervals) if high > low]
    if not widths:
        return -1
    places = min(5, max(0, math.ceil(-math.log10(min(widths)) - 0.25) + 1))
    nearest = min((min(map(abs, ends)) for ends in filter(None, intervals) if ends[0] > 0 or ends[1] < 0), default=1.0)
    while places < 5 and round(nearest, places) == 0:
        places += 1
    return places


def fixed(value: float | None, places: int) -> str:
    """A number with as many decimal places (-1: four significant digits), with a real minus sign; a dash for None."""
    if value is None:
        return "–"
    if places < 0 or value == 0:
        return number(value).replace("-", "−")
    return f"{round(value, places) + 0.0:.{places}f}".replace("-", "−")
