"""The data of a report page: sections of text, charts, tables and pictures.

All text is plain text, which `write_page` escapes: names of models, layers, labels and files need no preparation.
Names of parts become the names of downloaded files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table, which can be downloaded as CSV.

    Attributes:
        name: what it is called in the file name of the download.
        columns: headings.
        rows: cells in the order of `columns`; floats are rounded on the page and whole in the download.
        caption: what it shows, in a sentence.
        digits: decimal places on the page.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    digits: int = 3


@dataclass(frozen=True)
class Chart:
    """An interactive chart, which can be downloaded as SVG, PNG and, with its numbers, as CSV.

    Side-by-side views (`alt.concat` with `columns`) are stacked where the page is narrow. Give views and parameters
    names of their own: Altair numbers unnamed ones, so that the same page would be written differently twice.

    Attributes:
        name: what it is called in the file names of downloads.
        chart: an Altair chart, or a Vega-Lite specification as a dictionary. Data stand in it; no addresses.
        caption: what it shows, and what pointing, tapping and clicking do. Screen readers read it. Empty lines separate
            paragraphs.
        table: the numbers in the chart.
        canvas: draw on a canvas, which is faster for thousands of marks; screen readers can read SVG, the default.
    """

    name: str
    chart: Any
    caption: str
    table: Table | None = None
    canvas: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure that was drawn before, such as one of `Study.figures`; it can be downloaded as it is and as PNG.

    Attributes:
        name: what it is called in the file names of downloads.
        image: the figure as PNG or SVG.
        caption: what it shows; also its text for screen readers.
        table: the numbers in the figure.
    """

    name: str
    image: bytes
    caption: str
    table: Table | None = None


@dataclass(frozen=True)
class Thumbnail:
    """A small image. A page holds the bytes of equal thumbnails once.

    Attributes:
        content: the image as PNG, JPEG or WebP.
        size: width and height in pixels.
        name: id of the image.
        label: label of the image; "" for none.
    """

    content: bytes
    size: tuple[int, int]
    name: str
    label: str = ""


# A box on an image: left, top, right and bottom as shares of its width and height, and a key of `BOXES`.
Box = tuple[float, float, float, float, str]
# Kinds of boxes -> colour, and lengths of dashes and gaps; "" for a solid line.
BOXES = {
    "asked": ("#0072B2", ""), "shared": ("#009E73", ""), "other": ("#D55E00", "2 2"), "uncounted": ("#777777", "1 3"),
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """Images side by side, the first two of which may be joined by lines.

    Attributes:
        images: the images, from left to right.
        caption: what they show, in a few words.
        lines: from the first image to the second: (x, y, x, y, strength), each between 0 and 1 of an image's width,
            height, and of the largest strength.
        boxes: for each image, boxes to draw on it, such as those of its objects.
    """

    images: Sequence[Thumbnail]
    caption: str = ""
    lines: Sequence[tuple[float, float, float, float, float]] = ()
    boxes: Sequence[Sequence[Box]] = ()


@dataclass(frozen=True)
class Pictures:
    """Pictures with captions, which can be downloaded as SVG and PNG.

    Attributes:
        name: what they are called in the file names of downloads.
        pictures: the pictures, in reading order.
        caption: what they show.
        table: numbers of the pictures.
        width: width of a picture's images in CSS pixels.
        title: heading above them; "" for none.
    """

    name: str
    pictures: Sequence[Picture]
    caption: str = ""
    table: Table | None = None
    width: int = 112
    title: str = ""


@dataclass(frozen=True)
class Group:
    """Parts that a click on their title unfolds.

    Attributes:
        title: the title.
        parts: the parts.
        unfolded: whether they are shown from the beginning.
    """

    title: str
    parts: Sequence[Part]
    unfolded: bool = False


Part = Text | Table | Chart | Plot | Pictures | Group


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        title: the heading.
        text: paragraphs below it; "" for none. Empty lines separate paragraphs.
        parts: what it shows.
        command: the command that makes its numbers, if it is not that of the page.
    """

    title: str
    text: str = ""
    parts: Sequence[Part] = ()
    command: str = ""


@dataclass(frozen=True)
class Page:
    """A report page.

    Attributes:
        title: the title.
        question: what the run asks, in a sentence.
        setting: models, images and method, in a sentence.
        answer: what came out, in two sentences with numbers of the result.
        sections: the sections.
        command: the command that makes all numbers; it stands in each section.
        provenance: how the numbers came about (versions, seeds, accuracies, cost), by name.
        notes: what the page leaves out, such as images that were thinned out.
    """

    title: str
    question: str
    setting: str
    answer: str
    sections: Sequence[Section]
    command: str
    provenance: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
