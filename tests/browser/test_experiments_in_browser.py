"""Pages of all kinds of experiments in a browser: they draw, answer to pointer and menus, and ask no network."""

import pytest
import yaml

from rsm_probe.report.default import write_report
from rsm_probe.studies.registry import read_study

pytestmark = pytest.mark.slow
SMALL = """
study: evidence
models:
  - name: digits
    recipe: {images: digits, size: 16, steps: 10, batch_size: 32, network: {widths: [4, 4, 8, 8], stem_stride: 2}}
studies:
  retrieval:
    study: retrieval
    images: &images {source: scenes, split: test, size: 48, count: 12}
    layers: layer4.0
    queries: 4
    database_sizes: [8]
    top: 3
    pictured: [0]
    matchings: &matchings [identity, optimal]
    kernels: &kernels [cosine, linear]
    repeats: 20
  outputs: {study: outputs, images: *images, matchings: *matchings, kernels: *kernels, repeats: 20}
  translation:
    study: translation
    images: {<<: *images, count: 6}
    layers: layer4.0
    edge: 40
    crop: 32
    batch: 3
    batches: 2
    matchings: *matchings
    kernels: *kernels
    repeats: 20
  approximation:
    study: approximation
    images: *images
    layers: layer4.0
    pairs: 4
    solver_pairs: 2
    windows: [4]
    solvers: [scipy]
    repeats: 20
  factors:
    study: factors
    base: {images: *images, layers: layer4.0, queries: 4, database_sizes: [8], matchings: *matchings, repeats: 20}
    factors:
      kernel: {cosine: {kernels: [cosine]}, linear: {kernels: [linear]}}
"""
KINDS = [*yaml.safe_load(SMALL)["studies"], "evidence"]


@pytest.fixture(scope="session")
def pages(chromium, tmp_path_factory):
    """The page of each kind of experiment, of one run with all of them at their smallest."""
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "small.yaml").write_text(SMALL)
    study, out = read_study(folder / "small.yaml"), folder / "run"
    study.run(out)
    pages = {name: write_report(part, out / name) for name, part in study.parts(out).items()}
    return {**pages, "evidence": write_report(study, out)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_answers_to_pointer_and_menus_and_asks_no_network(opened, pages, kind):
    one = opened(pages[kind])
    page = one.draw_all()
    charts = page.locator(".chart")
    assert charts.count() >= 1
    assert page.locator(".chart :is(svg, canvas).marks").count() == charts.count()
    first = charts.first
    one.point_at_first_value(first)
    assert any(character.isdigit() for character in one.tooltip())
    menus = page.locator("figure.part:has(.chart)").first.locator(".menus select")
    for menu in menus.all():
        before = one.shown(first)
        menu.select_option(index=1)
        page.wait_for_timeout(300)
        assert one.shown(first) != before
        menu.select_option(index=0)
    one.require_quiet()


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_a_phone(opened, pages, kind):
    one = opened(pages[kind], 390, "dark")
    page = one.draw_all()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    one.require_quiet()


def test_boxes_of_objects_are_drawn_on_queries_and_neighbours(opened, pages):
    page = opened(pages["retrieval"]).draw_all()
    picture = page.locator(".pictures svg").first
    colours = {box.get_attribute("stroke") for box in picture.locator("rect").all()}
    assert "#0072B2" in colours  # the query's
    assert colours - {"#0072B2", "#ffffff"}  # the neighbour's
    frame = picture.bounding_box()
    for box in picture.locator("rect").all():
        at = box.bounding_box()
        assert frame["x"] - 3 <= at["x"]
        assert at["x"] + at["width"] <= frame["x"] + frame["width"] + 3
