import io
import os
import re
import signal
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Literal, NamedTuple
from unittest import mock

import numpy as np
import pytest
import xarray as xr
import yaml
from moments import exit_code, signal_itself_at
from PIL import Image

from rsm_probe import __version__
from rsm_probe.cli import main
from rsm_probe.sources import IMAGE_SETS, ImageSet, NamedImageSet
from rsm_probe.studies import STUDIES, read_study
from rsm_probe.studies.sweep import SweepConfig

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "configs" / "smoke" / "sweep.yaml"


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def cli(*words: object, check: bool = True) -> Done:
    """The command in this process; whatever is no error of the project's own comes out as it is."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", ["rsm-probe", *map(str, words)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    done = Done(code, out.getvalue(), err.getvalue())
    if check:
        assert done.returncode == 0, done.stderr
    return done


def refused(*words: object) -> str:
    """The message of a command that is refused: one line of error, no traceback."""
    done = cli(*words, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: " in done.stderr
    return done.stderr


def changed(path: Path, **changes: object) -> Path:
    """The smoke configuration with some keys changed, as a file of its own."""
    data = {**yaml.safe_load(SMOKE.read_text()), **changes}
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    done = cli("run", SMOKE, "--out", out)
    assert "pairs" in done.stderr  # bars and an estimate
    assert "about" in done.stderr
    return out


@pytest.mark.slow
def test_a_run_ends_with_its_page_which_report_writes_again(run_folder, tmp_path):
    page = (run_folder / "report.html").read_bytes()
    assert b"trained-0" in page
    assert cli("report", run_folder, "--out", tmp_path / "again.html").stdout == f"report: {tmp_path / 'again.html'}\n"
    assert (tmp_path / "again.html").read_bytes() == page
    assert "it has neither config.yaml nor result.zarr" in refused("report", tmp_path)


@pytest.mark.slow
def test_a_run_without_the_packages_of_the_page_says_how_to_get_it(run_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    before = (run_folder / "report.html").read_bytes()
    done = cli("run", SMOKE, "--out", run_folder, "--no-figures")
    assert (
        "no report page: charts need Vega-Altair and vl-convert-python; pip install altair vl-convert-python"
        in done.stdout
    )
    assert "pip install altair vl-convert-python" in refused("report", run_folder)
    assert (run_folder / "report.html").read_bytes() == before
    assert "report" not in cli("run", SMOKE, "--out", run_folder, "--no-figures", "--no-report").stdout


@pytest.mark.slow
def test_run_folder_holds_all_that_is_promised(run_folder):
    stored = xr.open_zarr(run_folder / "result.zarr")
    assert stored["cka"].sizes == {"rsm_a": (4 + 4 + 5) * 4, "rsm_b": (4 + 4 + 5) * 4}
    assert set(map(str, stored["model_a"].values)) == {"trained-0", "trained-1", "untrained"}
    names = {file.name for file in (run_folder / "figures").iterdir()}
    stems = {"figure15", "figure16", "figure17", "rsms-linear", "rsms-cosine"}
    assert names == {f"{stem}.{end}" for stem in stems for end in ("png", "pdf")}
    for name in (f"{stem}.png" for stem in stems):
        with Image.open(run_folder / "figures" / name) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 300
        assert pixels.std() > 10, f"{name} is blank"
    assert read_study(run_folder / "config.yaml") == read_study(SMOKE)
    assert '"torch"' in (run_folder / "provenance.json").read_text()
    assert '"trained-1"' in (run_folder / "provenance.json").read_text()


@pytest.mark.slow
def test_running_again_and_drawing_again(run_folder):
    before = (run_folder / "result.zarr" / "cka" / "0.0").stat().st_mtime_ns
    cli("run", SMOKE, "--out", run_folder, "--no-progress", "--no-figures", "--no-report")
    assert (run_folder / "result.zarr" / "cka" / "0.0").stat().st_mtime_ns == before
    for file in (run_folder / "figures").iterdir():
        file.unlink()
    cli("figures", run_folder)
    assert len(list((run_folder / "figures").iterdir())) == 10


@pytest.mark.slow
def test_other_settings_are_refused_and_nothing_is_lost(run_folder, tmp_path):
    message = refused("run", changed(tmp_path / "other.yaml", batch_size=8), "--out", run_folder)
    assert "different batch_size" in message
    assert "choose a different --out" in message
    xr.open_zarr(run_folder / "result.zarr")["cka"].load()
    # How a run is carried out may change, and it is still the same run.
    cli(
        "run",
        changed(tmp_path / "same.yaml", workers=1, memory="200MB"),
        "--out",
        run_folder,
        "--no-figures",
        "--no-report",
    )


def test_check_prints_the_plan_and_writes_nothing(tmp_path):
    config = changed(tmp_path / "c.yaml", models=[{"name": "net", "source": "timm:test_resnet", "weights": None}])
    shown = cli("check", config, "--out", tmp_path / "out").stdout
    assert "net (timm:test_resnet): layers " in shown
    assert re.search(r"estimate: .* pairs per matching, about .* of memory .* of disk", shown)
    assert f"run folder: {tmp_path / 'out'}, to begin" in shown
    assert not (tmp_path / "out").exists()
    assert "has no layer 'layer9'" in refused("check", changed(config, layers="layer9"))


def test_the_version_is_shown():
    assert cli("--version").stdout == f"rsm-probe {__version__}\n"


@pytest.mark.slow
def test_a_run_without_figures_says_why(tmp_path):
    model = {"name": "net", "source": "timm:test_resnet", "weights": None}
    config = changed(tmp_path / "c.yaml", models=[model], keep=[], kernels=["linear"], matchings=["identity"])
    done = cli("run", config, "--out", tmp_path / "out", "--no-progress")
    for text in (done.stdout, cli("figures", tmp_path / "out").stdout):
        assert "no figures to draw: figures compare identity with a second matching" in text
        assert "matchings: identity and kept no RSMs" in text
    assert not (tmp_path / "out" / "figures").exists()


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    assert "not a run folder" in refused("run", SMOKE, "--out", tmp_path)
    assert "is not a run folder" in refused("figures", tmp_path)
    assert "is a file" in refused("run", SMOKE, "--out", tmp_path / "thesis.txt")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batchsize": 4}, r"batchsize: unknown key; nearest: 'batch_size'"),
        ({"batch_size": "many"}, r"batch_size: .*valid integer.*found 'many'"),
        ({"study": "sweeep"}, r"study: must be one of .*sweep, sweeps, pairs.*nearest: 'sweep'"),
        ({"matchings": ["optimall"]}, r"matchings: unknown matching 'optimall'; nearest: 'optimal'"),
        ({"kernels": ["rbff"]}, r"kernels: unknown kernel 'rbff'; nearest: 'rbf'"),
        ({"images": {"source": "digits", "splitt": "test"}}, r"images\.splitt: unknown key; nearest: 'split'"),
        ({"models": [{"name": "a"}]}, r"models\.0: give either source: or recipe:"),
        (
            {"models": [{"source": "timm:resnet19", "weights": None}]},
            r"timm has no model 'resnet19'; nearest: .*resnet18",
        ),
        ({"models": [{"source": "resnet18"}]}, r"unrecognised model source 'resnet18'"),
        ({"layers": "layer9.*"}, r"no layer matches 'layer9\.\*'"),
        ({"images": {"source": "no/such/folder"}}, r"no image folder at no/such/folder"),
        ({"images": {"source": "digts"}}, r"no image.*digts"),
        ({"max_hours": 1e-9}, r"above max_hours.*cheaper"),
        ({"device": "gpu"}, r"cannot run on device 'gpu'"),
        ({"seed": -1}, r"seed: .*greater than or equal to 0"),
        ({"study": ["sweep"]}, r"study: must be one of"),
        ({"images": {"source": "somewhere", "split": "test"}}, r"no test images in somewhere"),
        ({"keep": ["layer9"]}, r"keep='layer9' matches no layer of this sweep; nearest"),
        ({"images": {"source": "digits", "count": 3}}, r"3 images; unbiased and biased CKA needs at least 4"),
    ],
)
def test_mistakes_in_a_configuration_are_answered(tmp_path, changes, named):
    assert re.search(
        named, refused("run", changed(tmp_path / "c.yaml", **changes), "--out", tmp_path / "out"), re.DOTALL
    )


def test_a_cluster_is_refused_where_a_study_has_no_use_for_it(tmp_path):
    config = SMOKE.parent / "outputs.yaml"
    message = refused("run", config, "--out", tmp_path / "out", "--cluster", "tcp://127.0.0.1:1")
    assert "study: outputs runs in one process only; --cluster works with study: " in message
    assert not (tmp_path / "out").exists()


def test_missing_and_broken_configurations(tmp_path):
    assert "no configuration at" in refused("run", tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("study: [")
    assert "not valid YAML" in refused("run", tmp_path / "bad.yaml")


def test_folder_with_a_broken_image_is_counted_or_fatal(tmp_path):
    images = tmp_path / "images"
    for k in range(12):
        (images / f"class{k % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
            images / f"class{k % 2}" / f"{k}.png"
        )
    (images / "class0" / "broken.png").write_bytes(b"no image")
    config = changed(tmp_path / "c.yaml", images={"source": str(images)}, layers="layer4.0", keep=["*"])
    warned = cli("run", config, "--out", tmp_path / "out", "--no-figures", "--no-report").stderr
    assert "warning: skipped 1 of 13 image files that cannot be read: class0/broken.png" in warned
    assert "class0/broken.png" in (tmp_path / "out" / "provenance.json").read_text()
    assert set(map(str, xr.open_zarr(tmp_path / "out" / "result.zarr")["image_label"].values.ravel())) == {
        "class0",
        "class1",
    }
    strict = changed(tmp_path / "s.yaml", images={"source": str(images), "strict": True}, layers="layer4.0")
    assert "broken.png" in refused("run", strict, "--out", tmp_path / "strict")


def interrupted(config: Path, out: Path, said: Path) -> None:
    """A run that is interrupted while the products of its second batch are written."""
    # Shells start background jobs with this signal ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal_itself_at("rename", 2, out / "rsms.zarr" / "images" / "000" / "digest" / "c", signal.SIGINT)
    done = cli("run", config, "--out", out, "--no-figures", "--no-report", check=False)
    said.write_text(done.stderr)
    os._exit(done.returncode)


def test_interrupt_says_how_to_continue_and_continues(tmp_path):
    images = {"source": "digits", "size": 32, "count": 120}
    settings = {"keep": [], "kernels": ["linear"], "matchings": ["identity"], "device": "cpu", "images": images}
    (untrained,) = (model for model in yaml.safe_load(SMOKE.read_text())["models"] if model["name"] == "untrained")
    config = changed(tmp_path / "c.yaml", models=[untrained], **settings)
    out, said = tmp_path / "out", tmp_path / "said"
    assert exit_code(interrupted, config, out, said) == 130
    assert "run the same command again to continue" in said.read_text()
    assert "Traceback" not in said.read_text()
    assert len(list(out.glob("rsms.zarr/products/*/*/norm/c/*"))) == 1
    assert not (out / "result.zarr").exists()
    cli("run", config, "--out", out, "--no-figures", "--no-report")
    assert (out / "result.zarr").exists()


def test_layers_lists_blocks_and_everything(tmp_path):
    shown = cli("layers", "timm:vit_tiny_patch16_224").stdout
    assert shown.count("\n*") == 12
    line = next(line for line in shown.splitlines() if " blocks.0 " in line)
    assert line.split() == ["*", "blocks.0", "Block", "197x192", "196", "192", "14x14", "1"]
    everything = cli("layers", "torchvision:resnet18", "--all").stdout
    assert "layer1.0.relu#1" in everything
    assert "nearest: 'resnet18'" in refused("layers", "torchvision:resnet81")


def test_train_writes_networks_that_layers_reads(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("images: digits\nsize: 16\nsteps: 10\nnetwork: {widths: [8, 8, 8, 8], stem_stride: 2}\n")
    done = cli("train", recipe, "--out", tmp_path, "--seed", 3)
    assert "accuracy" in done.stdout
    shown = cli("layers", tmp_path / "tiny-3.safetensors").stdout
    assert shown.count("\n*") == 4
    assert "unknown key; nearest: 'steps'" in refused("train", changed_recipe(tmp_path), "--out", tmp_path)


def changed_recipe(folder: Path) -> Path:
    path = folder / "wrong.yaml"
    path.write_text("images: digits\nstep: 5\n")
    return path


def test_help_teaches():
    assert "rsm-probe run quickstart" in cli("--help").stdout
    for command, word in (
        ("run", "interruption"),
        ("check", "nothing is run, trained or written"),
        ("layers", "blocks"),
        ("figures", "finished run"),
        ("train", "seed"),
    ):
        assert word in cli(command, "--help").stdout


def test_random_weights_of_a_library_model_continue_and_have_seeds(tmp_path):
    models = [{"source": "timm:test_resnet", "weights": None, "seeds": [0, 1]}]
    config = changed(tmp_path / "c.yaml", models=models, keep=[], kernels=["linear"], matchings=["identity"])
    first = cli("run", config, "--out", tmp_path / "out", "--no-figures", "--no-report").stdout
    assert cli("run", config, "--out", tmp_path / "out", "--no-figures", "--no-report").stdout == first
    grid = xr.open_zarr(tmp_path / "out" / "result.zarr")["cka"]
    assert set(map(str, grid.model_a.values)) == {"test_resnet-0", "test_resnet-1"}
    assert float(grid.values[0, -1]) < 0.999


def test_a_mistake_that_is_corrected_can_use_the_same_folder(tmp_path):
    refused("run", changed(tmp_path / "c.yaml", layers="layer9"), "--out", tmp_path / "out")
    cli(
        "run",
        changed(tmp_path / "c.yaml", layers="layer4.0", keep=[]),
        "--out",
        tmp_path / "out",
        "--no-figures",
        "--no-report",
    )
    with xr.open_zarr(tmp_path / "out" / "result.zarr") as result:
        assert set(result["layer_a"].values) == {"layer4.0"}


def failing(monkeypatch, folder: Path, error: type[BaseException]) -> None:
    """Files and registered additions of a user that raise an error: a study, an image set and a model."""

    class Failing(SweepConfig):
        study: Literal["failing"] = "failing"

        def run(self, *arguments, **options):
            raise error

        figures = run

    def images(split: str = "all") -> ImageSet:
        raise error

    monkeypatch.setitem(STUDIES, "failing", Failing)
    monkeypatch.setitem(IMAGE_SETS, "failing", NamedImageSet(images, questions=1))
    (folder / "recipe.yaml").write_text("images: failing\n")
    changed(folder / "config.yaml", study="failing")
    own_model(folder, f"def g(): raise {error.__name__}")


def test_what_nobody_expected_is_a_sentence_too(tmp_path, monkeypatch):
    failing(monkeypatch, tmp_path, ZeroDivisionError)
    words = "run", tmp_path / "config.yaml", "--out", tmp_path / "out"
    done = cli(*words, check=False)
    assert done.returncode == 1
    assert "error: ZeroDivisionError" in done.stderr
    monkeypatch.setenv("RSM_PROBE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli(*words)


# Hostile words


def own_model(folder: Path, code: str) -> str:
    (folder / "m.py").write_text(f"from torch import nn\n{code}\n")
    return f"{folder / 'm.py'}:g"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "def g(): raise ValueError('no such width')",
            "g in .*m.py failed to build a model: ValueError: no such width",
        ),
        ("def g(): raise KeyError('x')", "g in .*m.py failed to build a model: KeyError: 'x'"),
        ("def g(): assert False", "g in .*m.py failed to build a model: AssertionError"),
        ("def g(): import sys; sys.exit(3)", r"g in .*m.py failed .*ended the program \(sys.exit\(3\)\)"),
        ("def g(width): return nn.Linear(width, 1)", "g in .*m.py failed .*TypeError: .*missing 1 required"),
        ("def g(): return None", "g in .*m.py must return a torch.nn.Module, got NoneType"),
        ("def g(): return nn.Linear", "g in .*m.py must return a torch.nn.Module, got type"),
        ("async def g(): return nn.Linear(1, 1)", "g in .*m.py must return a torch.nn.Module, got coroutine"),
        ("def g(): return g()", "g in .*m.py failed to build a model: RecursionError"),
        ("g = 3", "m.py has no function 'g'"),
        ("def g(:", "m.py cannot be imported: SyntaxError"),
        ("import nothing_of_that_name", "m.py cannot be imported: ModuleNotFoundError"),
        ("1 / 0", "m.py cannot be imported: ZeroDivisionError"),
        ("raise SystemExit", r"m.py cannot be imported: it ended the program \(sys.exit\(None\)\)"),
        ("\0", "m.py cannot be imported: "),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_functions_that_build_no_model_are_named_with_their_file(tmp_path, code, said):
    message = refused("layers", own_model(tmp_path, code))
    assert re.search(said, message), message
    assert "unexpected" not in message


@pytest.mark.parametrize(
    "model",
    [
        "x" * 300 + ".safetensors",
        "x" * 300 + ".py:g",
        "a\0.safetensors",
        "a\0.py:g",
        "hf:" + "x" * 300,
        "hf:./a\0",
        "",
        ":",
    ],
)
def test_models_that_no_file_is_called_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "unexpected" not in refused("layers", model)


LONG, NUL = "x" * 300, "a\0b"


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (LONG, "--out is too long"),
        (NUL, "--out holds a NUL character"),
        ("", "--out is empty"),
        ("s3://bucket/run", "--out must be a local folder or file"),
        ("http://host/run", "--out must be a local folder or file"),
        ("file:/run", "--out must be a local folder or file"),
    ],
    ids=["long", "NUL", "empty", "s3", "http", "file"],
)
def test_folders_that_cannot_be_written_are_refused_before_any_work(tmp_path, monkeypatch, out, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("steps: 10\nsize: 8\n")
    for words in (("run", SMOKE), ("train", "recipe.yaml")):
        assert said in refused(*words, "--out", out)
    assert said.replace("--out", "the run folder") in refused("figures", out)
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("seed", ["-1", str(2**63), "9" * 5000, "1.5", "one"])
def test_seeds_out_of_range_are_refused_before_any_training(tmp_path, seed):
    (tmp_path / "recipe.yaml").write_text("steps: 10\nsize: 8\n")
    done = cli("train", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "--seed", 0, "--seed", seed, check=False)
    assert done.returncode == 2
    assert "--seed" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_in_place_of_a_network_is_refused_before_any_training(tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 10\nsize: 8\n")
    (tmp_path / "recipe-0.safetensors").mkdir()
    assert "it is a folder or device" in refused("train", tmp_path / "recipe.yaml", "--out", tmp_path, "--seed", 0)
    message = refused("train", tmp_path / "recipe.yaml", "--out", tmp_path / "recipe.yaml", "--seed", 0)
    assert "is not a writable folder" in message


@pytest.mark.parametrize("kind", ["missing", "empty", "foreign", "binary", "file"])
def test_figures_of_what_is_not_a_run_are_refused(tmp_path, kind):
    folder = tmp_path / "run"
    if kind == "file":
        folder.write_text("text")
    elif kind != "missing":
        folder.mkdir()
    if kind == "foreign":
        (folder / "config.yaml").write_text("name: of another tool\n")
    elif kind == "binary":
        (folder / "config.yaml").write_bytes(bytes(range(256)))
    message = refused("figures", folder)
    assert str(folder) in message
    assert "unexpected" not in message


@pytest.mark.parametrize("command", ["run", "train"])
@pytest.mark.parametrize("kind", ["missing", "folder", "binary", "long"])
def test_configurations_that_are_not_files_of_text_are_refused(tmp_path, command, kind):
    path: Path | str = tmp_path / "c.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(bytes(range(256)) * 10)
    elif kind != "missing":
        path = f"{LONG}.yaml"
    message = refused(command, path, "--out", tmp_path / "out")
    assert "configuration" in message
    assert "unexpected" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("run", "{folder}/config.yaml", "--out", "{folder}/out"),
        ("figures", "{folder}"),
        ("layers", "{folder}/m.py:g"),
        ("train", "{folder}/recipe.yaml", "--out", "{folder}/out"),
    ],
    ids=lambda words: words[0],
)
def test_an_interruption_anywhere_is_a_sentence(tmp_path, monkeypatch, words):
    failing(monkeypatch, tmp_path, KeyboardInterrupt)
    done = cli(*(word.format(folder=tmp_path) for word in words), check=False)
    assert done.returncode == 130
    assert "interrupted" in done.stderr


@pytest.mark.slow
def test_names_that_are_not_utf8_are_shown(tmp_path):
    out = tmp_path / os.fsdecode(b"caf\xe9")
    out.mkdir()
    (out / "config.yaml").write_text("study: none\n")
    command = [sys.executable, "-m", "rsm_probe.cli", "figures", os.fsencode(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONUTF8": "1"}, check=False)
    assert done.returncode == 2
    assert r"caf\udce9" in done.stderr
    assert "Traceback" not in done.stderr


# Keys


def test_keys_lists_what_a_configuration_may_say():
    listed = cli("keys").stdout.splitlines()
    assert listed == cli("keys", "sweep").stdout.splitlines()
    for line in ("study: sweep", "images.source: required", "images.clips: null", "matchings: [identity, optimal]",
                 "models.recipe.network.widths: [16, 32, 64, 128]", "max_hours: 12.0"):  # fmt: skip
        assert line in listed
    assert "take this many evenly spaced frames" in listed[listed.index("images.clips: null") + 1]
    # Each top-level key with a default may be written as it is listed.
    defaults = [line for line in listed if line[0] != " " and "." not in line.partition(":")[0]]
    data = {k: v for line in defaults for k, v in yaml.safe_load(line).items() if v != "required"}
    entries = {"models": [{"source": "torchvision:resnet18"}], "images": {"source": "digits"}}
    assert SweepConfig.parse(data | entries) == SweepConfig.parse({"study": "sweep"} | entries)
    assert "unknown study 'sweeep'; nearest: 'sweep'" in refused("keys", "sweeep")
    assert "rsm-probe keys STUDY" in cli("run", "--help").stdout


@pytest.mark.parametrize("place", ["beside", "here"])
def test_an_embedded_set_beside_a_folder_of_its_name_is_said_to_be_read(tmp_path, monkeypatch, place):
    (tmp_path / "beside" / "sub").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / place / "photos"
    folder.mkdir()
    for k in range(8):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(folder / f"{k}.png")
    file = tmp_path / "beside" / "c.yaml"
    images = {"source": "photos", "count": 8, "size": 16}
    with pytest.warns(UserWarning, match=r"'photos' is the embedded image set .* for the folder, write './photos'"):
        assert len(read_study(changed(file, images=images)).images.load()) == 8
    images = read_study(changed(file, images={"source": "./photos"})).images.load()
    assert images.ids == [f"{k}.png" for k in range(8)]


@pytest.mark.slow
def test_layers_of_a_model_of_clips_are_listed_with_frames():
    assert "--clips 16" in refused("layers", "torchvision:r3d_18")
    listed = cli("layers", "torchvision:r3d_18", "--clips", 4).stdout
    assert re.search(r"layer4\.1\s+BasicBlock\s+512x1x7x7", listed)


def test_a_warning_is_printed_once_however_many_parts_give_it(monkeypatch, capsys):
    def warn_twice():
        for _ in range(2):
            with warnings.catch_warnings():  # libraries do so, and Python then forgets what it has shown
                warnings.simplefilter("always")
                warnings.warn("3 of 215 files cannot be used", stacklevel=2)
        warnings.warn("another", stacklevel=2)

    monkeypatch.setattr("rsm_probe.cli.app", warn_twice)
    main()
    assert capsys.readouterr().err == "warning: 3 of 215 files cannot be used\nwarning: another\n"
