"""Takes the documents' pictures of the served page, every tab at a desk's and a phone's width.

    python tools/screenshots.py --draw runs/draw_64px --tuned runs/mine --run runs/mine    # wants playwright and chromium

Nothing is picked: the first answer, the first four drawings from seed 0, the lens on the example picture. A tab whose model is
not given stays as it is in the documents.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
CHROMIUM = "/usr/bin/chromium"
WIDTHS = (1200, 390)
PORT = 8311


@contextmanager
def served(model: str, *options: str) -> Iterator[str]:
    """The address of a server of `model`."""
    words = ["serve", model, "--name", Path(model).name, "--port", str(PORT)]
    process = subprocess.Popen([sys.executable, "-m", "ett.cli", *words, *options])
    url = f"http://127.0.0.1:{PORT}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def ask(page: Page, url: str, picture: Path, question: str) -> None:
    page.goto(url)
    page.set_input_files("#ask-picker-file", picture)
    page.fill("#question", question)
    page.click("#ask-form .main")
    page.wait_for_selector("#answers .unit:has-text('tokens in')")


def draw(page: Page, url: str, prompt: str) -> None:
    page.goto(f"{url}#draw")
    page.fill("#prompt", prompt)
    page.click("summary:visible")
    page.fill("#draw-count", "4")
    page.fill("#draw-seed", "0")
    page.click("#draw-form .main")
    page.wait_for_selector(".drawn img")


def lens(page: Page, url: str, picture: Path) -> None:
    page.goto(f"{url}#lens")
    page.set_input_files("#lens-picker-file", picture)
    page.wait_for_selector("#codes span")
    page.wait_for_function("[...document.querySelectorAll('#versions img')].every((each) => each.complete)")


def run(page: Page, url: str) -> None:
    """The curves: a whole report is too long for a picture."""
    page.goto(f"{url}#run")
    page.wait_for_selector("#report svg")
    page.locator("#report h2:text-matches('Losses|Curves')").first.evaluate("(each) => each.scrollIntoView()")
    page.mouse.wheel(0, -80)  # from below the tabs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", default="reader_64px", help="the model that is asked")
    parser.add_argument("--picture", type=Path, default=FIGURES / "letters.png")
    parser.add_argument("--question", default="What is written?")
    parser.add_argument("--draw", help="the model that draws; without it no drawing is shown")
    parser.add_argument("--prompt", default="red heart, twemoji")
    parser.add_argument("--tuned", help="the model of the lens, beside the shipped one before tuning")
    parser.add_argument("--example", type=Path, default=FIGURES / "example.png", help="the picture under the lens")
    parser.add_argument("--run", help="the folder of a run or a comparison; without it no curves are shown")
    parser.add_argument("--out", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    tabs: dict[str, tuple[str | None, list[str], Callable[[Page, str], None]]] = {
        "ask": (arguments.read, [], lambda page, url: ask(page, url, arguments.picture, arguments.question)),
        "draw": (arguments.draw, [], lambda page, url: draw(page, url, arguments.prompt)),
        "lens": (
            arguments.tuned,
            ["--initial", "reader_64px"],
            lambda page, url: lens(page, url, arguments.example),
        ),
        "run": (arguments.read if arguments.run else None, ["--run", str(arguments.run)], run),
    }
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, (model, options, show) in tabs.items():
            if model is None:
                continue
            with served(model, *options) as url:
                for width in WIDTHS:
                    page = browser.new_page(viewport={"width": width, "height": 844})
                    page.set_default_timeout(240_000)
                    show(page, url)
                    page.screenshot(full_page=name != "run", path=arguments.out / f"serve-{name}-{width}.png")
                    page.close()
        browser.close()


if __name__ == "__main__":
    main()
