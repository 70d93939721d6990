"""The command rsm-probe layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsm_probe.errors import ConfigError
from rsm_probe.shipped import configuration_file

if TYPE_CHECKING:
    from rsm_probe.probe.describe import LayerInfo


def layers(
    model: Annotated[
        str,
        typer.Argument(
            help="torchvision:NAME, timm:NAME, hf:NAME, hf-classifier:NAME, open_clip:ARCH/TAG, torch.hub:REPO:ENTRY, "
            "pretrained:NAME, file.py:function, a .safetensors file from `train`, a YAML file of a model, or the "
            "name of one that comes with the package, such as models/resnet18"
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
    model = str(configuration_file(model))
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
    for line in _layer_table(shown):
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


def _layer_table(layers: Sequence[LayerInfo]) -> Iterator[str]:
    rows = [("", "name", "class", "output", "S", "C", "grid", "prefix")]
    for layer in layers:
        shape, grid = ("x".join(map(str, sizes)) if sizes else "-" for sizes in (layer.shape, layer.grid))
        numbers = str(layer.locations), str(layer.channels), grid, str(layer.prefix)
        rows.append(("*" if layer.is_block else "", layer.name, layer.kind, shape, *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
