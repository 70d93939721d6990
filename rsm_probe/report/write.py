"""Write a page as one HTML file that needs no network.

Jinja escapes all text. A content security policy in the file forbids requests to any network, and scripts other than
the two of the page, so that no name in a result can run code.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from rsm_probe.errors import StorageError
from rsm_probe.report.page import BOXES, Chart, Group, Page, Part, Picture, Table, Thumbnail
from rsm_probe.report.words import words_of
from rsm_probe.runs.tables import csv_text
from rsm_probe.storage.files import save_text
from rsm_probe.storage.paths import file_name

INSTALL = "pip install altair vl-convert-python"
# Larger files open slowly.
MOST_BYTES = 15_000_000
# Rows of a table on the page; the download has all. Numbers of columns with which rows become lists on a phone, where
# fewer fit, and more can only be scrolled.
_MOST_ROWS, _LISTED_COLUMNS = 60, range(5, 10)
_POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-eval' {hashes}"
# Space between joined images, in CSS pixels.
_GAP = 28


def write_page(page: Page, path: str | Path) -> Path:
    """Write a page as one HTML file; equal pages make equal files.

    Args:
        page: the page.
        path: the file, which is replaced.

    Returns:
        The path.

    Raises:
        StorageError: the file cannot be written, or the page has charts and vl-convert-python is not installed.

    Warns:
        UserWarning: the file is larger than 15 MB.
    """
    html = page_html(page)
    size = len(html.encode())
    if size > MOST_BYTES:
        warnings.warn(f"{path} has {size / 1e6:.1f} MB, and may open slowly", stacklevel=2)
    save_text(path, html)
    return Path(path)


def page_html(page: Page) -> str:
    """The HTML of a page; see `write_page`."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise StorageError(f"a report page needs Jinja2; {INSTALL}") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    scripts = _scripts(page)
    content = _Content()
    environment.filters |= {
        "address": data_address,
        "cell": _cell,
        "chart_id": content.chart_id,
        "csv": _csv,
        "described": _described,
        "file_name": file_name,
        "kind": lambda part: type(part).__name__,
        "kinds": lambda image: ["png"] if _media_type(image) == "image/png" else ["svg", "png"],
        "layout": content.layout,
        "paragraphs": lambda text: [one for one in text.split("\n\n") if one.strip()],
        "prose": prose,
        "spec": _spec,
    }
    hashes = " ".join(f"'sha256-{_base64(hashlib.sha256(script.encode()).digest())}'" for script in scripts)
    return environment.from_string(_resource("page.html")).render(
        page=page,
        style=_resource("page.css"),
        scripts=lambda: scripts,
        thumbnails=lambda: content.thumbnails.items(),
        words=words_of(page),
        policy=_POLICY.format(hashes=hashes or "'none'"),
        most_rows=_MOST_ROWS,
        listed_columns=_LISTED_COLUMNS,
    )


class _Content:
    """What the parts of a page share: numbers of charts, and the thumbnails by id."""

    def __init__(self) -> None:
        self.thumbnails: dict[str, Thumbnail] = {}
        self._ids: dict[bytes, str] = {}
        self._charts = 0

    def chart_id(self, chart: Chart) -> str:
        self._charts += 1
        return f"c{self._charts}"

    def layout(self, picture: Picture, width: int) -> dict[str, Any]:
        """Where the images, lines and boxes of a picture stand, in CSS pixels."""
        gap = _GAP if picture.lines else 6
        images, x = list[dict[str, Any]](), 0.0
        for image in picture.images:
            identity = self._ids.setdefault(image.content, f"t{len(self._ids)}")
            self.thumbnails.setdefault(identity, image)
            images.append({"id": identity, "x": x, "scale": round(width / image.size[0], 4)})
            x += width + gap
        heights = [width * image.size[1] / image.size[0] for image in picture.images]
        lines = [
            [round(value, 1) for value in (xa * width, ya * heights[0], width + gap + xb * width, yb * heights[1])]
            + [round(0.25 + 0.45 * strength, 2)]
            for xa, ya, xb, yb, strength in picture.lines
        ]
        boxes = [
            (*(round(v, 1) for v in (one["x"] + left * width, top * height, (right - left) * width)),
             round((bottom - top) * height, 1), *BOXES[kind])
            for one, height, of_image in zip(images, heights, picture.boxes or [()] * len(images), strict=True)
            for left, top, right, bottom, kind in of_image
        ]  # fmt: skip
        layout = {"images": images, "lines": lines, "boxes": boxes}
        return {**layout, "width": x - gap, "height": math.ceil(max(heights))}


def _parts(parts: Iterable[Part]) -> Iterable[Part]:
    for part in parts:
        yield part
        if isinstance(part, Group):
            yield from _parts(part.parts)


def _scripts(page: Page) -> list[str]:
    """The scripts of a page: the library that draws its charts, if it has any, and its own."""
    own = _resource("page.js")
    if not any(isinstance(part, Chart) for section in page.sections for part in _parts(section.parts)):
        return [own]
    try:
        import altair
        import vl_convert
    except ImportError as error:
        raise StorageError(f"charts need Vega-Altair and vl-convert-python; {INSTALL}") from error
    release = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    # Its types ask for a snippet, which may be left out.
    library: str = vl_convert.javascript_bundle(vl_version=release)  # type: ignore[call-arg]
    library = library.replace("\r\n", "\n")
    # Within a script element, only these begin something else.
    return [library.replace("</script", "<\\/script").replace("<!--", "<\\!--"), own]


def _resource(name: str) -> str:
    return (files("rsm_probe.report") / name).read_text(encoding="utf-8")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _media_type(image: bytes) -> str:
    for start, kind in ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"RIFF", "webp")):
        if image.startswith(start):
            return f"image/{kind}"
    return "image/svg+xml"


def data_address(image: bytes) -> str:
    """An image as the address of itself: a `data:` URI."""
    return f"data:{_media_type(image)};base64,{_base64(image)}"


def _csv(table: Table) -> str:
    return _base64(csv_text([dict(zip(table.columns, row, strict=True)) for row in table.rows]).encode())


def prose(text: str) -> str:
    """Text whose negative numbers have a minus sign in place of a hyphen."""
    return re.sub(r"(?<![^\s(\[±])-(?=\.?\d)", "\N{MINUS SIGN}", text)


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, float):
        if 0 < value < 0.5 * (least := 10.0**-digits):  # a p value, say, that is not 0
            return f"< {least:.{digits}f}"
        return "–" if math.isnan(value) else prose(f"{value:.{digits}f}")
    return "–" if value is None else prose(str(value)) if isinstance(value, int) else str(value)


def _described(picture: Picture) -> str:
    images = ", ".join(f"{image.name} ({image.label})" if image.label else image.name for image in picture.images)
    return f"{picture.caption}: {images}" if picture.caption else images


def _spec(chart: Chart) -> str:
    """The specification of a chart as JSON that may stand in a script element."""
    spec: Mapping[str, Any] = chart.chart if isinstance(chart.chart, Mapping) else chart.chart.to_dict()
    text = json.dumps({"description": chart.caption, **spec}, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
