"""Takes the documents' pictures of the served page: asking, and drawing, at a desk's and a phone's width.

    python tools/screenshots.py --draw runs/draw_64px --prompt "red heart, twemoji"    # needs playwright and Debian's chromium

Nothing is picked: the first answer, and the first four drawings from seed 0.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
CHROMIUM = "/usr/bin/chromium"
WIDTHS = (1200, 390)
PORT = 8311


@contextmanager
def served(model: str) -> Iterator[str]:
    """The address of a server of `model`."""
    words = ["serve", model, "--name", Path(model).name, "--port", str(PORT)]
    process = subprocess.Popen([sys.executable, "-m", "ett.cli", *words])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", default="reader_64px", help="the model that is asked")
    parser.add_argument("--picture", type=Path, default=FIGURES / "letters.png")
    parser.add_argument("--question", default="What is written?")
    parser.add_argument("--draw", help="the model that draws; without it no drawing is shown")
    parser.add_argument("--prompt", default="red heart, twemoji")
    parser.add_argument("--out", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, model in (("ask", arguments.read), ("draw", arguments.draw)):
            if model is None:
                continue
            with served(model) as url:
                for width in WIDTHS:
                    page = browser.new_page(viewport={"width": width, "height": 844})
                    page.set_default_timeout(240_000)
                    if name == "ask":
                        ask(page, url, arguments.picture, arguments.question)
                    else:
                        draw(page, url, arguments.prompt)
                    page.screenshot(full_page=True, path=arguments.out / f"serve-{name}-{width}.png")
                    page.close()
        browser.close()


if __name__ == "__main__":
    main()
