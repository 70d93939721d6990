"""The pages of the project and the blocks of code on them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "reference/api" not in page.as_posix()),
]
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*?) -->\n\n?)?^(?P<indent> *)```(?P<language>[\w{}-]*)[^\n]*\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A block of code, and what the comment before it says of it."""

    page: Path
    line: int
    language: str
    code: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def why_not_run(self) -> str:
        """The reason in `<!-- not run: reason -->`; "" if the block is to be run or checked."""
        return self.mark.removeprefix("not run:").strip() if self.mark.startswith("not run:") else ""


def blocks(page: Path, language: str | None = None) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    every = [
        Block(page, text.count("\n", 0, match.start("code")), match["language"], match["code"], match["mark"] or "")
        for match in BLOCK.finditer(text)
    ]
    return [block for block in every if language in (None, block.language)]


def all_blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, language)]
