"""Report pages as readers see them: no error, no request, readable at any width, and they answer to pointer and keys."""

import re

import pytest
from pages import random_sweep, write_large_page

from rsm_probe.report.write import write_page
from rsm_probe.runs.run_folder import run_folder  # noqa: F401
from rsm_probe.studies.sweep_report.page import sweep_page

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """A sweep of 3 models x 16 layers and 500 images, from random numbers."""
    return write_large_page(tmp_path_factory.mktemp("large") / "report.html")


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """The page of a sweep that ran, by the command line."""
    import sys
    from pathlib import Path
    from unittest import mock

    from rsm_probe.cli import main

    config = Path(__file__).parents[2] / "configs" / "smoke" / "sweep.yaml"
    out = tmp_path_factory.mktemp("real") / "run"
    command = ["rsm-probe", "run", str(config), "--out", str(out), "--no-progress", "--no-figures"]
    with mock.patch.object(sys, "argv", command), pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return out / "report.html"


SIZES = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


@pytest.mark.parametrize("which", ["large", "real"])
@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_a_page_draws_all_its_charts_and_asks_no_network(opened, request, which, width, scheme):
    one = opened(request.getfixturevalue(which), width, scheme)
    page = one.draw_all()
    assert page.locator(".chart").count() >= 2
    assert page.locator(".chart").count() == page.locator(".chart svg, .chart canvas").count()
    one.require_quiet()
    # Wide parts scroll within themselves; the page does not.
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def cells(page, kind):
    return page.locator(f".grid_{kind}_marks path")


def tooltip(page):
    box = page.locator("#vg-tooltip-element.visible")
    box.wait_for()
    return box.inner_text()


def test_hovering_over_a_cell_names_both_layers_and_their_values(opened, large):
    page = opened(large).draw_all()
    result, _ = random_sweep()
    cells(page, "difference").nth(16 * 3 + 5).hover()
    words = tooltip(page)
    assert "blocks.3" in words
    assert "blocks.5" in words
    aligned, semantic = (result.grid("model-0", None, by).values[3, 5] for by in ("identity", "optimal"))
    assert f"{aligned:.4f}" in words
    assert f"{semantic:.4f}" in words
