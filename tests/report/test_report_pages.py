"""One HTML file: everything is escaped, nothing is fetched, nothing is left out silently, and equal pages are equal."""

import base64
import hashlib
import io
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from rsm_probe.errors import StorageError
from rsm_probe.report.default import write_report
from rsm_probe.report.page import Chart, Group, Page, Picture, Pictures, Plot, Section, Table, Text
from rsm_probe.report.thumbnails import joining_lines, thumbnail
from rsm_probe.report.words import WORDS, words_of
from rsm_probe.report.write import page_html, write_page

NASTY = "<script>alert('x')</script><img src=x onerror=alert(1)> \"quoted\" & {{ 7 * 7 }} </title>"


class Read(HTMLParser):
    """The elements of a page with their attributes, its text outside of scripts, and the scripts."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.scripts, self._inside = [], "", [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def picture(colour="red", word=NASTY):
    return thumbnail(Image.new("RGB", (40, 30), colour), f"{colour} {word}", word)


def png():
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


def a_page(word=NASTY, rows=3):
    table = Table(word, [word, "number"], [[word, k / 7] for k in range(rows)], word)
    spec = {
        "mark": "point",
        "data": {"values": [{"x": 1, "name": word}]},
        "encoding": {"x": {"field": "x", "type": "quantitative"}},
    }
    two = Picture([picture("red", word), picture("blue", word)], word, [(0.5, 0.5, 0.2, 0.7, 1.0)])
    parts = [
        Text(word), table, Chart(word, spec, word, table), Plot(word, png(), word, table),
        Pictures(word, [two], word),
        Group(word, [Text(word), Pictures(word, [Picture([picture("red", word)], word)])]),
    ]  # fmt: skip
    return Page(word, word, word, word, [Section(word, word, parts)], f"rsm-probe run {word}", {word: word}, [word])


@pytest.fixture(scope="module")
def html():
    return page_html(a_page())


def test_names_are_shown_and_not_run(html):
    nasty, plain = Read(html), Read(page_html(a_page("word")))
    # The same elements, whatever the names are; and no attribute but those of the page itself.
    # A command has a span for each of its words.
    of_nasty, of_plain = ([one for one in page.elements if one[0] != "span"] for page in (nasty, plain))
    assert [tag for tag, _ in of_nasty] == [tag for tag, _ in of_plain]
    assert [attrs.keys() for _, attrs in of_nasty] == [attrs.keys() for _, attrs in of_plain]
    assert not any(name.startswith("on") for _, attrs in nasty.elements for name in attrs)
    assert nasty.text.count(NASTY) == plain.text.count("word")
    (spec,) = (text for text, attrs in zip(nasty.scripts, nasty.all("script"), strict=True) if "type" in attrs)
    assert json.loads(spec)["data"]["values"][0]["name"] == NASTY


def test_the_policy_of_the_page_allows_its_own_scripts_and_no_network(html):
    read = Read(html)
    (policy,) = (attrs["content"] for attrs in read.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    run = [text for text, attrs in zip(read.scripts, read.all("script"), strict=True) if "type" not in attrs]
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in run}
    assert set(re.findall(r"'sha256-[^']+'", policy)) == hashes
    assert len(run) == 2  # the charts' library, and the page's own
    assert "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.partition("script-src")[2]
    assert "http" not in policy


def test_nothing_is_fetched(html):
    read = Read(html)
    addresses = [
        attrs[name]
        for _, attrs in read.elements
        for name in ("src", "href", "srcset", "data", "action")
        if name in attrs
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    style = re.search(r"<style>(.*?)</style>", html, re.S)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert not read.all("link")
    assert not read.all("iframe")


def test_equal_pages_are_equal_files(tmp_path, html):
    write_page(a_page(), tmp_path / "a.html")
    write_page(a_page(), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes() == html.encode()


def test_a_long_table_says_how_many_rows_it_shows_and_its_download_has_all():
    table = Table("long", ["a"], [[f"={k}"] for k in range(99)])
    html = page_html(Page("t", "q", "s", "a", [Section("s", "", [table])], "c"))
    assert "60 of 99 rows are shown; the CSV file has all." in Read(html).text
    (link,) = (attrs for attrs in Read(html).all("a") if "download" in attrs)
    lines = base64.b64decode(link["href"].partition("base64,")[2]).decode().splitlines()
    assert link["download"] == "long.csv"
    assert len(lines) == 1 + 99
    assert lines[1] == "'=0"  # a spreadsheet would compute it


def test_equal_thumbnails_stand_in_the_page_once():
    pictures = Pictures("p", [Picture([picture(), picture()]), Picture([picture("blue"), picture()])])
    read = Read(page_html(Page("t", "q", "s", "a", [Section("s", "", [pictures])], "c")))
    assert len(read.all("image")) == 2
    assert [attrs["href"] for attrs in read.all("use")] == ["#t0", "#t0", "#t1", "#t0"]
    assert {attrs["id"] for attrs in read.all("image")} == {"t0", "t1"}


def page_of_text(text, **parts):
    return Page("t", "q", "s", text, [Section("s", **parts)], "rsm-probe run a.yaml --out -1")


def test_words_of_the_page_are_explained_and_no_others():
    words = words_of(page_of_text("The semantic RSMs have an unbiased CKA of 0.5."))
    assert [word.term.partition(" ")[0] for word in words] == ["RSM", "semantic,", "CKA", "unbiased"]
    read = Read(page_html(page_of_text("The semantic RSMs have an unbiased CKA of 0.5.")))
    assert read.text.count("Kornblith et al. 2019") == 1
    assert "location-mean" not in read.text
    assert [attrs["href"] for attrs in read.all("a")].count("#words") == 2
    plain = Read(page_html(page_of_text("Nothing to explain.")))
    assert "Words" not in plain.text
    # Names and labels are the user's, and explain nothing.
    table = Table("RSM", ["a"], [["kernel"]])
    assert words_of(Page("t", "q", "s", "a", [Section("s", "", [table])], "c")) == []


def test_every_word_is_found_by_its_own_term():
    for word in WORDS:
        assert re.search(word.pattern, word.term), word.term
        assert word.meaning.endswith(".")


def test_negative_numbers_have_a_minus_sign_on_the_page_and_a_hyphen_in_the_download():
    table = Table("t", ["n"], [[-0.14], [-2], ["rocket-0-00017"]], "from -0.1 to -.2, of x-1 (-3)")
    html = page_html(page_of_text("By -0.140, see a--b, 2026-11-28 and 3.4e-06.", parts=[table]))
    text = Read(html).text
    minus = "\N{MINUS SIGN}"
    for shown in (
        f"By {minus}0.140, see a--b, 2026-11-28 and 3.4e-06.",
        f"{minus}0.140",
        f"{minus}2",
        "rocket-0-00017",
    ):
        assert shown in text
    assert f"from {minus}0.1 to {minus}.2, of x-1 ({minus}3)" in text
    assert "--out -1" in text
    (link,) = (attrs for attrs in Read(html).all("a") if "download" in attrs)
    lines = base64.b64decode(link["href"].partition("base64,")[2]).decode().splitlines()
    assert [line.lstrip("'") for line in lines[1:3]] == ["-0.14", "-2"]


def luminance(colour):
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_of_lines_are_seen_on_light_and_dark_paper(html):
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    papers = re.findall(r"--paper: (#\w{6})", style)
    colours = re.findall(r'"(#\w{6})"', re.search(r"const colours = \[(.*?)\]", html, re.DOTALL)[1])
    assert len(papers) == 2
    assert len(set(colours)) == len(colours) == 10
    for paper in map(luminance, papers):
        for colour in colours:
            light, dark = sorted((luminance(colour), paper), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, colour


def test_lines_end_in_dots_and_let_the_image_through():
    two = Picture([picture("red"), picture("blue")], "", [(0.5, 0.5, 0.2, 0.7, 1.0), (0.1, 0.5, 0.2, 0.2, 0.0)])
    read = Read(page_html(Page("t", "q", "s", "a", [Section("s", "", [Pictures("p", [two], title="Heading")])], "c")))
    assert len(read.all("line")) == 2
    (lines,) = (attrs for attrs in read.all("g") if attrs.get("class") == "lines")
    assert lines["marker-start"] == lines["marker-end"] == "url(#end)"
    assert [attrs["id"] for attrs in read.all("marker")] == ["end"]
    assert all(float(line["stroke-opacity"]) <= 0.7 for line in read.all("line"))
    assert len(read.all("h3")) == 1


def test_every_section_names_the_command_of_its_numbers():
    sections = [Section("one"), Section("two", command="rsm-probe run other.yaml")]
    text = Read(page_html(Page("t", "q", "s", "a", sections, "rsm-probe run this.yaml"))).text
    assert text.count("Made by rsm-probe run this.yaml") == 1
    assert text.count("Made by rsm-probe run other.yaml") == 1


def test_a_large_page_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("rsm_probe.report.write.MOST_BYTES", 1000)
    with pytest.warns(UserWarning, match=r"page\.html has .* MB, and may open slowly"):
        write_page(Page("t", "q", "s", "a", [], "c"), tmp_path / "page.html")


@pytest.mark.parametrize("absent", ["altair", "vl_convert"])
def test_a_package_that_charts_need_is_named(monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(StorageError, match="pip install altair vl-convert-python"):
        page_html(a_page())
    page_html(Page("t", "q", "s", "a", [Section("s", "", [Text("no chart")])], "c"))


def test_lines_join_the_centres_of_matched_locations():
    # 2 x 2 locations; the first is matched with the last.
    lines = joining_lines(np.array([3, 1, -1, 0]), np.array([4.0, 2.0, np.nan, 1.0]), ((2, 2), (2, 2)), most=2)
    assert lines == [(0.25, 0.25, 0.75, 0.75, 1.0), (0.75, 0.25, 0.75, 0.25, 0.5)]
    assert joining_lines(np.array([0]), np.array([1.0]), (None, (1, 1))) == []


def test_a_thumbnail_is_small_and_keeps_small_images_as_they_are():
    large, small = thumbnail(np.random.default_rng(0).random((300, 200, 3)), "a"), thumbnail(np.eye(8), "b")
    assert large.size == (75, 112)
    pixels = np.asarray(Image.open(io.BytesIO(small.content)))
    np.testing.assert_array_equal(pixels, 255 * np.eye(8))


STORED = {
    "accuracy": {"net": 0.9}, "versions": {"torch": "2.15"}, "finished": "2026-11-28T06:09:23+00:00", "seconds": 60,
    "seeds": {"images": 0, "models": {"net": [1, 2]}},
}  # fmt: skip


class Study:
    """A study without a page of its own."""

    study = "plain"

    def open(self, out):
        return out

    def figures(self, out):
        figure = Figure()
        figure.subplots().plot([1, 2], [3, 5])
        return {"line": figure}

    def page(self, out):
        return None


def test_a_study_without_a_page_shows_its_figures_and_tables(tmp_path):
    (tmp_path / "table.csv").write_text("model,value\n<b>,0.123456\n")
    (tmp_path / "provenance.json").write_text(json.dumps(STORED))
    html = write_report(Study(), tmp_path).read_text(encoding="utf-8")
    read = Read(html)
    assert [attrs["src"][:22] for attrs in read.all("img")] == ["data:image/png;base64,"]
    assert "0.123" in read.text
    assert "<b>" in read.text
    assert "net 0.900" in read.text
    assert "2026-11-28 06:09 UTC" in read.text
    assert re.search(r"about \S+ \w+, including the training of its networks", read.text)
    assert "images: 0; model net: 1 2" in read.text
    assert f"Study plain (run folder {tmp_path.name})" in read.text
    assert read.text.count(str(tmp_path)) == 2 * read.text.count("rsm-probe run")  # and nowhere else
    assert read.text.count(f"Made by rsm-probe run {tmp_path}/config.yaml --out {tmp_path}") == 2
    assert write_report(Study(), tmp_path, tmp_path / "again.html").read_text(encoding="utf-8") == html
