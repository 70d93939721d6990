"""Evidence by one command: the smoke configuration on cut-outs and backgrounds that are drawn here."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from rsm_probe.cli import app
from rsm_probe.errors import ConfigError
from rsm_probe.studies.registry import read_study

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke" / "evidence.yaml"


def cut_outs(folder: Path) -> Path:
    """Shapes of three classes on transparency, three of each."""
    draw = {
        "disc": lambda pen, colour: pen.ellipse((4, 4, 36, 36), fill=colour),
        "square": lambda pen, colour: pen.rectangle((6, 8, 34, 32), fill=colour),
        "cross": lambda pen, colour: (
            pen.rectangle((16, 2, 24, 38), fill=colour), pen.rectangle((2, 16, 38, 24), fill=colour)
        ),
    }  # fmt: skip
    for name, shape in draw.items():
        for number, colour in enumerate(("red", "yellow", "navy")):
            image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
            shape(ImageDraw.Draw(image), colour)
            (folder / name).mkdir(parents=True, exist_ok=True)
            image.save(folder / name / f"{number}.png")
    return folder


def backgrounds(folder: Path) -> Path:
    """Four pictures of noise."""
    folder.mkdir(parents=True)
    for number in range(4):
        noise = np.random.default_rng(number).integers(60, 200, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((96, 72)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return [f"cutouts={cut_outs(folder / 'cutouts')}", f"backgrounds={backgrounds(folder / 'backgrounds')}"]


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """The smoke configuration, by the command that users type."""
    out = tmp_path_factory.mktemp("evidence") / "run"
    options = [part for change in pictures for part in ("--set", change)]
    result = CliRunner().invoke(app, ["run", str(SMOKE), *options, "--out", str(out), "--no-progress", "--no-figures"])
    assert result.exit_code == 0, result.output
    return read_study(SMOKE, changes=pictures), out


@pytest.mark.slow
def test_all_studies_run_by_one_command_on_the_same_pictures_and_models(finished):
    study, out = finished
    assert {file.name for file in out.iterdir() if file.is_dir()} >= {"models", *study.studies}
    # One network for all, and its untrained twin.
    assert sorted(file.name for file in (out / "models").iterdir()) == [
        "digits-untrained.safetensors", "digits.safetensors",
    ]  # fmt: skip
    assert {part.images.cutouts for name, part in study.studies.items() if name != "factors"} == {study.cutouts}
    assert study.studies["factors"].base.images.cutouts == study.cutouts


@pytest.mark.slow
def test_the_report_counts_what_the_tables_hold(finished):
    study, out = finished
    results, report = study.open(out), (out / "report.md").read_text(encoding="utf-8")
    assert "torch " in report
    base = study.studies["factors"].base
    assert f"factors {base.seed}, {base.images.seed}" in report
    assert "## By depth" in report
    for title in ("Retrieval", "Translation", "Output", "Approximation", "one factor at a time"):
        assert title in report
    line = next(line for line in report.splitlines() if line.startswith("| scenes |") and "untrained" not in line)
    counted = [int(number) for number in re.findall(r"\d+", line.split("|")[4])]
    rows = [r for r in results["scenes"].select(model="digits", matching="identity")]
    assert counted == [
        sum(row["difference_low"] > 0 for row in rows),
        sum(row["difference_low"] <= 0 <= row["difference_high"] for row in rows),
        sum(row["difference_high"] < 0 for row in rows),
    ]
    assert sum(counted) == len(rows) == 2 * 3  # layers and kernels


@pytest.mark.slow
def test_run_again_it_computes_nothing(finished):
    study, out = finished
    files = {file: file.stat().st_mtime_ns for file in out.rglob("*") if {"parts", "captures"} & set(file.parts)}
    assert files
    study.run(out)
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*") if {"parts", "captures"} & set(f.parts)} == files


@pytest.mark.slow
def test_the_plan_says_cells_pairs_and_seconds_of_all_studies(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [part for change in pictures for part in ("--set", change)]
    result = CliRunner().invoke(app, ["check", str(SMOKE), *options])
    assert result.exit_code == 0, result.output
    assert re.search(r"10 levels in \d runs", result.output)
    assert "all studies: about" in result.output
    assert not list(tmp_path.iterdir())


def test_pictures_that_nobody_named_are_asked_for():
    with pytest.raises(ConfigError, match=r"scenes: images: .*--set cutouts=FOLDER --set backgrounds=FOLDER"):
        read_study(SMOKE, changes=["cutouts=null", "backgrounds=null"])


def test_classes_are_chosen_for_all_studies(pictures):
    study = read_study(SMOKE, changes=[*pictures, "include=[disc, cross]"])
    assert study.studies["scenes"].images.include == ("disc", "cross")
    notes = study.studies["scenes"].images.load().annotations
    assert {name for note in notes for name in note["counts"]} == {"disc", "cross"}


def test_the_full_configuration_is_valid(pictures):
    study = read_study(ROOT / "configs" / "evidence.yaml", changes=pictures)
    assert len(study.studies["factors"].levels) == len({(lv.factor, lv.name) for lv in study.studies["factors"].levels})
