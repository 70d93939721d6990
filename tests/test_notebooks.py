"""What the notebooks do before their first import: install the package where it is missing, from one variable."""

import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def first_code(notebook: Path) -> str:
    return next(cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code")


def installed_by(source: str, missing: bool) -> list[str]:
    """The lines of %pip that a cell runs, with its variables in place."""
    lines: list[tuple[str, str]] = []
    names: dict = {
        "get_ipython": lambda: SimpleNamespace(run_line_magic=lambda magic, line: lines.append((magic, line)))
    }
    spec = None if missing else object()
    with mock.patch("importlib.util.find_spec", lambda name: spec if name == "rsm_probe" else pytest.fail(name)):
        exec(TransformerManager().transform_cell(source), names)
    assert all(magic == "pip" for magic, _ in lines)
    return [line.format(**names) for _, line in lines]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_from_one_variable_and_only_what_is_missing(notebook, capsys):
    source = first_code(notebook)
    assert source == first_code(NOTEBOOKS[0])
    assert source.count('SOURCE = ".."') == 1
    assert installed_by(source, missing=False) == []
    assert "nothing is installed" in capsys.readouterr().out
    elsewhere = source.replace('".."', '"my wheels/rsm_probe.whl"')
    assert installed_by(elsewhere, missing=True) == ['install --quiet "my wheels/rsm_probe.whl"']


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_notebooks_lead_to_files(notebook):
    text = "\n".join(c.source for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)\s#]+)", text):
        assert target.startswith("https://") or (notebook.parent / target).exists(), target
