"""The gallery: no figure is missing, and under each is a command that makes it."""

import re

import pytest
from pages import ROOT
from test_code_blocks import check_call, invocations

FIGURES = sorted(file.name for kind in ("png", "svg", "webp") for file in (ROOT / "docs" / "figures").glob(f"*.{kind}"))
GALLERY = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")


def under(figure: str) -> str:
    """What the gallery says from a figure to the next heading."""
    match = re.search(rf"!\[[^]]+\]\(figures/{re.escape(figure)}\)(.*?)(?=^## |\Z)", GALLERY, re.MULTILINE | re.DOTALL)
    return match[1] if match else ""


def test_there_are_figures():
    assert len(FIGURES) >= 5


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_is_in_the_gallery_with_its_command(figure):
    command = re.search(r"```bash\n(.*?)```", under(figure), re.DOTALL)
    assert command, f"docs/gallery.md has no command for {figure}"
    calls = invocations(command[1])
    scripts = re.findall(r"^python ([\w/.-]+\.py)", command[1], re.MULTILINE)
    assert calls or scripts
    for words in calls:
        check_call(words)
    for script in scripts:
        assert (ROOT / script).is_file()
