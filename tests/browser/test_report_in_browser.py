"""Report pages as readers see them: no error, no request, readable at any width, answers to pointer and keys."""

import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from large_page import LABELS, random_sweep, write_large_page
from PIL import Image

from rsm_probe.cli import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MODELS = [f"model-{number}" for number in range(3)]


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """A sweep of 3 models x 16 layers and 500 images, from random numbers; a label and a name are markup."""
    return write_large_page(tmp_path_factory.mktemp("large") / "report.html")


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """The page at the end of a run by the command line."""
    out = tmp_path_factory.mktemp("real") / "run"
    command = ["rsm-probe", "run", str(ROOT / "configs" / "smoke" / "sweep.yaml"), "--out", str(out), "--no-figures"]
    with mock.patch.object(sys, "argv", command), pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return out / "report.html"


@pytest.mark.parametrize("which", ["large", "real"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_page_draws_all_its_charts_and_asks_no_network(opened, request, which, width, scheme):
    one = opened(request.getfixturevalue(which), width, scheme)
    page = one.draw_all()
    assert page.locator(".chart").count() >= 2
    assert page.locator(".chart :is(svg, canvas).marks").count() == page.locator(".chart").count()
    one.require_quiet()
    # Wide parts scroll within themselves, and the page does not.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = page.evaluate(
        "(({ color, backgroundColor }) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    lightness = [sum(map(int, colour.strip("rgb()").split(","))) / 765 for colour in (ink, paper)]
    assert (lightness[1] - lightness[0] > 0.6) == (scheme == "light")
    assert abs(lightness[1] - lightness[0]) > 0.6


def test_hovering_over_a_cell_names_both_layers_and_their_values(opened, large):
    one = opened(large)
    chart = one.first_chart()
    for menu in one.page.locator(".menus select").all()[:2]:
        menu.select_option("model-1")
    one.point_at(chart, "grid_difference", depth_a=3, depth_b=5)
    words = one.tooltip()
    result, _ = random_sweep(shown_images=2)
    aligned, semantic = (result.grid("model-1", None, by).values[3, 5] for by in ("identity", "optimal"))
    for word in ("blocks.3", "blocks.5", f"{aligned:.4f}", f"{semantic:.4f}"):
        assert word in words
    one.require_quiet()


def test_a_menu_changes_the_grids(opened, large):
    one = opened(large)
    chart, menu = one.first_chart(), one.page.locator(".menus select").first
    result, _ = random_sweep(shown_images=2)
    menu.focus()  # by the keyboard alone
    for number, model in enumerate(MODELS):
        one.page.keyboard.press("Home")
        for _ in range(number):
            one.page.keyboard.press("ArrowDown")
        assert menu.input_value() == model
        one.page.wait_for_timeout(300)
        other = one.page.locator(".menus select").nth(1).input_value()
        expected = result.grid(model, other, "optimal").values
        shown = one.data(chart, "grid_semantic", "matched")
        np.testing.assert_allclose(np.array(shown).reshape(16, 16), expected, atol=1e-4)
    one.require_quiet()


def test_a_click_on_a_cell_leads_to_the_rsms_and_from_there_to_the_images(opened, large):
    one = opened(large)
    chart = one.first_chart()
    before = set(one.texts(chart))
    one.point_at(chart, "grid_identity", depth_a=2, depth_b=7)
    one.click()
    model = one.page.locator(".menus select").first.input_value()
    for layer in ("blocks.2", "blocks.7"):
        assert any(text.startswith(f"{model}, {layer},") for text in set(one.texts(chart)) - before)
    one.point_at(chart, "rsm_b_semantic", i=40, j=11)
    words = one.tooltip()
    assert "similarity" in words
    _, shown = random_sweep()
    for number in shown.order[[40, 11]]:
        assert shown.named(number) in words
    one.page.wait_for_timeout(300)
    texts = "\n".join(one.texts(chart))
    for number in shown.order[[40, 11]]:
        assert shown.ids[number] in texts
    addresses = one.images(chart)
    assert len(addresses) == 2
    assert all(address.startswith("data:image/") for address in addresses)
    assert len(set(addresses)) == 2
    key = next(k for k in shown.keys if (k.model, k.depth, k.matching) == (model, 7, "optimal"))
    value = shown.rsms[shown.keys.index(key)][40, 11]
    _, said = [text for text in one.texts(chart) if text.startswith(f"{model}, blocks.7,")]  # of both kinds
    low, high = shown.ranges[shown.keys.index(key)]
    number = float(said.rpartition(" ")[2].replace("−", "-").replace(",", ""))
    assert number == pytest.approx(value, abs=(high - low) / 100)
    assert f"rank {shown.ranks[shown.keys.index(key)][40, 11]:.1%}" in said
    one.require_quiet()


def test_a_tap_on_a_phone_names_both_images_above_the_rsm(opened, large):
    one = opened(large, 390, "dark", has_touch=True)
    chart, (_, shown) = one.first_chart(), random_sweep()
    one.page.touchscreen.tap(*one.in_sight(chart, "rsm_a_semantic", i=40, j=11))
    one.page.wait_for_timeout(500)
    above = [text for text in one.texts(chart) if text.startswith("model-") and "similarity" in text]
    assert len(above) == 4
    assert all(shown.named(number) in text for number in shown.order[[40, 11]] for text in above)
    one.require_quiet()


def test_a_tap_shows_what_pointing_shows_within_the_window(opened, large):
    one = opened(large, 390, "dark", has_touch=True)
    chart, (result, _) = one.first_chart(), random_sweep(shown_images=2)
    one.page.touchscreen.tap(*one.in_sight(chart, "grid_identity", depth_a=3, depth_b=5))
    words, box = one.tooltip(), one.page.locator("#vg-tooltip-element").bounding_box()
    model = one.page.locator(".menus select").first.input_value()
    value = result.grid(model).values[3, 5]
    assert f"{value:.4f} (95% bootstrap interval {value - 0.02:.3f} to {value + 0.02:.3f})" in words
    assert box["x"] >= 0 <= box["y"]
    assert box["x"] + box["width"] <= 390
    assert box["y"] + box["height"] <= 900
    one.page.touchscreen.tap(5, 5)
    one.page.locator("#vg-tooltip-element.visible").wait_for(state="hidden")
    one.require_quiet()


def test_numbers_of_the_contents_stand_beside_their_links_and_commands_stay_whole(opened, large):
    page = opened(large, 390).page
    gaps = page.evaluate(
        "[...document.querySelectorAll('nav li')].map((li) => li.querySelector('a').getClientRects()[0].top "
        "- li.getBoundingClientRect().top)"
    )
    assert max(gaps) < 12
    heights = page.evaluate("[...document.querySelectorAll('code.command')].map((code) => code.clientHeight)")
    assert max(heights) < 30
    room = page.evaluate(
        "[...document.querySelectorAll('figure > .downloads')].filter((one) => one.checkVisibility()).map((one) => "
        "one.getBoundingClientRect().top - one.previousElementSibling.getBoundingClientRect().bottom)"
    )
    assert min(room) >= 8


def test_charts_of_a_dark_page_are_exported_in_light_colours_with_the_same_choices(opened, large, tmp_path):
    one = opened(large, 1280, "dark")
    page, chart = one.page, one.first_chart()
    for menu in page.locator(".menus select").all()[:2]:
        menu.select_option("model-0")
    one.point_at(chart, "grid_identity", depth_a=2, depth_b=7)
    one.click()
    files = {}
    for kind in ("SVG", "PNG"):
        with page.expect_download() as started:
            page.locator(f".downloads :text-is('{kind}')").first.click()
        files[kind] = tmp_path / kind
        started.value.save_as(files[kind])
    with Image.open(files["PNG"]) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels[2, 2].tolist() == [255, 255, 255]
    svg = files["SVG"].read_text()
    assert "#15171a" not in svg
    assert "rgb(21, 23, 26)" not in svg
    shown = {text.split(",")[1].strip() for text in one.texts(chart) if text.startswith("model-0, blocks.")}
    assert shown == {"blocks.2", "blocks.7"}
    assert set(re.findall(r"model-0, (blocks\.\d+)", svg)) == shown
    fills = {fill.lower() for fill in re.findall(r'<text[^>]*fill="(#?\w+)"', svg)}
    assert fills
    assert not fills & {"#fff", "#ffffff", "#ddd", "#dddddd", "white"}
    assert page.locator("body > div:not(#vg-tooltip-element)").count() == 0  # the light copy is gone
    one.require_quiet()


def test_a_class_that_is_called_script_is_shown(opened, large):
    one = opened(large)
    page = one.draw_all()
    (script,) = [label for label in LABELS if "<" in label]
    assert script in page.locator("main").inner_text()
    assert script in page.locator(".pictures title").first.evaluate("() => document.body.textContent")
    one.require_quiet()  # no dialog


def test_without_scripts_a_page_still_says_what_came_out(opened, large):
    page = opened(large, java_script_enabled=False).page
    assert page.locator("dd.answer").is_visible()
    assert page.locator("noscript p").is_visible()
    picture = page.locator(".pictures svg use").first.bounding_box()
    assert picture["width"] > 30


def test_parts_can_be_downloaded(opened, large, tmp_path):
    page = opened(large).draw_all()
    for kind, start in (("CSV", "model"), ("SVG", "<svg"), ("PNG", "\x89PNG")):
        with page.expect_download() as started:
            page.locator(f".downloads :text-is('{kind}')").first.click()
        file = tmp_path / kind
        started.value.save_as(file)
        assert file.read_text("latin-1").startswith(start), kind
        assert started.value.suggested_filename.endswith(f".{kind.lower()}")
