"""Writes the tables of docs/reference that say what the code says of itself.

python tests/reference_tables.py
"""

import re
from collections.abc import Iterator
from dataclasses import fields
from inspect import signature
from pathlib import Path

from rsm_probe.comparison.features import FEATURE_MEASURES
from rsm_probe.comparison.measures import MEASURES
from rsm_probe.comparison.protocol import Properties
from rsm_probe.matching import METHODS
from rsm_probe.sources import IMAGE_SETS

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"


def measures(properties: dict[str, Properties]) -> Iterator[str]:
    """Yield the lines of a table of measures."""
    yield "| name | kind | values | invariant to | source |"
    yield "|---|---|---|---|---|"
    for name, about in properties.items():
        yield f"| `{name}` | {about.kind} | {about.values} | {', '.join(about.invariances)} | {about.source} |"


def matchings() -> Iterator[str]:
    """Yield the lines of the table of matchings."""
    yield "| name | class in `rsm_probe.matching` | exact | full affinity | options and defaults |"
    yield "|---|---|---|---|---|"
    for name, method in METHODS.items():
        options = ", ".join(f"`{option.name}={option.default!r}`" for option in fields(method))  # type: ignore[arg-type]
        words = ["yes" if known else "no" for known in (method.exact, method.needs_affinity)]
        yield f"| {' | '.join([f'`{name}`', f'`{type(method).__name__}`', *words, options])} |"


def image_sets() -> Iterator[str]:
    """Yield the lines of the table of image sets."""
    yield "| name | what it makes | needs | options |"
    yield "|---|---|---|---|"
    for name, images in IMAGE_SETS.items():
        parameters = signature(images.make).parameters
        about = str(images.make.__doc__).splitlines()[0]
        needs = [f"`{key}`" for key in parameters if images.requires(key)]
        options = [f"`{key}`" for key in parameters if not images.requires(key) and key != "progress"]
        yield f"| `{name}` | {about} | {', '.join(needs)} | {', '.join(options)} |"


# Page -> mark in it -> lines of the table that stands behind the mark.
TABLES = {
    "measures.md": {
        "measures": list(measures({name: measure.properties for name, measure in MEASURES.items()})),
        "features": list(measures({name: about for name, (_, about) in FEATURE_MEASURES.items()})),
    },
    "matchings.md": {"matchings": list(matchings())},
    "images.md": {"image sets": list(image_sets())},
}


def with_tables(page: str) -> str:
    """The text of a page with its tables rebuilt."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    for mark, lines in TABLES[page].items():
        table = "\n".join(lines)
        place = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, replaced = place.subn(rf"\g<1>{table}\n\g<2>", text)
        assert replaced == 1, f"{page} has no place for the table of {mark}"
    return text


if __name__ == "__main__":
    for page in TABLES:
        (REFERENCE / page).write_text(with_tables(page), encoding="utf-8")
