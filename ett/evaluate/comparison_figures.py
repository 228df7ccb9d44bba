"""A comparison in figures: the verdict on each main measure, tables with a column for each arm, plots of the differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ett.evaluate.charts import Row, forest_plot
from ett.evaluate.html import duration, folded, safe, table
from ett.evaluate.metric_cells import metric_cells, metric_head
from ett.evaluate.page import DESCRIPTIONS
from ett.evaluate.verdict import (
    INTERVAL,
    Finding,
    against,
    arm_title,
    capital,
    decimals,
    figure,
    findings,
    fixed,
    headline,
    interval_of,
    main_metrics,
    sentence,
    tally,
    value_of,
)

ALSO = ("ssim", "lite0_distance", "codebook_usage", "indices_changed", "exact_match")
"""Metrics below the main ones in the table of a run."""

SIGNS = {"better": "▲", "worse": "▼", "null": "○", "unknown": "–"}

Summary = Mapping[str, Any]
"""The content of a comparison's ``report.json``."""


def seeds_of(summary: Summary) -> list[str]:
    """Names of the seeds of the arm that has most."""
    return max(
        ([str(seed) for seed in arm.get("seeds") or ()] for arm in summary["arms"].values()), key=len, default=[]
    )


def split_of(summary: Summary) -> str:
    """Of the built-in data, that the figures come from."""
    config = summary["recipe"].get("evaluation")
    config = config if isinstance(config, Mapping) else {}
    return str(config.get("report_split") or config.get("split") or "validation")


def adjective_of(summary: Summary) -> str:
    """What a measure on that split is called: "held-out"."""
    split = split_of(summary)
    return {"heldout": "held-out", "validation": "validation"}.get(split, f"{split}-split")


# -- the verdict -------------------------------------------------------------------------------------------------------


def verdict(summary: Summary, *, brief: bool = False) -> str:
    """Headline and tally against each arm; unless `brief`, also every main measure with a sentence for each arm."""
    found, reference, adjective = findings(summary), str(summary["reference"]), adjective_of(summary)
    tallies = "".join(
        f"<li><strong>Against {safe(arm_title(other))}:</strong> {safe(tally(each))}</li>"
        for other, each in against(found).items()
    )
    said = f'<p class="headline">{safe(headline(found, reference, adjective))}</p><ul>{tallies}</ul>'
    if brief:
        return said
    cards = []
    for metric, (title, meaning) in main_metrics(summary).items():
        items = "".join(
            f'<li><span class="sign {finding.outcome}" aria-hidden="true">{SIGNS[finding.outcome]}</span>'
            f"{safe(capital(sentence(finding, reference)))}.</li>"
            for finding in found[metric]
        )
        cards.append(
            f"<div><h3>{safe(capital(f'{adjective} {title}'))}</h3>"
            f'<p class="unit">{safe(capital(meaning))}{_chance(summary, metric)}: {_way(metric)}.</p>'
            f'<ul class="verdict">{items}</ul></div>'
        )
    return said + _rule(summary) + f'<div class="cards">{"".join(cards)}</div>'


def _rule(summary: Summary) -> str:
    one = len(seeds_of(summary)) <= 1
    over = "examples" if one else "examples and seeds"
    caution = " With one seed they do not say how much another seed would change." if one else ""
    return (
        f"<p>▲ better, ▼ worse, ○ no difference shown. By rule: a difference counts if its {INTERVAL} (paired bootstrap over "
        f"{over}) leaves out zero.{caution}</p>"
    )


def _way(metric: str) -> str:
    _, unit, way = DESCRIPTIONS[metric.rpartition(".")[2]]
    return safe(", ".join(part for part in (unit, way) if part))


def _chance(summary: Summary, metric: str) -> str:
    """Where guessing would be, for the rank among candidates."""
    if not metric.endswith("naming_rank"):
        return ""
    family = metric.removesuffix("naming_rank")
    # known for each source alone, where it hardly differs
    given = [
        value_of(found)
        for arm in summary["arms"].values()
        for name, found in arm["metrics"].items()
        if name.startswith(family) and name.rpartition(".")[2] == "naming_candidates"
    ]
    counts = [count for count in given if count is not None]
    if not counts:
        return ""
    mean = sum(counts) / len(counts)
    return f" ({mean:.0f} names, so chance is {(mean + 1) / 2:.1f})"


# -- tables ------------------------------------------------------------------------------------------------------------


def arms_table(summary: Summary, *, also: bool) -> str:
    """Main metrics, one column for each arm; with `also` the further ones and the time that training took."""
    columns, arms = _columns(summary), list(summary["arms"])
    # as many decimal places as the verdict has
    places = {
        metric: max((finding.places for finding in each), default=-1) for metric, each in findings(summary).items()
    }
    rows = [
        _metric_row(metric, columns, arms, title, places[metric])
        for metric, (title, _) in main_metrics(summary).items()
    ]
    if also:
        shown = [metric for metric in ALSO if any(figure(metrics, metric) for metrics in columns.values())]
        rows += [_metric_row(metric, columns, arms) for metric in shown]
        times = [summary["arms"].get(arm, {}).get("seconds") for arm in columns]
        if any(time is not None for time in times):
            cells = ["–" if time is None else duration(float(time)) for time in times]
            rows.append(['Training time<br><span class="unit">mean over seeds</span>', *cells])
    if not rows:
        return "<p>No arm was measured.</p>"
    start = " Start: the model before any of this training." if len(columns) > len(arms) else ""
    note = (
        f'<p class="unit">Below each value its {INTERVAL} over examples. ★ marks the best value among the arms, whether or not '
        f"the difference is sure: that is for the differences to say.{start}</p>"
    )
    return note + table(_head(columns), rows, range(1, len(columns) + 1), "arms")


def other_figures(summary: Summary) -> str:
    """What `arms_table` leaves out, a table for each source and each family of sources, folded; then `by_seed`."""
    columns, arms = _columns(summary), list(summary["arms"])
    above = {*main_metrics(summary), *ALSO}
    groups: dict[str, list[str]] = {}
    for metric in dict.fromkeys(metric for metrics in columns.values() for metric in metrics):
        if metric not in above:
            groups.setdefault(metric.rpartition(".")[0], []).append(metric)
    # all sources first, then families before their members
    tables = [
        f"<h3>{safe(source) or 'All sources'}</h3>"
        + table(
            _head(columns),
            [_metric_row(metric, columns, arms) for metric in groups[source]],
            range(1, len(columns) + 1),
            "arms",
        )
        for source in sorted(groups, key=lambda source: (source != "", source))
    ]
    return folded("Every other measure, by source", "".join(tables)) + by_seed(summary)


def by_seed(summary: Summary) -> str:
    """Main metrics of every single seed, folded; nothing where there is one seed."""
    seeds, arms = seeds_of(summary), {name: summary["arms"][name] for name in _ordered(summary)}
    if len(seeds) < 2:
        return ""
    rows = []
    for metric, (title, _) in main_metrics(summary).items():
        found = [
            [figure(((arm.get("seeds") or {}).get(seed) or {}).get("metrics"), metric) for arm in arms.values()]
            for seed in seeds
        ]
        places = decimals(*(interval_of(each) for row in found for each in row))
        for seed, row in zip(seeds, found, strict=True):
            rows.append([safe(f"{capital(title)}, seed {seed}"), *(fixed(value_of(each), places) for each in row)])
    return folded("The main measures, by seed", table(_head(arms), rows, range(1, len(arms) + 1), "arms"))


def _ordered(summary: Summary) -> list[str]:
    """The arms, the reference first: on a phone it stays in sight."""
    return sorted(summary["arms"], key=lambda arm: arm != summary["reference"])


def _columns(summary: Summary) -> dict[str, Mapping[str, Any]]:
    """Column -> metrics: the arms, and the start where it was measured."""
    start = summary.get("start")
    columns = {arm: summary["arms"][arm]["metrics"] for arm in _ordered(summary)}
    return columns | ({"start": start.get("metrics") or {}} if isinstance(start, Mapping) else {})


def _head(columns: Mapping[str, Any]) -> list[str]:
    return ["Measure", *(safe(arm_title(column)) for column in columns)]


def _metric_row(
    metric: str, columns: Mapping[str, Mapping[str, Any]], arms: Sequence[str], title: str = "", places: int = -1
) -> list[str]:
    found = {column: figure(metrics, metric) for column, metrics in columns.items()}
    return [metric_head(metric, found.values(), title), *metric_cells(metric, found, arms, places).values()]


# -- differences -------------------------------------------------------------------------------------------------------


def forest(summary: Summary) -> str:
    """A panel for each main metric: every arm's difference from the reference arm, with its interval."""
    name, plots = arm_title(str(summary["reference"])), []
    for metric, each in findings(summary).items():
        rows = [_forest_row(i + 1, finding) for i, finding in enumerate(each) if finding.gain is not None]
        unit = DESCRIPTIONS[metric.rpartition(".")[2]][1]
        if rows:
            plots.append(forest_plot(capital(each[0].title), unit, rows, f"{name} worse", f"{name} better"))
    if not plots:
        return ""
    note = (
        f"<p>How far {safe(name)} is from each other arm, with {INTERVAL}. Right of the dashed line at zero {safe(name)} is "
        "better, whichever way the measure runs. Filled marks: the interval leaves out zero; hollow: no difference shown.</p>"
    )
    return f'<h3>Differences</h3>{note}<div class="charts">{"".join(plots)}</div>'


def _forest_row(series: int, finding: Finding) -> Row:
    assert finding.gain is not None
    note, interval = fixed(finding.gain, finding.places), finding.gain_interval
    if interval is not None:
        note += f" ({fixed(interval[0], finding.places)} to {fixed(interval[1], finding.places)})"
    return Row(
        series,
        f"against {arm_title(finding.other)}",
        f"{SIGNS[finding.outcome]} {note}",
        finding.gain,
        interval,
        finding.outcome in ("better", "worse"),
    )
