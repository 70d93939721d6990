"""The command line: rsm-probe run, check, sweep, configs, keys, images, layers, figures, report, train."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from rsm_probe.commands import configs, images, keys, report, report_after_run
from rsm_probe.errors import ConfigError, RsmProbeError, StorageError
from rsm_probe.execution.freed_memory import keep_freed_memory
from rsm_probe.layers_command import layers
from rsm_probe.shipped import configuration_file, configuration_name
from rsm_probe.storage.paths import local_folder

if TYPE_CHECKING:
    from rsm_probe.runs.study import Study

# Commands import the packages they use: importing PyTorch takes seconds, and --help should be fast.


class _Commands(TyperGroup):
    """Commands that exit on an interruption with a short message and the exit code of shells."""

    def invoke(self, ctx: Any) -> Any:
        with _interruptible("interrupted"):
            return super().invoke(ctx)


_Seeds = Annotated[
    list[int],
    typer.Option("--seed", min=0, max=2**63 - 1, help="seed of a network; repeat the option for several networks"),
]
_Progress = Annotated[bool, typer.Option(help="show progress bars")]
_ConfigFile = Annotated[
    Path,
    typer.Argument(
        help="a YAML file that describes a study, or the name of one that comes with the package, such as quickstart; "
        "`rsm-probe configs` lists them"
    ),
]
_Changes = Annotated[
    list[str],
    typer.Option(
        "--set", help="KEY=VALUE in place of what the file says, such as images.count=100; repeat it for several keys"
    ),
]
_Out = Annotated[str | None, typer.Option(help="run folder; by default runs/ plus the name of the configuration")]
_AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="run Python code that the configuration names, as in source: file.py:function"),
]
app = typer.Typer(
    cls=_Commands,
    help="Compare what vision models consider similar.\n\n"
    "Start with `rsm-probe run quickstart`: it trains three small networks, compares their "
    "layers with spatio-semantic and semantic RSMs, and saves the figures in runs/quickstart.\n\n"
    "For your own model, list the layers with a command such as `rsm-probe layers timm:resnet50`, and compare them "
    "with `rsm-probe sweep --model timm:resnet50 --images FOLDER`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rsm-probe {importlib.import_module(__package__).__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """Compare what vision models consider similar."""


@app.command()
def run(
    config: _ConfigFile,
    changes: _Changes = [],  # noqa: B006
    out: _Out = None,
    progress: _Progress = True,
    figures: Annotated[bool, typer.Option(help="draw the figures after the run")] = True,
    report: Annotated[bool, typer.Option(help="write the report page after the run")] = True,
    allow_code: _AllowCode = False,
    cluster: Annotated[
        str | None, typer.Option(help="scheduler of a Dask cluster that does the work, such as tcp://host:8786")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="processes of this machine that do the work; with device: cuda, each has one GPU, in turn"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what `rsm-probe check` prints, and stop: nothing is run or written")
    ] = False,
) -> None:
    """Run a study, or continue it after an interruption.

    The run folder receives the results (result.zarr of a sweep, which xarray.open_zarr opens; captures/ and pairs/ of a
    study of all pairs), config.yaml (the configuration with all defaults), provenance.json (versions, seeds,
    accuracies), figures/ and report.html. After an interruption, run the same command again to continue. A folder with
    a run of different settings is rejected.

    `rsm-probe keys STUDY` lists all that a configuration may say of images, models and the study.
    """
    from rsm_probe.studies.registry import read_study

    config = configuration_file(config)
    study = read_study(config, allow_code=allow_code, changes=changes)
    folder = _run_folder(out, configuration_name(config))
    if dry_run:
        _show_plan(study, folder, config.parent)
        return
    _carry_out(study, folder, progress, figures, report, cluster, processes)


def _run_folder(out: str | None, name: str) -> Path:
    # `out` is text because a Path drops the second slash of a URL, which could then not be recognised.
    return Path("runs") / name if out is None else local_folder(out, "--out")


def _carry_out(
    study: Study,
    folder: Path,
    progress: bool,
    figures: bool,
    report: bool,
    cluster: str | None = None,
    processes: int | None = None,
) -> None:
    with _continuable(), _reporting(), _executor(study, folder, cluster, processes) as executor:
        # Workers start in different working directories.
        result = study.run(folder if executor is None else folder.absolute(), executor=executor, progress=progress)
    typer.echo(str(result))
    typer.echo(f"results: {folder}")
    if figures:
        _draw(study, folder)
    if report:
        typer.echo(report_after_run(study, folder))


@app.command()
def check(
    config: _ConfigFile,
    changes: _Changes = [],  # noqa: B006
    out: _Out = None,
    allow_code: _AllowCode = False,
) -> None:
    """Check a study and estimate its cost; nothing is run, trained or written.

    Where weights, images or packages are missing, lists all of them with their sizes and where to get them, estimates
    on paper what the study takes on one GPU and on this machine, and exits with an error; nothing is downloaded.

    Models are loaded, layers are looked up and images are read as by `run`, which would refuse whatever is refused
    here. Models see a few images, on which matchings are timed; networks that the run would train have random weights.
    Prints the models with their layers, images, pairs, time, memory and disk space, and whether the estimate is within
    max_hours; exits with an error if `run` would refuse it. Paths in a configuration are relative to its folder, or
    else to the working directory, which is mentioned; those in a configuration that comes with the package are relative
    to the working directory.
    """
    from rsm_probe.studies.registry import read_study

    config = configuration_file(config)
    study = read_study(config, allow_code=allow_code, changes=changes)
    _show_plan(study, _run_folder(out, configuration_name(config)), config.parent)


def _show_plan(study: Study, folder: Path, recipes: Path, echo: Callable[[str], None] = typer.echo) -> None:
    from rsm_probe.runs.missing.listing import missing_of
    from rsm_probe.runs.missing.on_paper import lines_of, on_paper

    missing = missing_of(study, folder, recipes)
    if missing:
        echo(str(missing))
        for line in lines_of(on_paper(study, folder, recipes)):
            echo(line)
        if missing.downloads:
            echo("(`rsm-probe run` downloads weights of libraries itself where it has a network)")
        raise typer.Exit(1)
    plan = study.plan(folder)
    echo(str(plan))
    echo(f"run folder: {folder}, {plan.state}")
    if plan.refusal is not None:
        raise typer.Exit(1)


@app.command()
def sweep(
    models: Annotated[
        list[str],
        typer.Option("--model", help="torchvision:NAME, timm:NAME, hf:NAME and so on; repeat it for several models"),
    ],
    images: Annotated[str, typer.Option(help="a folder of images, a .npy file, or an embedded set such as digits")],
    layers: Annotated[
        list[str], typer.Option(help="layers to compare, by name, glob or as blocks; repeat it for several")
    ] = ["blocks"],  # noqa: B006
    matchings: Annotated[
        list[str], typer.Option("--matching", help="how locations are paired; repeat it for several")
    ] = ["identity", "optimal"],  # noqa: B006
    kernels: Annotated[
        list[str], typer.Option("--kernel", help="kernel of the RSMs: linear, cosine or rbf; repeat it for several")
    ] = ["linear"],  # noqa: B006
    weights: Annotated[str, typer.Option(help="default, none for random weights, or a checkpoint")] = "default",
    count: Annotated[int | None, typer.Option(min=1, help="images to use, a random sample; by default all")] = None,
    changes: _Changes = [],  # noqa: B006
    out: Annotated[str | None, typer.Option(help="run folder; by default runs/ plus models and images")] = None,
    progress: _Progress = True,
    figures: Annotated[bool, typer.Option(help="draw the figures after the run")] = True,
    report: Annotated[bool, typer.Option(help="write the report page after the run")] = True,
    allow_code: _AllowCode = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the configuration, and the plan as comments; nothing is run")
    ] = False,
) -> None:
    """Compare layers of models on images, without a configuration file.

    Prints the configuration that the options stand for, then runs it as `rsm-probe run` does, with the same files in
    the run folder. `--dry-run > mine.yaml` writes it to a file, for `rsm-probe run mine.yaml`. `--set` sets all other
    keys, such as `--set batch_size=50`; `rsm-probe keys sweep` lists them.
    """
    import yaml

    from rsm_probe.config import ConfigFolder, with_changes
    from rsm_probe.studies.registry import study_of
    from rsm_probe.sweep_command import sweep_name, sweep_settings

    settings = with_changes(sweep_settings(models, images, layers, matchings, kernels, weights, count), changes)
    text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, allow_unicode=True)
    typer.echo(text)
    # What was printed is what runs.
    study = study_of(yaml.safe_load(text), "rsm-probe sweep", ConfigFolder.of(Path("sweep.yaml"), allow_code))
    folder = _run_folder(out, sweep_name(models, images))
    if dry_run:
        _show_plan(study, folder, Path(), lambda lines: typer.echo("\n".join(f"# {a}" for a in lines.splitlines())))
        return
    _carry_out(study, folder, progress, figures, report)


app.add_typer(configs, name="configs")
app.command()(keys)
app.command()(images)
app.command()(report)


@app.command()
def figures(run_folder: Annotated[str, typer.Argument(help="the folder of a finished run")]) -> None:
    """Draw the figures of a finished run again, or say why it has none."""
    from rsm_probe.studies.registry import read_study

    folder = local_folder(run_folder, "the run folder")
    if not (folder / "config.yaml").is_file():
        raise StorageError(f"{folder} is not a run folder (it has no config.yaml)")
    _draw(read_study(folder / "config.yaml", stored=True), folder)


app.command()(layers)


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(help="a YAML file with a training recipe, or the name of one, such as train_digits")
    ],
    out: Annotated[str, typer.Option(help="folder for the .safetensors files")] = "runs/models",
    seeds: _Seeds = [0, 1, 2],  # noqa: B006
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 or mps")] = "auto",
    progress: _Progress = True,
) -> None:
    """Train networks that differ only in their seed, for a sweep over seeds.

    Every minute, and at an interruption, the partly trained network is saved next to the final file. Run the same
    command again to continue; the weights will be the same as without an interruption.
    """
    from rsm_probe.config import ConfigFolder, read_yaml
    from rsm_probe.errors import ModelError
    from rsm_probe.execution.devices import find_device
    from rsm_probe.sources import TrainingConfig, train_or_load

    find_device(device, ModelError)
    folder, config = local_folder(out, "--out"), configuration_file(config)
    recipe = TrainingConfig.parse(read_yaml(config), str(config), ConfigFolder.of(config))
    for seed in seeds:
        file = folder / f"{config.stem}-{seed}.safetensors"
        with _continuable():
            _, accuracy = train_or_load(recipe, seed, file, device, progress)
        typer.echo(f"{file}: accuracy {accuracy:.3f} on held-out images")


def _executor(
    study: Study, folder: Path, cluster: str | None, processes: int | None
) -> AbstractContextManager[Executor | None]:
    """Where a study does its work: on a cluster, in processes of this machine, or, as None, in this process."""
    from rsm_probe.execution.executors import cluster as cluster_at
    from rsm_probe.execution.executors import processes as started
    from rsm_probe.studies.registry import STUDIES

    if cluster is None and processes is None:
        return nullcontext()
    if cluster is not None and processes is not None:
        raise ConfigError("--cluster and --processes exclude each other: give one of them")
    if not study.on_cluster:
        able = ", ".join(name for name, kind in STUDIES.items() if kind.on_cluster)
        option = "--processes" if cluster is None else "--cluster"
        raise ConfigError(f"study: {study.study} runs in one process only; {option} works with study: {able}")
    if cluster is not None:
        return cluster_at(cluster)
    assert processes is not None
    return started(processes, study.gpus_of_workers(folder))


class _Echo(logging.Handler):
    """Prints what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(record.getMessage())


@contextmanager
def _reporting() -> Iterator[None]:
    """Print what a run reports without progress bars, such as how many pairs are left to match."""
    logger, handler = logging.getLogger(__package__), _Echo(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _draw(study: Study, folder: Path) -> None:
    from rsm_probe.runs.run_folder import save_figures

    files = list(save_figures(study, folder))
    for file in files:
        typer.echo(f"figure: {file} (and .pdf)")
    if not files:
        typer.echo(f"no figures to draw: {study.why_no_figures(folder)}")


@contextmanager
def _interruptible(message: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(message, err=True)
        raise typer.Exit(130) from None


def _continuable() -> Any:
    return _interruptible("interrupted; run the same command again to continue")


def main() -> None:
    """Run the command line, and report errors of the project as one message without a traceback."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # file names may contain characters that the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        # Each text once: studies of several parts read the same images.
        say = cache(lambda text: typer.echo(f"warning: {text}", err=True))
        warnings.showwarning = lambda message, *rest: say(str(message))
        try:
            app()
        except RsmProbeError as error:
            typer.echo(f"error: {error}", err=True)
            sys.exit(2)
        except Exception as error:
            if os.environ.get("RSM_PROBE_DEBUG"):
                raise
            typer.echo(
                f"error: {type(error).__name__}: {error} (unexpected; set RSM_PROBE_DEBUG=1 to see where)", err=True
            )
            sys.exit(1)


if __name__ == "__main__":
    main()
