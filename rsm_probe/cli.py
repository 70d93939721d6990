"""The command line: rsm-probe run, check, keys, images, layers, figures, report, train."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from rsm_probe.commands import images, keys, layer_table, report, report_after_run
from rsm_probe.errors import ConfigError, RsmProbeError, StorageError
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
_ConfigFile = Annotated[Path, typer.Argument(help="a YAML file that describes a study; see configs/")]
_Changes = Annotated[
    list[str],
    typer.Option(
        "--set", help="KEY=VALUE in place of what the file says, such as images.count=100; repeat it for several keys"
    ),
]
_Out = Annotated[str | None, typer.Option(help="run folder; by default runs/ plus the name of the configuration file")]
_AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="run Python code that the configuration names, as in source: file.py:function"),
]
app = typer.Typer(
    cls=_Commands,
    help="Compare what vision models consider similar.\n\n"
    "Start with `rsm-probe run configs/quickstart.yaml`: it trains three small networks, compares their "
    "layers with spatio-semantic and semantic RSMs, and saves the figures in runs/quickstart.\n\n"
    "For your own model, list the layers with a command such as `rsm-probe layers timm:resnet50`.",
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

    study = read_study(config, allow_code=allow_code, changes=changes)
    # `out` is text because a Path drops the second slash of a URL, which could then not be recognised.
    folder = Path("runs") / config.stem if out is None else local_folder(out, "--out")
    if dry_run:
        _show_plan(study, folder, config.parent)
        return
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
    else to the working directory, which is mentioned.
    """
    from rsm_probe.studies.registry import read_study

    study = read_study(config, allow_code=allow_code, changes=changes)
    _show_plan(study, Path("runs") / config.stem if out is None else local_folder(out, "--out"), config.parent)


def _show_plan(study: Study, folder: Path, recipes: Path) -> None:
    from rsm_probe.runs.missing.listing import missing_of
    from rsm_probe.runs.missing.on_paper import lines_of, on_paper

    missing = missing_of(study, folder, recipes)
    if missing:
        typer.echo(str(missing))
        for line in lines_of(on_paper(study, folder, recipes)):
            typer.echo(line)
        if missing.downloads:
            typer.echo("(`rsm-probe run` downloads weights of libraries itself where it has a network)")
        raise typer.Exit(1)
    plan = study.plan(folder)
    typer.echo(str(plan))
    typer.echo(f"run folder: {folder}, {plan.state}")
    if plan.refusal is not None:
        raise typer.Exit(1)


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


@app.command()
def layers(
    model: Annotated[
        str,
        typer.Argument(
            help="torchvision:NAME, timm:NAME, hf:NAME, hf-classifier:NAME, open_clip:ARCH/TAG, torch.hub:REPO:ENTRY, "
            "pretrained:NAME, file.py:function, a .safetensors file from `train`, or a YAML file as in configs/models"
        ),
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            help="default, or a checkpoint: .safetensors, .pth and the like, an index of shards, or a folder with one; "
            "layers and shapes need no weights"
        ),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=0, help="classes of the head (for names of a library); 0 for no head")
    ] = None,
    key: Annotated[
        str, typer.Option(help="key of the weights in the checkpoint, such as teacher; by default any")
    ] = "",
    prefix: Annotated[
        str, typer.Option(help="what precedes the names of the weights, such as backbone.; by default any")
    ] = "",
    strict: Annotated[
        bool,
        typer.Option(help="with --no-strict, weights that do not fit are left out, and layers that need them marked"),
    ] = True,
    preprocess: Annotated[
        str | None, typer.Option(help="resize-crop or imagenet, in place of the model's own preprocessing")
    ] = None,
    size: Annotated[int | None, typer.Option(help="pixels of both sides for --preprocess; by default 224")] = None,
    method: Annotated[
        str | None, typer.Option(help="method that is called in place of the model, such as encode_image")
    ] = None,
    forward: Annotated[
        str | None,
        typer.Option(
            help="file.py:function, a function of a model and a batch that makes the call, with prompts or timesteps"
        ),
    ] = None,
    inputs: Annotated[
        list[str], typer.Option("--input", help="an input that holds images; repeat the option for several")
    ] = [],  # noqa: B006
    layouts: Annotated[
        list[str],
        typer.Option("--layout", help="how to read a layer, as LAYER=NTC or GLOB=NHWC; repeat the option for several"),
    ] = [],  # noqa: B006
    clips: Annotated[
        int | None, typer.Option(min=1, help="frames of a clip, for a model that takes clips instead of images")
    ] = None,
    part: Annotated[str, typer.Option(help="submodule to use instead of the whole model, such as an image tower")] = "",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="read checkpoints with pickled objects, which can run any code")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="run code from the repository of a model (transformers, torch.hub)"),
    ] = False,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="run Python code that a YAML file names")] = False,
    all_layers: Annotated[bool, typer.Option("--all", help="list all layers, not only the blocks")] = False,
) -> None:
    """List the layers that a probe can name, in forward order.

    The model runs on a blank image. An asterisk marks the layers selected by "blocks", the default of a sweep. S is the
    number of locations and C the number of channels; prefix is the number of class and register tokens, which are kept
    separately. Attention layers are listed with the names of their queries, keys and values; * stands for any number.
    """
    from rsm_probe.probe.describe import describe_layers
    from rsm_probe.sources.loading import load_model
    from rsm_probe.sources.models.input_dtype import in_dtype_of
    from rsm_probe.sources.models.preprocessing import blank_clips
    from rsm_probe.sources.models.user_functions import function_of

    if wrong := [text for text in layouts if not all(text.rpartition("=")[::2])]:
        raise ConfigError(f"--layout takes LAYER=LAYOUT, such as blocks.3=NTC, found {wrong[0]!r}")
    named = {layer: layout for layer, _, layout in (text.rpartition("=") for text in layouts)}
    reading: dict[str, Any] = {"inputs": tuple(inputs) or None, "layouts": named or None}
    if model.endswith((".yaml", ".yml")):
        from rsm_probe.config import ConfigFolder, read_yaml
        from rsm_probe.runs.model_config import ModelConfig

        entry = ModelConfig.parse(read_yaml(model), model, ConfigFolder.of(model, allow_code))
        if entry.recipe is not None:
            raise ConfigError(f"{model} holds a recipe; train it with `rsm-probe train`, and name the file it writes")
        given: dict[str, Any] = {
            "num_classes": num_classes, "key": key, "prefix": prefix, "preprocess": preprocess, "size": size,
            "method": method, "part": part, "strict": None if strict else False, **reading,
        }  # fmt: skip
        entry = entry.model_copy(update={name: value for name, value in given.items() if value not in (None, "")})
        of_entry = None if entry.weights == "default" else entry.weights
        with entry.naming_paths(entry.source, of_entry):
            trained = str(entry.source).endswith(".safetensors")
            loaded = entry.load_source(
                weights or ("default" if trained else of_entry),
                allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
            )
    else:
        loaded = load_model(
            model, "default" if model.endswith(".safetensors") else weights, part=part, key=key, prefix=prefix,
            strict=strict, num_classes=num_classes, preprocess=preprocess, size=size, allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code, method=method, **reading,
        )  # fmt: skip
    blank = loaded.blank_input().repeat(2, 1, 1, 1) if clips is None else blank_clips(loaded, clips)
    example = in_dtype_of(loaded.module, loaded.reading, blank)
    how = loaded.reading
    infos, skipped = describe_layers(
        loaded.module,
        example,
        how.method or "forward",
        layouts=how.layouts,
        inputs=how.inputs,
        forward=how.forward if forward is None else function_of(forward, "--forward"),
    )
    shown = [info for info in infos if info.is_block or all_layers] or infos
    for line in layer_table(shown):
        typer.echo(line)
    if len(shown) < len(infos):
        typer.echo(f"({len(infos) - len(shown)} more layers with --all)")
    attention = dict.fromkeys(re.sub(r"(?:^|(?<=[._]))\d+", "*", info.name) for info in infos if info.has_facets)
    for name in attention:
        typer.echo(f"attention: {name}[query], [key] or [value]; one head: {name}[key.0]; each: {name}[key.*]")
    if all_layers and skipped:
        typer.echo("not captured:")
        for name, reason in skipped.items():
            typer.echo(f"  {name}: {reason}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="a YAML file with a training recipe; see configs/train_digits.yaml")],
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
    folder = local_folder(out, "--out")
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # file names may contain characters that the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest: typer.echo(f"warning: {message}", err=True)
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
