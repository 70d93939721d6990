"""Writes docs/reference/tested-models.md from the table of models that the tests hold to independent routes.

python tests/probe/zoo_page.py
"""

from collections.abc import Iterable
from pathlib import Path

from zoo import REFUSED, ROWS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "tested-models.md"

HEAD = """# Tested models

A probe has no list of models: it [follows the first pass](../explanation/reading-models.md) of any. This page lists
what is tested, and which layers are known to be refused.

{count} layers of {models} models of {families} families are tested, with random weights, mostly small or shallow.
For each, the tests check the shape, the grid and the number of prefix tokens, and compare the values to 1e-6 with a
route that does not use a probe: timm's `forward_intermediates`, torchvision's feature extraction, or the hidden states
of transformers. `python tests/probe/zoo_page.py` makes both tables from
[tests/probe/zoo.py](../../tests/probe/zoo.py).

## Layers that are tested

`S` is the number of locations, `C` that of channels.

"""

REFUSALS = """
## Layers that are refused

If nothing settles how an output is to be read, a named layer raises, and a layer that a pattern matched is listed in
`Probe.skipped`. Both state the reason. More ways out: [read a refused layer](../how-to/deal-with-refused-layers.md).

"""


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    """The text of docs/reference/tested-models.md."""
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
    refusals = table(("library", "model", "layer", "why", "way out"), refused)
    return HEAD.format(**counts) + table(head, rows) + REFUSALS + refusals


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
