"""The documentation site: it builds without a warning, names every public name, and loads nothing from a network."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from pages import ROOT
from test_reference import PUBLIC, on_pages, value_of

pytestmark = pytest.mark.slow


def build(source: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", *options, str(source), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "docs", out, "-j", "2")
    assert done.returncode == 0, done.stderr
    return out


class Page(HTMLParser):
    """The addresses that a page loads, those that it links to, and its anchors."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.anchors |= {value for key in ("id", "name") if (value := named.get(key))}
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed") and named.get("src"):
            self.loads.append(str(named["src"]))
        if tag == "link" and {"stylesheet", "preload", "icon", "preconnect"} & set(str(named.get("rel")).split()):
            self.loads.append(str(named["href"]))
        if tag == "a" and named.get("href"):
            self.links.append(str(named["href"]))


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {file: Page(file) for file in site.rglob("*.html")}


def test_nothing_is_loaded_from_a_network(site, pages):
    assert pages
    for file, page in pages.items():
        assert [address for address in page.loads if urlsplit(address).scheme or address.startswith("//")] == [], file
    for style in site.rglob("*.css"):
        addresses = re.findall(r"url\(\s*['\"]?(\w+:)?//", style.read_text(encoding="utf-8"))
        assert not addresses, style


def test_links_between_pages_lead_somewhere(site, pages):
    anchors = {file: page.anchors for file, page in pages.items()}
    for file, page in pages.items():
        if file.is_relative_to(site / "_modules"):
            continue  # sources link back by one name per file, although errors are documented under two
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            assert target.exists(), f"{file.relative_to(site)} links to {address}"
            if parts.fragment and target in anchors:
                assert unquote(parts.fragment) in anchors[target] | {"top"}, f"{file.relative_to(site)}: {address}"


def test_every_public_name_has_an_entry(pages):
    anchors = set().union(*(page.anchors for page in pages.values()))
    documented = {name: value_of(name) for name in on_pages()}
    assert [name for name in documented if name not in anchors] == []
    assert [name for name, value in PUBLIC.items() if not any(value is other for other in documented.values())] == []


def test_every_code_of_the_gallery_draws_a_figure_of_its_own(site, pages):
    drawn = [file for file in pages[site / "gallery.html"].loads if "_images/" in file and "figures" not in file]
    plots = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8").count(".. plot::")
    contents = {(site / file).read_bytes() for file in drawn}
    assert plots > 3
    assert len(contents) == plots + len([*(ROOT / "docs" / "figures").glob("*.png")])


def test_the_search_works_from_disk(site):
    # Browsers refuse to fetch files from disk, but run scripts: the index is one, and no result needs its page.
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert index.startswith("Search.setIndex(")
    for word in ("rewindow", "match_affin", "glossari"):
        assert word in index
    assert "SHOW_SEARCH_SUMMARY: false" in (site / "_static" / "documentation_options.js").read_text(encoding="utf-8")


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(
    ("words", "page"), [("rewindowed", "reference/api/matching.html"), ("glossary", "explanation/concepts.html")]
)
def test_a_browser_finds_words_from_disk(site, tmp_path, words, page):
    address = f"{(site / 'search.html').as_uri()}?q={words}"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=8000",
    ]
    command = [str(BROWSER), *options, "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    results = done.stdout.partition('id="search-results"')[2]
    assert f'href="{page}"' in results or f'href="{page}#' in results


# What is wrong on a page -> what the build says.
MISTAKES = {
    "[nowhere](nowhere.md)": "nowhere.md",
    "[no heading](index.md#no-such-heading)": "no-such-heading",
    "{py:func}`rsm_probe.no_such_function`": "rsm_probe.no_such_function",
    "![no picture](figures/no_such_picture.png)": "no_such_picture",
    "```{eval-rst}\n.. autofunction:: rsm_probe.no_such_name\n```": "no_such_name",
    "```{eval-rst}\n.. plot::\n\n   1 / 0\n```": "ZeroDivisionError",
}


def test_mistakes_fail_the_build(tmp_path):
    source = tmp_path / "docs"
    source.mkdir()
    (source / "conf.py").write_text((ROOT / "docs" / "conf.py").read_text(encoding="utf-8"), encoding="utf-8")
    (source / "index.md").write_text("# Page\n\n" + "\n\n".join(MISTAKES) + "\n", encoding="utf-8")
    done = build(source, tmp_path / "site", "-b", "dummy")
    assert done.returncode != 0
    assert {text for text, problem in MISTAKES.items() if problem not in done.stderr} == set()
