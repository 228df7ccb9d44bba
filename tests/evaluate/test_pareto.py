"""The plot of two axes, the table and the clock: what they say is what the summary holds."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from ett.evaluate.comparison_markdown import comparison_markdown
from ett.evaluate.pareto import NAMESPACE, pareto_points, pareto_section, pareto_svg
from ett.evaluate.wall_clock import at_equal_time, equal_time_section, loss_by_time, running_times

LETTERS = "drawn_text.caption_loss_per_character"
PLACES = {"frozen": (0.1, 0.05), "better": (0.2, -0.03), "sharper": (0.5, 0.02), "worse": (-0.4, 0.04)}
"""Arm -> (PSNR, loss per letter), arm less ett."""


def metric(value: float) -> dict[str, Any]:
    return {"value": value, "interval": [value - 0.01, value + 0.01], "num_examples": 9}


@pytest.fixture
def summary() -> dict[str, Any]:
    arms = {"ett": {"psnr": metric(20.0), LETTERS: metric(2.0), "facts.text_loss": metric(1.5)}}
    arms |= {arm: {"psnr": metric(20 + x), LETTERS: metric(2 + y)} for arm, (x, y) in PLACES.items()}
    return {
        "name": "toy",
        "reference": "ett",
        "arms": {arm: {"metrics": metrics, "seconds": 61.0, "seeds": {}} for arm, metrics in arms.items()},
        "start": {"metrics": {"psnr": metric(19.5)}},
        "differences": {f"{arm} - ett": {"psnr": metric(x), LETTERS: metric(y)} for arm, (x, y) in PLACES.items()},
        "recipe": {},
    }


def test_points_are_differences_turned_so_that_more_is_better(summary: dict[str, Any]) -> None:
    measure, points = pareto_points(summary)
    assert measure == LETTERS
    found = {point.arm: point for point in points}
    assert (found["ett"].reconstruction, found["ett"].understanding) == (0.0, 0.0)
    assert found["better"].reconstruction == pytest.approx(0.2)
    assert found["better"].understanding == pytest.approx(0.03)
    across, up = found["frozen"].intervals
    assert across == pytest.approx((0.09, 0.11))
    assert up == pytest.approx((-0.06, -0.04))
    # "better" beats ett and frozen in both, "sharper" has more of one and less of the other
    assert {arm for arm, point in found.items() if point.best} == {"better", "sharper"}


def test_where_letters_were_not_measured_the_caption_loss_stands_in(summary: dict[str, Any]) -> None:
    for each in summary["differences"].values():
        each["caption_loss"] = each.pop(LETTERS)
    assert pareto_points(summary)[0] == "caption_loss"
    summary["differences"] = {}
    assert pareto_svg(summary) == pareto_section(summary) == ""


def test_the_drawing_is_svg_with_every_arm_and_no_colour(summary: dict[str, Any]) -> None:
    drawing = pareto_svg(summary)
    root = ElementTree.fromstring(drawing)
    width, height = (float(each) for each in root.attrib["viewBox"].split()[2:])
    circles = [each for each in root.iter() if each.tag.endswith("circle")]
    assert len(circles) == len(summary["arms"])
    assert all(0 < float(c.attrib["cx"]) < width and 0 < float(c.attrib["cy"]) < height for c in circles)
    assert sum(c.attrib["class"] == "on" for c in circles) == 2
    text = " ".join(each.text or "" for each in root.iter() if each.tag.endswith("text"))
    assert all(arm in text for arm in PLACES)
    # readable in grey, light and dark: one ink, and it follows the reader's scheme
    colours = set(re.findall(r"#[0-9a-f]{3,6}", drawing))
    assert colours == {"#1b1f24", "#fff", "#e6edf3", "#0d1117"}
    assert "prefers-color-scheme:dark" in drawing
    # within a page a drawing needs no namespace, and a page names no address
    assert drawing.replace(NAMESPACE, "") in pareto_section(summary)


def test_an_arm_far_away_leaves_the_others_their_room(summary: dict[str, Any]) -> None:
    plain = pareto_svg(summary)
    summary["arms"]["lost"] = summary["arms"]["worse"]
    summary["differences"]["lost - ett"] = {"psnr": metric(-6.1), LETTERS: metric(1.7)}
    drawing = pareto_svg(summary)

    def ticks_of(svg: str) -> list[str | None]:
        return [
            t.text
            for t in ElementTree.fromstring(svg).iter()
            if t.tag.endswith("text") and t.attrib["class"] in ("m", "e")
        ]

    assert ticks_of(drawing) == ticks_of(plain)
    assert "lost (−6.1, −1.70)" in drawing
    assert "lost" not in plain


def test_the_table_has_every_arm_its_differences_and_the_start(summary: dict[str, Any]) -> None:
    lines = comparison_markdown(summary).splitlines()
    rows = {line.split("|")[1].strip(" *"): line for line in lines if line.startswith("|")}
    assert {"start", "tuned (ett)", *PLACES} <= set(rows)
    assert "20.100 (+0.100 [0.090, 0.110])" in rows["frozen"]
    assert "1.970 (−0.030 [−0.040, −0.020])" in rows["better"]
    assert "19.500" in rows["start"]
    assert "(" not in rows["tuned (ett)"].split("|", 2)[2], "the reference differs from nothing"
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def events(*validations: tuple[float, float], stage: str = "semantic", start: float = 100.0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"event": "reach", "stage": stage, "step": 0, "time": start}]
    for time, loss in validations:
        found.append({"event": "validation", "stage": stage, "step": 1, "time": time, "losses": {"caption_loss": loss}})
    return found


def test_the_clock_counts_stages_and_averages_seeds() -> None:
    one = events((110, 2.0), (120, 1.0)) + events((510, 0.5), stage="chat", start=500.0)
    two = events((112, 4.0), (124, 3.0)) + events((512, 1.5), stage="chat", start=500.0)
    assert loss_by_time([one, two]) == [(11.0, 3.0), (22.0, 2.0), (33.0, 1.0)]
    assert loss_by_time([one, events((110, 2.0))]) == []


def test_pauses_are_no_training() -> None:
    """Stopped at 30 seconds, resumed an hour later; and what lies between two stages."""

    def told(stage: str, event: str, time: float) -> dict[str, Any]:
        return {"event": event, "stage": stage, "step": 1, "time": time, "losses": {"caption_loss": 1.0}}

    run = [
        told("align", "step", 10),
        told("align", "step", 30),
        told("align", "resumed", 3630),
        told("align", "step", 3640),
        told("align", "validation", 3645),
        told("semantic", "resumed", 9000),
        told("semantic", "step", 9002),
        told("semantic", "validation", 9003),
    ]
    assert running_times(run) == [0, 20, 20, 30, 35, 35, 37, 38]
    assert running_times([]) == []
    assert [seconds for seconds, _ in loss_by_time([run])] == [35, 38]


def test_at_equal_time_slow_arms_have_come_less_far() -> None:
    curves = {"slow": [(10.0, 3.0), (20.0, 2.0), (40.0, 1.0)], "fast": [(5.0, 3.0), (25.0, 1.5)], "none": []}
    limit, found = at_equal_time(curves)
    assert limit == 25.0
    assert {each.arm: each.loss for each in found} == {"slow": pytest.approx(1.75), "fast": 1.5}
    section = equal_time_section(curves)
    assert "1.7500" in section
    assert "1.0000" in section
    assert equal_time_section({"a": [(1.0, 1.0)]}) == ""
