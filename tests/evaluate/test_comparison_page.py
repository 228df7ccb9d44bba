"""The page of a comparison: verdicts by rule, every arm everywhere, self-contained, safe whatever the data say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from ett.evaluate.charts import DASHES, Row, Series, forest_plot, line_chart
from ett.evaluate.comparison_evidence import mean_curve
from ett.evaluate.comparison_page import ComparedPicture, ComparisonFacts, render_comparison
from ett.evaluate.verdict import against, decimals, findings, fixed, headline, main_metrics, sentence, tally
from tests.evaluate.conftest import picture
from tests.evaluate.test_report import HOSTILE, Page

ARMS = ("index_frozen", "embedding_frozen", "reconstruction_only", "ett")
MAIN = {
    "caption_loss": 2.5,
    "drawn_text.caption_loss_per_character": 3.0,
    "drawn_text.character_error_rate": 0.8,
    "names.naming_rank": 25.0,
    "psnr": 17.0,
}
BETTER = {
    "caption_loss": (0.19, (0.12, 0.25)),
    "drawn_text.caption_loss_per_character": (0.3, (0.2, 0.4)),
    "drawn_text.character_error_rate": (0.1, (0.05, 0.15)),
    "names.naming_rank": (4.0, (1.0, 7.0)),
    "psnr": (-0.4, (-0.6, -0.2)),
}
NULL = dict.fromkeys(MAIN, (0.01, (-0.03, 0.05)))

Differences = Mapping[str, tuple[float | None, tuple[float, float] | None]]


def figure(value: float | None, interval: Sequence[float] | None = None) -> dict[str, Any]:
    return {"value": value, "interval": None if interval is None else list(interval), "num_examples": 96}


def summary(
    differences: Mapping[str, Differences], arms: Sequence[str] = ARMS, seeds: int = 1, reference: str = "ett"
) -> dict[str, Any]:
    """A report.json in which the reference arm has the figures of `MAIN` and the others theirs by `differences`."""
    tables: dict[str, dict[str, Any]] = {}
    for arm in arms:
        given = differences.get(arm, {})
        tables[arm] = {}
        for metric, value in MAIN.items():
            change = given.get(metric, (0.0, None))[0] or 0.0
            tables[arm][metric] = figure(value + change, (value + change - 0.1, value + change + 0.1))
        tables[arm]["names.pair.naming_candidates"] = figure(100.0)
        tables[arm]["drawn_text.font.exact_match"] = figure(0.25, (0.2, 0.3))
    return {
        "name": "demo",
        "reference": reference,
        "arms": {
            arm: {
                "model": f"{arm}/stages/0-semantic",
                "seconds": 200.0,
                "metrics": tables[arm],
                "seeds": {str(seed): {"model": f"{arm}/seed-{seed}", "metrics": tables[arm]} for seed in range(seeds)},
            }
            for arm in arms
        },
        "start": {"metrics": {"psnr": figure(16.5)}},
        "differences": {
            f"{arm} - {reference}": {
                metric: {**figure(value, interval), "num_seeds": seeds} for metric, (value, interval) in given.items()
            }
            for arm, given in differences.items()
        },
        "recipe": {
            "name": "demo",
            "arms": {arm: {} if arm == reference else {"model.visual_input": "index"} for arm in arms},
            "seeds": list(range(seeds)),
            "stages": [{"stage": "semantic", "steps": 150, "batch_size": 16}],
            "evaluation": {"split": "validation", "report_split": "heldout"},
        },
        "versions": {"torch": "2.11.0"},
        "data": [{"name": "names.pair", "num_examples": 128, "available": 500}],
        "command": "ett ablate recipe.yaml --out demo",
    }


def events(seed: int = 0) -> list[dict[str, Any]]:
    norms = {"encoder": 0.0, "language_model": 1.5}
    found: list[dict[str, Any]] = [
        {"event": "reach", "stage": "semantic", "step": 0, "time": 0.0, "caption_gradient_norms": norms}
    ]
    for step in range(1, 101):
        losses = {"loss": 3.0, "caption_loss": 3.0 - step / 100 + seed, "reconstruction_loss": float("nan")}
        found.append({"event": "step", "stage": "semantic", "step": step, "time": float(step), "losses": losses})
        if step % 25 == 0:
            found.append({**found[-1], "event": "validation"})
    return found


def facts(found: Mapping[str, Any], **changes: Any) -> ComparisonFacts:
    arms, seeds = list(found["arms"]), len(found["recipe"]["seeds"])
    right = {"ett": 3, "embedding_frozen": 2}
    predictions = {
        arm: [
            {
                "id": f"names/{i}",
                "prediction": f"word {i}." if i < right.get(arm, 1) else "no",
                "reference": f"word {i}",
            }
            for i in range(5)
        ]
        for arm in arms
    }
    before, after = picture(1, 16, 16), picture(2, 16, 16)
    shown = [
        ComparedPicture(
            "names.pair: an owl",
            picture(0, 16, 16),
            {"start": before, **{arm: after if arm in ("ett", "reconstruction_only") else before for arm in arms}},
        )
    ]
    made = ComparisonFacts(found, {arm: [events(i) for i in range(seeds)] for arm in arms}, predictions, shown, None)
    return replace(made, **changes)


def rendered(found: ComparisonFacts) -> Page:
    return Page(render_comparison(found))


def flat(page: Page) -> str:
    return re.sub(r"\s+", " ", page.text.replace("\xa0", " "))


def all_of(differences: Differences) -> dict[str, Differences]:
    return dict.fromkeys(ARMS[:3], differences)


# -- the verdict -------------------------------------------------------------------------------------------------------


def test_better() -> None:
    text = flat(rendered(facts(summary(all_of(BETTER)))))
    assert (
        "Tuned (ett) on held-out caption loss: better than index frozen, embedding frozen and reconstruction only."
        in text
    )
    assert "Held-out caption loss" in text
    assert "Tuned (ett) 2.50, embedding frozen 2.69: lower by 0.19 (95 % interval 0.12 to 0.25)." in text
    assert "Tuned (ett) 17.00, embedding frozen 16.60: higher by 0.40 dB (95 % interval 0.20 to 0.60)." in text
    assert text.count("better on 5 of 5 main measures.") == 3
    assert "chance is 50.5" in text
    assert ": worse" not in text
    assert "no difference shown from" not in text


def test_one_family_does_not_lend_its_name_to_another() -> None:
    """Texts of drawn pictures beside a manifest: no "scenes" where none were asked about; a manifest alone has plain titles."""

    def titles(*metrics: str) -> dict[str, str]:
        arms = {"ett": {"metrics": dict.fromkeys(metrics)}}
        return {metric: title for metric, (title, _) in main_metrics({"reference": "ett", "arms": arms}).items()}

    assert titles("exact_match", "drawn_text.exact_match") == {"drawn_text.exact_match": "texts read exactly"}
    assert titles("exact_match", "mine.exact_match") == {"exact_match": "answers exactly right"}
    both = titles("vqa_accuracy", "text_questions.vqa_accuracy", "drawn_scenes.exact_match", "exact_match")
    assert both == {
        "drawn_scenes.exact_match": "scenes answered right",
        "text_questions.vqa_accuracy": "questions about text answered right",
    }


def test_worse() -> None:
    worse: Differences = {"caption_loss": (-0.3, (-0.4, -0.2)), "psnr": (0.5, (0.4, 0.6))}
    found = summary({**all_of(BETTER), "reconstruction_only": worse})
    text = flat(rendered(facts(found)))
    assert "better than index frozen and embedding frozen; worse than reconstruction only." in text
    assert "Tuned (ett) 2.50, reconstruction only 2.20: higher by 0.30 (95 % interval 0.20 to 0.40): worse." in text
    assert "Tuned (ett) 17.00, reconstruction only 17.50: lower by 0.50 dB (95 % interval 0.40 to 0.60): worse." in text
    assert (
        "better on none of 5 main measures; worse on 2 (caption loss and PSNR of reconstructions); not compared" in text
    )


def test_null() -> None:
    text = flat(rendered(facts(summary(all_of(NULL)))))
    assert "A null result: no difference shown between tuned (ett) and any other arm on any main measure." in text
    assert (
        "Tuned (ett) 2.50, embedding frozen 2.51: no difference shown (lower by 0.01; 95 % interval −0.03 to 0.05, which "
        "includes 0)." in text
    )
    assert text.count("better on none of 5 main measures; no difference shown on 5.") == 3


def test_null_on_the_first_measure_only() -> None:
    found = {"embedding_frozen": {**BETTER, "caption_loss": NULL["caption_loss"]}}
    text = flat(rendered(facts(summary(found, ("embedding_frozen", "ett")))))
    assert (
        "A null result on held-out caption loss: no difference shown between tuned (ett) and embedding frozen." in text
    )
    assert "better on 4 of 5 main measures; no difference shown on 1." in text


def test_what_was_not_measured_is_not_claimed() -> None:
    found = summary(
        {"embedding_frozen": {"caption_loss": (0.2, None), "psnr": (None, None)}}, ("embedding_frozen", "ett")
    )
    found["arms"]["embedding_frozen"]["metrics"]["psnr"] = figure(None)
    text = flat(rendered(facts(found)))
    assert "Nothing can be said: no difference between the arms was measured." in text
    assert "there is no interval, so nothing is claimed" in text
    assert "embedding frozen –: not compared, for it was not measured in both arms" in text


def test_outcomes_follow_the_direction_of_the_metric() -> None:
    found = findings(summary(all_of(BETTER)))
    assert {finding.outcome for each in found.values() for finding in each} == {"better"}
    assert all(finding.gain is not None and finding.gain > 0 for each in found.values() for finding in each)
    edge = dict.fromkeys(MAIN, (0.1, (0.0, 0.2)))
    assert {f.outcome for each in findings(summary(all_of(edge))).values() for f in each} == {"null"}
    turned = against(found)
    assert list(turned) == list(ARMS[:3])
    assert tally(turned["index_frozen"]) == "better on 5 of 5 main measures."
    assert headline({}, "ett", "held-out").startswith("Nothing can be said")
    assert "95\xa0% interval" in sentence(found["psnr"][0], "ett")


def test_other_sources_and_splits() -> None:
    """Someone's manifest has no families; figures of the validation split are not called held-out."""
    found = summary({"a": {}}, ("a", "b"), reference="b")
    for arm in found["arms"].values():
        arm["metrics"] = {"caption_loss": figure(2.0), "caption_loss_per_character": figure(1.0)}
    found["recipe"]["evaluation"] = {"split": "validation"}
    text = flat(rendered(facts(found)))
    assert "Validation caption loss per letter" in text
    assert "drawn text" not in text
    assert "held-out data" not in text
    assert "the validation split" in text


@pytest.mark.parametrize(
    ("intervals", "places"),
    [
        ([(0.12, 0.25)], 2),
        ([(20.8, 29.4)], 0),
        ([(0.12, 0.25), (0.1, 0.13)], 3),
        ([None, (5.0, 5.0)], -1),
        ([], -1),
        ([(0.0004, 0.3)], 4),
        ([(-0.0004, 0.3)], 2),
    ],
)
def test_decimals(intervals: Sequence[tuple[float, float] | None], places: int) -> None:
    assert decimals(*intervals) == places


def test_fixed() -> None:
    given = [(1.005, 1), (-0.25, 2), (-0.001, 2), (0.0, 3), (None, 2), (1234.5, -1)]
    assert [fixed(value, places) for value, places in given] == ["1.0", "−0.25", "0.00", "0", "–", "1234"]


# -- the page ----------------------------------------------------------------------------------------------------------


def test_sections_come_in_order() -> None:
    html = render_comparison(facts(summary(all_of(BETTER)), proof=summary(all_of(BETTER), seeds=3)))
    heads = re.findall(r"<h2>(.*?)</h2>", html)
    assert heads == [
        "What was compared",
        "What came out",
        "Figures",
        "Understanding against reconstruction",
        "Earlier figures, committed with the code: not from this run",
        "Curves",
        "At equal time instead of equal steps",
        "Pictures through the tokenizer",
        "Answers",
        "All other figures",
        "Where the caption loss reaches",
        "What exactly was run",
    ]


def test_what_was_compared() -> None:
    text = flat(rendered(facts(summary(all_of(BETTER)))))
    for words in (
        "Four ways to train",
        "semantic: 150 steps of 16 examples",
        "one seed",
        "128 examples (names.pair 128)",
        "which nothing was trained or tuned on",
        "looked up by the tokenizer's indices",
        "the caption loss does not reach it",
        "With one seed they do not say",
    ):
        assert words in text, words
    assert "Not equal" not in text


def test_unequal_arms_are_named() -> None:
    found = summary({"short": NULL}, ("short", "long"), reference="long")
    found["recipe"]["arms"] = {
        "short": {"stages.semantic": {"steps": 100, "losses": {}}, "data.0.weight": 1},
        "long": None,
    }
    text = flat(rendered(facts(found)))
    assert "short: stages.semantic.steps, short: data.0.weight." in text
    assert "but for the exceptions below" in text
    assert "stages.semantic: {losses: {}, steps: 100}" in text
    assert "Nothing: the recipe as it is." in text


def test_every_arm_is_everywhere() -> None:
    html = render_comparison(facts(summary(all_of(BETTER))))
    for head in ("What came out", "Figures", "Curves", "Answers", "Where the caption loss", "What exactly"):
        section = html[html.index(f"<h2>{head}") :].split("</section>")[0].replace("<wbr>", "")
        for arm in ARMS[:3]:
            assert arm in section or arm.replace("_", " ") in section, (head, arm)
        assert "ett" in section
    assert "★" in html


def test_best_is_marked_among_the_arms_only() -> None:
    found = summary(all_of(BETTER))
    found["start"]["metrics"]["psnr"] = figure(99.0, (98.0, 99.5))
    html = render_comparison(facts(found))
    assert re.findall(r"★ ([\d.]+)", html)[:5] == ["2.50", "3.00", "0.80", "25", "17.00"]
    assert "★ 99" not in html


def test_seeds() -> None:
    one = flat(rendered(facts(summary(all_of(BETTER)))))
    three = flat(rendered(facts(summary(all_of(BETTER), seeds=3))))
    assert "by seed" not in one
    assert "first seed" not in one
    assert "3 seeds (0, 1, 2)" in three
    assert "paired bootstrap over examples and seeds" in three
    assert "With one seed" not in three
    assert "Caption loss, seed 2" in three
    assert "means over 3 seeds" in three
    assert "out of 5 (first seed)" in three


def test_proof_is_labelled() -> None:
    proof = {**summary(all_of(NULL), seeds=3), "name": "longer", "date": "2026-11-22"}
    html = render_comparison(facts(summary(all_of(BETTER)), proof=proof))
    box = html[html.index("<aside>") : html.index("</aside>")]
    for words in (
        "not from this run",
        "“longer”",
        "3 seeds (0, 1, 2)",
        "dated 2026-11-22",
        "150 steps",
        "A null result",
    ):
        assert words in box, words
    assert "<aside>" not in render_comparison(facts(summary(all_of(BETTER))))


def test_answers_are_grouped_and_counted() -> None:
    text = flat(rendered(facts(summary(all_of(BETTER)))))
    assert "Tuned (ett) right, embedding frozen wrong: 1 of 5" in text
    assert "Embedding frozen right, tuned (ett) wrong: 0 of 5" in text
    assert "Both wrong: 2 of 5" in text
    assert "Both right: 2 of 5" in text
    assert "tuned (ett) 3, embedding frozen 2, index frozen 1, reconstruction only 1" in text


def test_pictures() -> None:
    page = rendered(facts(summary(all_of(BETTER))))
    # original, start with both frozen arms, the two tuned ones together, difference
    assert page.tags.count("img") == 4
    text = flat(page)
    assert "names.pair: an owl" in text
    assert "start against tuned (ett), ×1" in text
    assert "not amplified" in text
    assert "start index frozen embedding frozen" in text


def test_difference_of_pictures_is_amplified_as_far_as_it_can_be() -> None:
    before = PIL.Image.fromarray(np.full((8, 8, 3), 100, dtype=np.uint8))
    after = PIL.Image.fromarray(np.full((8, 8, 3), 110, dtype=np.uint8))
    found = summary(all_of(BETTER))
    shown = [ComparedPicture("grey", before, {"start": before, "ett": after})]
    assert "16 times amplified" in flat(rendered(facts(found, pictures=shown)))
    shown = [ComparedPicture("other sizes, no start", before, {"ett": after.resize((4, 4))})]
    text = flat(rendered(facts(found, pictures=shown)))
    assert "amplified" not in text


def test_little_is_enough() -> None:
    """Two arms, no start, no pictures, answers, events or proof, nothing measured."""
    found = summary({"a": {}}, ("a", "b"), reference="b")
    found.update(start=None, differences={}, versions={}, data=[], recipe={"arms": {"a": {}, "b": {}}})
    for arm in found["arms"].values():
        arm.update(metrics={}, seconds=None, seeds={})
    empty = ComparisonFacts(found, {"a": [[]], "b": []}, {}, [], None)
    page = rendered(empty)
    assert "No arm was measured." in page.text
    assert "Curves" not in page.text
    assert "img" not in page.tags


def test_no_values_at_all() -> None:
    found = summary(all_of(dict.fromkeys(MAIN, (None, None))))
    for arm in found["arms"].values():
        arm["metrics"] = dict.fromkeys(arm["metrics"], figure(None))
    text = flat(rendered(facts(found)))
    assert "–" in text
    assert "nan" not in text.lower()
    assert "None" not in text


def test_it_stands_alone_and_runs_nothing() -> None:
    arms = ("a<b>", HOSTILE)
    found = summary({"a<b>": BETTER}, arms, reference=HOSTILE)
    found.update(
        name=HOSTILE, command=HOSTILE, versions={HOSTILE: HOSTILE}, data=[{"name": HOSTILE, "num_examples": 3}]
    )
    found["recipe"].update(arms={"a<b>": {HOSTILE: HOSTILE}, HOSTILE: {}}, note=HOSTILE)
    found["arms"]["a<b>"]["model"] = HOSTILE
    found["arms"]["a<b>"]["metrics"][f"{HOSTILE}.{HOSTILE}"] = figure(1.0, (0.5, 1.5))
    image = picture(0, 16, 16)
    strange = {"stage": HOSTILE, "step": 1, "time": 0.0}
    hostile_events = [
        {**strange, "event": "validation", "losses": {HOSTILE: 1.0, "caption_loss": 2.0}},
        {**strange, "event": "reach", "caption_gradient_norms": {HOSTILE: 1.0}},
    ]
    html = render_comparison(
        ComparisonFacts(
            found,
            {arm: [hostile_events] for arm in arms},
            {arm: [{"id": HOSTILE, "prediction": HOSTILE, "reference": f"x{HOSTILE}"}] for arm in arms},
            [ComparedPicture(HOSTILE, image, {"start": image, HOSTILE: picture(1, 16, 16)})],
            {**found, "date": HOSTILE},
        )
    )
    page = Page(html)
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert page.addresses
    assert "http" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert "alert(" in page.text
    assert "&amp;lt;" not in html, "escaped twice"
    assert "\x00" not in html
    html.encode("utf-8")
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


# -- curves and plots --------------------------------------------------------------------------------------------------


def test_curves_are_means_over_seeds_at_shared_steps() -> None:
    runs = [events(0), events(2)[:-1]]
    found = mean_curve(runs, "semantic", "validation", "caption_loss")
    assert [step for step, _ in found] == [25, 50, 75]
    assert [loss for _, loss in found] == pytest.approx([3.75, 3.5, 3.25])
    assert mean_curve(runs, "semantic", "step", "reconstruction_loss") == []
    assert mean_curve([], "semantic", "step", "caption_loss") == []
    html = render_comparison(facts(summary(all_of(BETTER), seeds=2)))
    curves = html[html.index("<h2>Curves") : html.index("<h2>Pictures")]
    assert "Caption loss less that of tuned (ett)" in curves
    # validation, the differences, training, and validation over time; four lines and four swatches each; the sum and what is
    # not finite are not drawn
    assert curves.count("<polyline") == 4 * 8


def test_many_lines_stay_apart() -> None:
    """In grey as in colour: dash, marker and colour never agree for two of a dozen arms."""
    html = line_chart("t", [Series(str(i), [(0, i), (1, i)]) for i in range(12)], "step", "")
    styles = re.findall(r'<polyline (class="s\d" stroke-dasharray="[^"]*") points="(?!0,4)', html)
    assert len(set(styles)) == 12
    assert len(set(DASHES)) == len(DASHES) >= 5


def test_forest_plot() -> None:
    rows = [
        Row(1, "against <a>", "▲ 0.2", 0.2, (0.1, 0.3), True),
        Row(2, "against b", "○ 0", -0.1, None, False),
        Row(3, "against c", "?", float("nan"), None, False),
    ]
    html = forest_plot("<t>", "nats", rows, "ett worse", "ett better")
    page = Page(html)
    assert "against <a>" in page.text
    assert "against c" not in page.text
    assert "← ett worse" in page.text
    assert "ett better →" in page.text
    assert html.count("hollow") == 1
    assert html.count('class="bar') == 1
    assert forest_plot("t", "", [], "l", "r") == ""
