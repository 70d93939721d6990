"""Notebooks and the README's code run as they stand."""

import os
import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import nn

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


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep, loop, pieces = readme_blocks("python")
    # Random weights and few images stand in for what would have to be downloaded.
    quick = sweep.replace('"torchvision:resnet18"', "small").replace('"timm:vit_tiny_patch16_224"', "vit")
    quick = quick.replace('images="photos"', "images=photos(count=12, size=64)")
    quick = quick.replace("batch_size=50", "batch_size=6")
    assert quick != sweep
    torch.manual_seed(0)
    from timm.models.vision_transformer import VisionTransformer

    from rsm_probe.sources.images.embedded.registry import photos
    from rsm_probe.sources.training.train import NetworkConfig, build_network

    small = build_network(NetworkConfig(widths=(8, 8, 16, 16), stem_stride=2), 10).eval()
    vit = VisionTransformer(img_size=64, patch_size=16, embed_dim=16, depth=2, num_heads=2).eval()
    namespace = {"small": small, "vit": vit, "photos": photos}
    exec(quick, namespace)
    assert namespace["result"].grid("resnet", "vit", matching_a="optimal").shape == (2, 2)
    batches = [torch.randn(5, 3, 64, 64) for _ in range(2)]
    exec(loop, {"model": small, "batches": batches})
    namespace = {"model": small, "images": batches[0], "rsm_probe": __import__("rsm_probe")}
    exec(pieces, namespace)
    assert isinstance(small, nn.Module)
    assert namespace["semantic"].values.shape == (5, 5)


def test_readme_commands_name_what_exists():
    (quickstart,), commands = readme_blocks("bash")[:1], readme_blocks("bash")
    assert "rsm-probe run configs/quickstart.yaml" in quickstart
    for file in re.findall(r"configs/[\w/]+\.yaml", "\n".join(commands)):
        assert (ROOT / file).is_file()
    for file in re.findall(r"\]\((docs/[^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / file).is_file(), file
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
