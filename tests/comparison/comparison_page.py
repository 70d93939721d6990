"""Writes the tables of docs/comparison.md from what the measures say of themselves.

python tests/comparison/comparison_page.py
"""

import re
from pathlib import Path

from rsm_probe.comparison.features import FEATURE_MEASURES
from rsm_probe.comparison.measures import MEASURES

PAGE = Path(__file__).parents[2] / "docs" / "comparison.md"


def page(text):
    """The page with its tables rebuilt."""
    abouts = {
        "measures": {name: measure.properties for name, measure in MEASURES.items()},
        "features": {name: about for name, (_, about) in FEATURE_MEASURES.items()},
    }
    for mark, entries in abouts.items():
        lines = ["| name | kind | values | invariant to | source |", "|---|---|---|---|---|"]
        for name, about in entries.items():
            lines.append(
                f"| `{name}` | {about.kind} | {about.values} | {', '.join(about.invariances)} | {about.source} |"
            )
        table = "\n".join(lines)
        text = re.sub(rf"(<!-- {mark} -->\n).*?(\n<!-- end -->)", rf"\g<1>{table}\g<2>", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
