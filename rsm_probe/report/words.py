"""The terms of report pages in plain words. They mean what the glossary of the documentation says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rsm_probe.report.page import Chart, Group, Page, Part, Pictures, Plot, Table, Text

_PAPER = "Wald et al. 2024"


@dataclass(frozen=True)
class Word:
    """A term.

    Attributes:
        term: the term as a heading.
        pattern: a regular expression; the term is explained on pages in whose text it matches.
        meaning: what it means, in sentences.
        source: where it comes from; "" for terms of this package.
    """

    term: str
    pattern: str
    meaning: str
    source: str = ""


WORDS = (
    Word(
        "RSM (representational similarity matrix)", r"\bRSMs?\b",
        "A table that says how similar a layer finds every pair of images: one row and one column per image.",
        "Kriegeskorte et al. 2008",
    ),
    Word(
        "location", r"\blocations?\b",
        "A cell of a layer's map, or a patch of the image. A layer describes each location by a vector of numbers.",
    ),
    Word(
        "matching", r"\b[Mm]atch(ing|ings|ed)\b",
        "Which location of one image goes with which location of the other.", _PAPER,
    ),
    Word(
        "spatio-semantic, identity", r"\b[Ss]patio-semantic\b|\bidentity\b|\bequal locations\b",
        "The identity matching compares each location with the same location of the other image. In the "
        "spatio-semantic RSM that it gives, images are similar if they show the same things at the same locations.",
        _PAPER,
    ),
    Word(
        "semantic, optimal", r"(?<!-)\b[Ss]emantic\b|\boptimal\b",
        "The optimal matching pairs the locations of two images so that their vectors agree as much as possible in "
        "total. In the semantic RSM that it gives, images are similar if they show the same things, wherever these "
        "are.",
        _PAPER,
    ),
    Word(
        "affinity", r"\baffinit(y|ies)\b",
        "How well two locations agree: the inner product of their vectors.",
    ),
    Word(
        "kernel", r"\b[Kk]ernels?\b",
        "The function that turns the total agreement of matched locations into the similarity of two images. The "
        "linear kernel is the total itself; the cosine kernel divides it by the lengths of both images' vectors; "
        "RBF falls with their distance.",
        f"{_PAPER}, appendix A",
    ),
    Word(
        "location-mean centring", r"\blocation-mean\b",
        "At each location, the mean of all images is subtracted before anything is matched.", _PAPER,
    ),
    Word(
        "channel-mean centring", r"\bchannel-mean\b",
        "The mean over all images and locations is subtracted before anything is matched.",
    ),
    Word(
        "mini-batch", r"\bmini-batch(es)?\b",
        "A group of images. Images are compared within their group; CKA adds up the groups.", "Nguyen et al. 2021",
    ),
    Word(
        "CKA (centred kernel alignment)", r"\bCKA\b",
        "How alike two RSMs of the same images are: 1 if they agree up to scale and shift, about 0 if they are "
        "unrelated.",
        "Kornblith et al. 2019",
    ),
    Word(
        "unbiased", r"\b[Uu]nbiased\b",
        "An estimator of CKA that leaves out how similar each image is to itself. Unrelated RSMs then have a CKA of 0 "
        "on average, however few images there are.",
        "Song et al. 2012",
    ),
    Word(
        "biased", r"(?<!un)\b[Bb]iased\b",
        "The first estimator of CKA, which is too high for few images.", "Gretton et al. 2005",
    ),
    Word(
        "certificate (matching error)", r"\b[Cc]ertificates?\b",
        "A proof, made with each matching, of how far it can be from the best possible one. The ± that follows for CKA "
        "is the largest error that matchings can cause. It does not say what other images would give.",
    ),
    Word(
        "RDM (representational dissimilarity matrix)", r"\bRDMs?\b",
        "A table of distances between images, as a brain, a person's judgements or a model holds them: large where an "
        "RSM is small.",
        "Kriegeskorte et al. 2008",
    ),
    Word(
        "Spearman correlation of RDMs", r"\bSpearman\b",
        "How far an RSM and an RDM put the pairs of images in the same order: 1 for the same order, 0 on average for "
        "unrelated ones.",
        "Kriegeskorte et al. 2008; Spearman 1904",
    ),
    Word(
        "noise ceiling", r"\b[Nn]oise ceiling\b",
        "How well the true model is expected to do, given that subjects differ. A model between its ends agrees with a "
        "subject as well as other subjects do; below, something that subjects share is left to explain.",
        "Nili et al. 2014",
    ),
    Word(
        "permutation test", r"\b[Pp]ermutation test\b",
        "The images of the RDMs are shuffled many times: a value counts as above chance if hardly any shuffled order "
        "reaches it. Comparing with the largest value of all RSMs keeps the chance of a single false one at the level.",
        "Nichols & Holmes 2002",
    ),
    Word(
        "dual bootstrap", r"\b[Dd]ual bootstrap\b",
        "How much a mean may depend on which images and which subjects were taken: both are drawn again at random with "
        "replacement, and noise that this counts three times is counted once.",
        "Schütt et al. 2023",
    ),
    Word(
        "false discovery rate", r"\bfalse discovery rate\b",
        "The expected share of false ones among the differences that are called decided.",
        "Benjamini & Hochberg 1995",
    ),
    Word(
        "bootstrap interval (sampling error)", r"(?<![Dd]ual )\b[Bb]ootstrap\b|\binterval\b",
        "How much a value may depend on which images were taken: it is computed again for images drawn at random with "
        "repetition, and the interval holds 95% of these values unless another share is named. It does not include the "
        "matching error.",
        "Efron 1979",
    ),
    Word(
        "rank of a pair", r"\b[Rr]anks? (of|in|falls|rises|fell|rose)\b",
        "The share of all pairs of images that are less similar than this pair: 0% for the least similar pair, 100% "
        "for the most similar one.",
    ),
)  # fmt: skip


def words_of(page: Page) -> list[Word]:
    """The terms that the text of a page uses, in reading order."""
    text = "\n".join(_texts(page))
    return [word for word in WORDS if re.search(word.pattern, text)]


def _texts(page: Page) -> Iterator[str]:
    yield from (page.title, page.question, page.setting, page.answer, *page.notes, *page.provenance)
    yield from page.provenance.values()
    for section in page.sections:
        yield from (section.title, section.text)
        yield from _part_texts(section.parts)


def _part_texts(parts: Iterable[Part]) -> Iterator[str]:
    """What the page says around names, labels and numbers, which are the user's."""
    for part in parts:
        if isinstance(part, Text):
            yield part.text
        elif isinstance(part, Group):
            yield part.title
            yield from _part_texts(part.parts)
        elif isinstance(part, Table):
            yield from (part.caption, *part.columns)
        elif isinstance(part, Pictures):
            yield from (part.title, part.caption)
        elif isinstance(part, Chart | Plot):
            yield part.caption
