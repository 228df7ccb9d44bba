"""The page in Debian's Chromium: click, upload, result, screenshot, at a desk's and a phone's width."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image
import pytest

from ett.generate.chat import answer
from ett.serve.limits import Limits
from ett.serve.run_report import RunReport
from ett.serve.served import Served
from tests.evaluate.conftest import picture
from tests.serve.conftest import Comparing, served_at
from tests.serve.test_api import KEY

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
WIDTHS = (390, 1200)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"there is no {CHROMIUM} (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    """An empty page that fails the test on any error of its scripts, and on requests to elsewhere."""
    opened = browser.new_page(viewport={"width": request.param, "height": 844})
    opened.set_default_timeout(120_000)
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda asked: problems.append(asked.url) if foreign(asked.url) else None)
    yield opened
    opened.close()
    assert not problems


def foreign(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:"))


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    path = tmp_path / "noise.png"
    picture(3).save(path)
    return path


def looks_right(page: Page, name: str) -> None:
    """Nothing hangs out of the page sideways, in light and dark; the screenshots are kept where ETT_SCREENSHOTS says."""
    width = page.viewport_size["width"]  # type: ignore[index]
    folder = os.environ.get("ETT_SCREENSHOTS")
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        taken = page.screenshot(full_page=True, path=Path(folder) / f"{name}-{width}-{scheme}.png" if folder else None)
        assert len(taken) > 5000


def test_ask(served: Served, page: Page, upload: Path) -> None:
    assert served.model is not None
    with served_at(served) as url:
        page.goto(url)
        page.set_input_files("#ask-picker-file", upload)
        page.fill("#question", "what?")
        page.click("summary:visible")
        page.fill("#ask-length", "12")
        page.click("#ask-form .main")
        page.wait_for_selector("#answers .unit:has-text('tokens in')")
        expected = answer(served.model, served.processor, picture(3), "what?", max_new_tokens=12)
        assert page.text_content("#answers .answer") == expected
        looks_right(page, "ask")
        page.fill("#ask-length", "5000")
        page.click("#ask-form .main")
        assert page.locator("#answers .exchange").count() == 1, "the browser knows the server's limit"


def test_an_error_is_shown_in_the_servers_words(served: Served, page: Page, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"hello")
    with served_at(served) as url:
        page.goto(url)
        page.set_input_files("#ask-picker-file", tmp_path / "no.png")
        page.click("#ask-form .main")
        page.wait_for_selector("#answers .error:has-text('is not a picture')")


def test_draw(drawing: Served, page: Page) -> None:
    with served_at(drawing) as url:
        page.goto(f"{url}#draw")
        page.fill("#prompt", "a cat")
        page.click("summary:visible")
        page.fill("#draw-count", "2")
        page.fill("#draw-seed", "5")
        page.click("#draw-form .main")
        page.wait_for_selector(".drawn img")
        assert page.locator(".drawn img").evaluate_all("all => all.map(each => each.naturalWidth)") == [32, 32]
        looks_right(page, "draw")


def test_a_model_that_cannot_draw_says_so(served: Served, page: Page) -> None:
    with served_at(served) as url:
        page.goto(url)
        page.click("#tab-draw")
        assert page.is_visible("#draw-unable")
        assert not page.is_visible("#draw-form")
        page.click("#tab-run")
        assert page.is_visible("#run-unable")


def test_lens(served: Served, page: Page, upload: Path) -> None:
    assert served.initial is not None
    pixels = served.processor.image_processor(picture(3), return_tensors="pt")["pixel_values"]
    after, before = (each.tokenize(pixels).flatten().tolist() for each in (served.tokenizer, served.initial))
    with served_at(served) as url:
        page.goto(f"{url}#lens")
        page.set_input_files("#lens-picker-file", upload)
        page.wait_for_selector("#codes span")
        shown = page.locator("#codes span")
        assert [int(text) for text in shown.all_text_contents()] == after
        changed = [first != second for first, second in zip(after, before, strict=True)]
        assert shown.evaluate_all("all => all.map(each => each.classList.contains('changed'))") == changed
        assert f"changed {sum(changed)} of 64" in (page.text_content("#indices-summary") or "")
        assert page.locator("#versions figure").count() == 4
        looks_right(page, "lens")
        page.select_option("#indices-of", "before")
        assert [int(text) for text in shown.all_text_contents()] == before
        page.focus("#codes")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        said = page.text_content("#code-said") or ""
        assert said.startswith("Row 2, column 2: code ")
        assert str(before[9]) in said
        shown.nth(5).click()
        assert (page.text_content("#code-said") or "").startswith("Row 1, column 6: ")
        mean = page.get_attribute("#difference", "aria-label")
        page.select_option("#difference-of", "original|before tuning")
        assert page.get_attribute("#difference", "aria-label") != mean
    with served_at(replace(served, initial=None)) as url:
        page.goto(f"{url}/#lens")
        page.reload()
        page.set_input_files("#lens-picker-file", upload)
        page.wait_for_selector("#codes span")
        assert page.locator("#versions figure").count() == 3
        assert page.locator("#codes .changed").count() == 0


def test_large_pictures_are_shrunk_before_they_travel(served: Served, page: Page, tmp_path: Path) -> None:
    large = tmp_path / "photograph.png"
    PIL.Image.effect_noise((2600, 1700), 90).convert("RGB").save(large)
    assert large.stat().st_size > 2**22
    with served_at(served, Limits(max_body=2**22)) as url:
        page.goto(f"{url}#lens")
        page.set_input_files("#lens-picker-file", large)
        page.wait_for_selector("#codes span")


def test_run(served: Served, page: Page, toy_run: Path, tmp_path: Path) -> None:
    lines = (toy_run / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "recipe.yaml").write_text((toy_run / "recipe.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "log.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    with served_at(served, run=RunReport(tmp_path)) as url:
        page.goto(f"{url}#run")
        page.wait_for_selector("#report svg")
        charts = page.locator("#report svg[role=img]").count()
        page.click("#report summary >> nth=0")
        with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as log:
            log.writelines(lines[4:])
        page.wait_for_function(
            "n => document.getElementById('report').shadowRoot.querySelectorAll('svg[role=img]').length > n", arg=charts
        )
        assert page.locator("#report details[open]").count() == 1, "what was unfolded stays so"
        looks_right(page, "run")


def test_the_arms_of_a_comparison(served: Served, page: Page, comparing: Comparing) -> None:
    """Live: lines of an arm that begins come to the chart of the others."""
    comparing.train("frozen:0", 6)
    with served_at(served, run=RunReport(comparing.folder)) as url:
        page.goto(f"{url}#run")
        page.wait_for_selector("#report svg")
        assert "tuned" not in (page.locator("#report svg[role=img]").first.inner_html() or "")
        comparing.train("tuned:0", 4)
        page.wait_for_function("() => document.getElementById('report').shadowRoot.textContent.includes('4 of 12')")
        drawn = page.locator("#report figure").first.text_content() or ""
        assert "frozen" in drawn
        assert "tuned" in drawn
        looks_right(page, "comparison")


def test_the_key_is_asked_for_once(served: Served, page: Page, upload: Path) -> None:
    with served_at(served, keys=[KEY]) as url:
        page.goto(url)
        page.wait_for_selector("#key-form:visible")
        page.fill("#key", "wrong")
        page.click("#key-form button")
        page.wait_for_selector("#facts .error")
        page.fill("#key", KEY)
        page.click("#key-form button")
        page.wait_for_selector("#facts:has-text('64 codes')")
        page.reload()
        page.wait_for_selector("#facts:has-text('64 codes')")
        page.set_input_files("#ask-picker-file", upload)
        page.click("#ask-form .main")
        page.wait_for_selector("#answers .answer")


def test_by_keyboard(served: Served, page: Page) -> None:
    with served_at(served) as url:
        page.goto(url)
        page.wait_for_selector("#facts:has-text('64 codes')")
        page.focus("#tab-ask")
        page.keyboard.press("ArrowLeft")
        assert page.get_attribute("#tab-run", "aria-selected") == "true"
        assert page.is_visible("#run")
        page.keyboard.press("ArrowRight")
        assert page.is_visible("#ask")
