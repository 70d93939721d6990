"""Report pages in a real browser: the distribution's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Remembers the view of every chart, whose scene says what is where, also on a canvas.
REMEMBER = """
let embed;
Object.defineProperty(window, "vegaEmbed", {
  get: () => embed,
  set: (given) => { embed = async (box, ...rest) => (await given(box, ...rest).then((made) => (box.made = made))); },
});
window.scene = (box) => {
  const items = [], view = box.made.view;
  const walk = (mark, x, y) => mark.items.forEach((item) => {
    const at = [x + (item.x ?? 0), y + (item.y ?? 0)];
    if (mark.marktype === "group") item.items.forEach((inner) => walk(inner, ...at));
    else items.push({ mark, item, x: at[0], y: at[1] });
  });
  const [left, top] = view.origin(), padding = view.padding();
  walk(view.scenegraph().root, left + padding.left, top + padding.top);
  return items;
};
"""
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

    def where(self, chart: Any, mark: str, **values: Any) -> tuple[float, float]:
        """The middle of the item of a mark whose data have the values, in pixels of the window."""
        chart.scroll_into_view_if_needed()
        x, y, width, height = chart.evaluate(
            """(box, [mark, values]) => {
              const one = scene(box).find((one) => String(one.mark.name).startsWith(mark)
                && Object.entries(values).every(([key, value]) => one.item.datum[key] === value));
              const frame = box.querySelector("canvas, svg").getBoundingClientRect();
              return [frame.x + one.x, frame.y + one.y, one.item.width ?? 0, one.item.height ?? 0];
            }""",
            [mark, values],
        )
        return x + width / 2, y + height / 2

    def in_sight(self, chart: Any, mark: str, **values: Any) -> tuple[float, float]:
        """The middle of an item, see `where`; scrolls there first, in case it is out of sight."""
        x, y = self.where(chart, mark, **values)
        if not 50 < y < 850:
            self.page.mouse.wheel(0, y - 450)
            self.page.wait_for_timeout(300)
            x, y = self.where(chart, mark, **values)
        return x, y

    def point_at(self, chart: Any, mark: str, **values: Any) -> None:
        """Moves the pointer to the middle of an item."""
        self.page.mouse.move(*self.in_sight(chart, mark, **values))

    def point_at_first_value(self, chart: Any) -> None:
        """Moves the pointer to the first item of a chart that has a tooltip."""
        chart.scroll_into_view_if_needed()
        x, y = chart.evaluate(
            """(box) => {
              const one = scene(box).find((one) => one.item.tooltip && ["symbol", "rect"].includes(one.mark.marktype));
              const frame = box.querySelector("canvas, svg").getBoundingClientRect();
              return [frame.x + one.x + (one.item.width ?? 0) / 2, frame.y + one.y + (one.item.height ?? 0) / 2];
            }"""
        )
        self.page.mouse.move(x, y)

    def shown(self, chart: Any) -> list[Any]:
        """The places of all items of a chart, which are others where it shows other values."""
        return chart.evaluate("(box) => scene(box).map((one) => [one.x, one.y, String(one.item.text), one.item.fill])")

    def texts(self, chart: Any) -> list[str]:
        """All texts that a chart shows."""
        return chart.evaluate(
            "(box) => scene(box).filter((one) => one.mark.marktype === 'text').map((one) => String(one.item.text))"
        )

    def data(self, chart: Any, mark: str, field: str) -> list[Any]:
        """A field of the data of all items of a mark."""
        script = "(box, [mark, field]) => scene(box).filter((one) => String(one.mark.name).startsWith(mark))"
        return chart.evaluate(f"{script}.map((one) => one.item.datum[field])", [mark, field])

    def images(self, chart: Any) -> list[str]:
        """Addresses of the images that a chart shows, once they are drawn."""
        script = "scene(box).filter((one) => one.mark.marktype === 'image').map((one) => one.item"
        whole = f"(box) => {script}).every((item) => item.image?.complete && item.image.naturalWidth > 0)"
        self.page.wait_for_function(whole, arg=chart.element_handle())
        return chart.evaluate(f"(box) => {script}.url)")

    def tooltip(self) -> str:
        """The text beside the pointer."""
        box = self.page.locator("#vg-tooltip-element.visible")
        box.wait_for()
        return box.inner_text()

    def click(self) -> None:
        """Presses the button of the pointer where it is."""
        self.page.mouse.down()
        self.page.mouse.up()
        self.page.wait_for_timeout(500)

    def first_chart(self) -> Any:
        """The first chart, once it is drawn."""
        chart = self.page.locator(".chart").first
        chart.scroll_into_view_if_needed()
        self.page.wait_for_function("(box) => box.hasAttribute('data-drawn')", arg=chart.element_handle())
        return chart

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
        context.add_init_script(REMEMBER)
        one = Opened(context.new_page())
        one.page.goto(file.as_uri())
        return one

    yield open_page
    for context in contexts:
        context.close()
