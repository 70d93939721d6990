"""How large a report page is, and how long Chromium takes to open it from disk.

    python benchmarks/report.py [PAGE.html] [--rounds 5] [--program chromium]

Without a page, that of a sweep over 3 models x 16 layers and 500 images, made of random numbers (tests/large_page.py).
Each round opens the page in a new window of a browser that runs already, without a cache. Times begin with the request:
`loaded` is the load event, `answer` the first paint with text, `chart` the first chart on the screen, and `menu` the
time from another choice in a menu to grids that show it. `thread` is the processor's time of the page's main thread up
to the chart, which other work on the machine changes little. The medians of all rounds are printed, then each round.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
# Two frames after a change, all that it draws is on the screen.
MENU = """async () => {
  const menu = document.querySelector(".menus select"), start = performance.now();
  if (!menu) return NaN;
  menu.selectedIndex = (menu.selectedIndex + 1) % menu.options.length;
  menu.dispatchEvent(new Event("change", { bubbles: true }));
  menu.dispatchEvent(new Event("input", { bubbles: true }));
  for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
  return performance.now() - start;
}"""
TIMES = """() => {
  const page = performance.getEntriesByType("navigation")[0];
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  return { loaded: page.loadEventEnd, answer: paint.startTime, chart: window.drawn };
}"""
WATCH = """
new MutationObserver((changes, observer) => {
  if (!document.querySelector("[data-drawn]")) return;
  observer.disconnect();
  requestAnimationFrame(() => requestAnimationFrame(() => { window.drawn = performance.now(); }));
}).observe(document, { attributes: true, childList: true, subtree: true, attributeFilter: ["data-drawn"] });
"""


def opened(browser: Any, page: Path) -> dict[str, float]:
    """Milliseconds of one opening."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    context.add_init_script(WATCH)
    window = context.new_page()
    session = context.new_cdp_session(window)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    window.goto(page.as_uri())
    window.wait_for_function("window.drawn && performance.getEntriesByName('first-contentful-paint').length")
    times = window.evaluate(TIMES)
    metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    times["thread"] = 1000 * metrics["TaskDuration"]
    times["menu"] = window.evaluate(MENU)
    context.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--program", default=shutil.which("chromium"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page = asked.page
        if page is None:
            sys.path.insert(0, str(ROOT / "tests"))
            from large_page import write_large_page

            start = time.perf_counter()
            page = write_large_page(Path(folder) / "report.html")
            print(f"written in {time.perf_counter() - start:.1f} s, with the random numbers")
        browser = driver.chromium.launch(executable_path=asked.program)
        load = os.getloadavg()[0]
        rounds = [opened(browser, page.resolve()) for _ in range(asked.rounds)]
        print(f"{page.stat().st_size / 1e6:.1f} MB, Chromium {browser.version}, load of the machine {load:.1f}")
        browser.close()
    for name in rounds[0]:
        values = [times[name] for times in rounds]
        print(f"{name:8} {statistics.median(values):6.0f} ms   ({', '.join(f'{value:.0f}' for value in values)})")


if __name__ == "__main__":
    main()
