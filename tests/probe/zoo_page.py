# ruff: noqa: E501
"""Writes docs/models.md from the table of models that the tests hold to independent routes.

python tests/probe/zoo_page.py
"""

from collections.abc import Iterable
from pathlib import Path

from zoo import REFUSED, ROWS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

HEAD = """# Models

A `Probe` holds no list of models. It follows the first forward pass operation by operation and keeps, for every value, which location of which image it belongs to:
convolutions lay out a grid, views and indices move locations, attention answers for its queries, arithmetic changes nothing. From this it reads which axis of an output
holds images, locations and channels, which tokens stand for no location (class, distillation, register and detection tokens, queries), and in which order the others stand.
Windows, units and shuffled tokens are put back in the order of the image. Later passes over inputs of the same shapes, whole numbers and flags are read alike, at no cost; passes in which
index tensors pick locations are followed each time. An operation of which it is not known what it does to locations (sorting, merging tokens, a Fourier transform) loses them: what was lost is
refused, not guessed, unless a layer returns the shape that it was given, which is then read like its input.

What a model declares about itself (`num_prefix_tokens`, `num_register_tokens`) is only compared: a warning names the layers that hold another number.

## Layers that are tested

{count} layers of {models} models of {families} families, with random weights, mostly small or shallow. Of each, the shape, the grid and the number of prefix tokens are checked, and the values against a way that
does not use a probe, to 1e-6: timm's `forward_intermediates`, torchvision's feature extraction, the hidden states of transformers. The table is made from
[tests/probe/zoo.py](../tests/probe/zoo.py) by `python tests/probe/zoo_page.py`.

"""

REFUSALS = """
## Layers that are refused

Where nothing settles how an output is to be read, a named layer raises, and a layer that a pattern found is listed in `Probe.skipped`, each with the reason.

"""

TAIL = """
## Flagged

- The prefix holds class, distillation and register tokens: what stands before the locations and joined them before any attention, or, where the sequence had none, one or two tokens that joined later (CaiT, XCiT).
  Other tokens that join after attention are queries (EoMT, prompts of deep layers). These, tokens behind the locations (YOLOS) and padding inside windows are left out; `Probe.notes` says how many, and a warning says so once.
- A map that was pooled whole, (N, C, 1, 1), has the grid (1, 1); vectors (N, C) and sequences of one token have none.
- Maps that are joined along their channels or added lie on top of each other even where one of them was cut or padded to fit (U-Nets); if their order differs, they are refused. Enlarged maps get a location for each of their values.
- One input is followed: the first with three channels, else the first of four axes. A layer of another input (a second view, depth, a mask) is refused with the name of that input, and `layouts={'<layer>': 'NCHW'}` reads it;
  under a pattern it is listed in `Probe.skipped`, with a warning. Layers that depend on no image but on texts or vectors are skipped without one. Words that stand in one sequence with the patches (ViLT) are left out, with a note.
- `layouts=` of a token sequence keeps grid and prefix where the pass proves them; where locations were lost, all tokens stay tokens, without a grid or a prefix.
- Images of which each keeps other locations are refused, and so is a choice that differs from pass to pass; one that is always the same is kept, without a grid. An image that is alone in its batch shows
  no other choices: a note says so.
- Inputs that are no images by their shape (12 channels, features handed to a part of a model) are followed from the first convolution on; without one, `layouts=` says how to read. A map whose last axis is
  1, 3 or 4 wide counts as channels-last only where that gives the likelier form: (N, 256, 4, 4) are 256 features.
- A layer that mixes locations along one axis only (ViP, strip pooling) keeps its input's axes if it returns as many; mixtures of another number are refused.
- Detectors that resize every image are followed; images that still differ in size within one batch have other locations each, and are refused; so are models that take the patches of all images in one sequence (Qwen2-VL).
- Methods other than the model's own forward (`forward_features`, `encode_image`) are not captured: they empty the probe, and a warning says so once. A module that is itself named `blocks` or `all` goes by `regex:^blocks$`.

What is not seen: views that change from pass to pass though the inputs do not, such as rolling by a random amount; custom kernels and NumPy round trips, whose results seem to depend on no image
and are refused; maps of more than 4 096 rows or columns; forward passes in other threads.

## Wrapped models

| | |
|---|---|
| `torch.compile`, `module.compile()` | runs eagerly inside the `with` block, compiled again outside |
| `DataParallel`, `DistributedDataParallel` on one device | probed as the model inside, by its plain names |
| `DataParallel` on several devices | refused: no hook sees a whole batch; probe and call `model.module` |
| scripted, traced, exported | refused: such modules run no hooks; probe the model that they were made from |
| lazy modules, the meta device | refused before they have values: call the model on images first, or load its weights |
| operations that are no modules (residual sums) | `"fx:layer1.0.add"` where `torch.fx` can trace the model, at the price of a second forward pass |
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
