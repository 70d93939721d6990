"""Report pages in a real browser: the distribution's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def missing(what: str) -> None:
    """Skips the test, but never where everything must be tested."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"pages are not tested in a browser: {what}")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A running browser."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        missing(f"no {', '.join(PROGRAMS)} is installed; on Debian: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("Playwright is not installed: pip install playwright")
    with sync_playwright() as driver:
        # Playwright's own build of the browser would have to be downloaded.
        browser = driver.chromium.launch(executable_path=program)
        yield browser
        browser.close()


class Opened:
    """A page from disk, and what it did: console messages, errors, dialogs, and addresses it asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.problems: list[str] = []
        self.addresses: list[str] = []
        page.on("console", lambda said: said.type in ("error", "warning") and self.problems.append(said.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self.addresses.append(request.url))

    def require_quiet(self) -> None:
        """Nothing complained, and no address led outside of the file."""
        assert self.problems == []
        assert {address.partition(":")[0] for address in self.addresses} <= {"file", "data", "blob"}
        assert len([address for address in self.addresses if address.startswith("file:")]) == 1

    def draw_all(self) -> Any:
        """Scrolls through the page, with all groups unfolded, until every chart is drawn."""
        self.page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        for chart in self.page.locator(".chart").all():
            chart.scroll_into_view_if_needed()
            chart.page.wait_for_function("(box) => box.hasAttribute('data-drawn')", arg=chart.element_handle())
        self.page.evaluate("scrollTo(0, 0)")
        return self.page


@pytest.fixture
def opened(chromium) -> Iterator[Callable[..., Opened]]:
    """A function that opens a page from disk and gives it back once it is loaded."""
    contexts = []

    def open_page(file: Path, width: int = 1280, scheme: str = "light", **options: Any) -> Opened:
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, **options
        )
        contexts.append(context)
        context.set_default_timeout(20_000)
        one = Opened(context.new_page())
        one.page.goto(file.as_uri())
        return one

    yield open_page
    for context in contexts:
        context.close()
