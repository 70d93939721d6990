"""One page of several studies: their answers first, then everything that their own pages show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rsm_probe.report.facts import command_of, facts_of
from rsm_probe.report.page import Group, Page, Part, Section, Table, Text


def joint_page(
    title: str, question: str, answer: str, pages: Mapping[str, Page], folder: Path, sections: Sequence[Section] = ()
) -> Page:
    """Lay out a page that contains those of several studies.

    Args:
        title: title of the page.
        question: what all studies ask together.
        answer: what came out.
        pages: study -> its page.
        folder: the run folder; that of a study is the folder of its name in it.
        sections: what the studies show together; it stands before their own pages.
    """
    answers = Table(
        "answers",
        ["study", "question", "answer"],
        [[name, page.question, page.answer] for name, page in pages.items()],
        "The answer of each study. `rsm-probe report` with the folder of a study writes its page alone.",
    )
    return Page(
        title,
        question,
        f"{len(pages)} {'study' if len(pages) == 1 else 'studies'}: {', '.join(pages)}.",
        answer,
        [Section("Answers", "", [answers]), *sections, *(_section(name, page) for name, page in pages.items())],
        command_of(folder),
        facts_of(folder) or _common_facts(pages),
    )


def _section(name: str, page: Page) -> Section:
    """A study as a section, whose own sections unfold."""
    groups = [
        Group(
            one.title,
            [*(Text(text) for text in one.text.split("\n\n") if text), *(_renamed(part, name) for part in one.parts)],
        )
        for one in page.sections
    ]
    facts = [Text(f"{key}: {value}.") for key, value in page.provenance.items()]
    made = [Group("How it was made", facts)] if facts else []
    text = "\n\n".join([page.question, page.setting, page.answer, *page.notes])
    return Section(f"{name}: {page.title}", text, [*groups, *made], page.command)


def _renamed(part: Part, study: str) -> Part:
    """A part whose downloads are named after its study, too."""
    if isinstance(part, Group):
        return replace(part, parts=[_renamed(one, study) for one in part.parts])
    if isinstance(part, Text):
        return part
    named = replace(part, name=f"{study}-{part.name}")
    if isinstance(named, Table) or named.table is None:
        return named
    return replace(named, table=replace(named.table, name=f"{study}-{named.table.name}"))


def _common_facts(pages: Mapping[str, Page]) -> dict[str, str]:
    """What all studies say alike about how they were made."""
    first, *others = [page.provenance for page in pages.values()]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
