"""The written pages: notebooks and code run as they stand, links and names lead somewhere, prose is wrapped."""

import importlib
import os
import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from reference_tables import REFERENCE, TABLES, with_tables

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
@pytest.mark.slow
def test_notebook_runs_from_the_top(notebook):
    content = nbformat.read(notebook, as_version=4)
    NotebookClient(content, timeout=300, resources={"metadata": {"path": str(notebook.parent)}}).execute()
    outputs = [output for cell in content.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    stored = nbformat.read(notebook, as_version=4)
    assert all(cell.outputs or cell.source.startswith("import") for cell in stored.cells if cell.cell_type == "code")


DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "benchmarks/results").glob("*.md"), *DOCS])


def parametrize_pages(test):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())(test)


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def prose(text: str) -> list[str]:
    """The lines outside of code and tables."""
    lines = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()
    return [line for line in lines if not line.lstrip().startswith("|")]


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """What the pages name: random weights and few images stand in for what would have to be downloaded."""
    from timm.models.vision_transformer import VisionTransformer

    from rsm_probe.sources import NetworkConfig, build_network, photos

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build_network(NetworkConfig(widths=(8, 8, 16, 16), stem_stride=2), 10).eval()
    vit = VisionTransformer(img_size=64, patch_size=16, embed_dim=16, depth=2, num_heads=2).eval()
    batches = [torch.randn(5, 3, 64, 64) for _ in range(2)]
    return {"model": model, "vit": vit, "few": photos(count=12, size=64), "images": batches[0], "batches": batches}


def small(code: str) -> str:
    """A sweep as a page shows it, over the models and images that are pretended."""
    for shown, substitute in (
        ('"torchvision:resnet18"', "model"),
        ('"timm:vit_tiny_patch16_224"', "vit"),
        ('"my_photos"', "few"),
        ("batch_size=50", "batch_size=6"),
    ):
        assert shown in code
        code = code.replace(shown, substitute)
    return code


def test_readme_code_runs(pretend):
    (code,) = code_blocks("README.md", "python")
    exec(small(code), pretend)
    assert pretend["result"].grid("resnet", "vit", matching_a="optimal").shape == (2, 2)
    assert pretend["semantic"].values.shape == (5, 5)
    assert pretend["best"].value <= pretend["best"].bound


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120] == []


def test_readme_commands_are_those_of_ci():
    quickstart, test = code_blocks("README.md", "bash")
    assert "rsm-probe run configs/quickstart.yaml" in quickstart
    assert "-m pytest" in test
    assert f"<!-- test command -->\n```bash\n{test}```" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@parametrize_pages
def test_prose_wraps_at_120_columns(page):
    assert [line for line in prose(page.read_text(encoding="utf-8")) if len(line) > 120] == []


def anchors(page: Path) -> set[str]:
    """The names by which a link leads to a heading."""
    headings = [line.lstrip("# ") for line in prose(page.read_text(encoding="utf-8")) if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@parametrize_pages
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not heading or heading in anchors(file), target


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_is_a_screenful_of_headings(page):
    headings = [line for line in prose(page.read_text(encoding="utf-8")) if re.match(r"#{2,} ", line)]
    assert len(headings) <= 11, headings
    assert page.parent.name in FOLDERS or page.parents[1].name in FOLDERS or page.parent == ROOT / "docs"


# Diátaxis: to learn, to do, to understand, to look up.
FOLDERS = ("tutorials", "how-to", "explanation", "reference")


@pytest.mark.parametrize("folder", FOLDERS[:3])
def test_readers_find_every_page_of_a_folder(folder):
    index = (ROOT / "docs" / folder / "index.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs" / folder).glob("*.md")} - {"index.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == pages


@pytest.mark.parametrize("page", TABLES)
def test_tables_say_what_the_code_says(page):
    assert (REFERENCE / page).read_text(encoding="utf-8") == with_tables(page), "run: python tests/reference_tables.py"


@parametrize_pages
def test_files_that_pages_name_exist(page):
    text = page.read_text(encoding="utf-8")
    for file in re.findall(r"(?<![\w/])(?:configs|benchmarks|tests|notebooks|docs)/[\w/-]+\.\w+", text):
        assert (ROOT / file).is_file(), file


@parametrize_pages
def test_names_that_pages_use_exist(page):
    for name in set(re.findall(r"\brsm_probe((?:\.[A-Za-z_]\w*)+)", page.read_text(encoding="utf-8"))):
        value = importlib.import_module("rsm_probe")
        for part in name.removeprefix(".").split("."):
            value = getattr(value, part, None) or importlib.import_module(f"{value.__name__}.{part}")
