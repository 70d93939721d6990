"""Follows a tutorial of docs/tutorials from top to bottom, in an empty folder, as a learner would.

python tests/tutorials.py first-sweep     writes the output that appears into the page
"""

import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from rsm_probe.cli import main

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
TUTORIALS = sorted(page.stem for page in FOLDER.glob("*.md") if page.stem != "index")


class Step(NamedTuple):
    """A piece of code, and the output that the page shows behind it; None if it shows none."""

    language: str
    code: str
    shown: str | None


def steps(text: str) -> Iterator[Step]:
    """Yield the steps of a page."""
    pattern = r"```(bash|python|yaml)\n(.*?)```\n(?:\n```text\n(.*?)```\n)?"
    for match in re.finditer(pattern, text, re.DOTALL):
        yield Step(*match.groups())


def follow(text: str) -> Iterator[tuple[Step, str]]:
    """Do all steps in the working directory, and yield each with what it printed.

    YAML and Python that begin with a comment of a file's name are written into that file. Other Python runs in one
    interpreter, as each line of a command does.
    """
    names: dict[str, object] = {"__name__": "tutorial"}
    sys.path.insert(0, os.getcwd())  # as in an interpreter that a learner starts
    try:
        for step in steps(text):
            yield step, _done(step, names)
    finally:
        sys.path.pop(0)


def _done(step: Step, names: dict[str, object]) -> str:
    """Do a step, and return what it printed."""
    file = re.match(r"# (\w+\.(?:yaml|py))\n", step.code)
    if file:
        Path(file[1]).write_text(step.code, encoding="utf-8")
        return ""
    if step.language == "python":
        with redirect_stdout(io.StringIO()) as out:
            exec(step.code, names)
        return out.getvalue()
    return "".join(command_output(line) for line in step.code.splitlines())


def command_output(line: str) -> str:
    """What a command of rsm-probe prints, as it is in this interpreter; warnings and progress are left out.

    It runs in this process, because starting another takes longer than most commands.
    """
    program, *words = line.split()
    assert program == "rsm-probe", f"not a command of this project: {line}"
    out, err, code = io.StringIO(), io.StringIO(), None
    with mock.patch.object(sys, "argv", [program, *words]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    assert not code, f"{line}\n{out.getvalue()}{err.getvalue()}"
    return out.getvalue()


def words(output: str) -> list[str]:
    """The words of an output."""
    return output.split()


def alike(shown: str, printed: str) -> bool:
    """Whether an output is the one shown: `...` stands for anything, and decimals may differ by a little."""
    expected = words(shown)
    pattern = " ".join(_pattern(word) for word in expected)
    found = re.fullmatch(pattern, " ".join(words(printed)), re.DOTALL)
    return found is not None and all(
        abs(float(a) - float(b)) <= max(0.1, 0.1 * abs(float(a)))
        for a, b in zip(_decimals(shown), found.groups(), strict=True)
    )


_DECIMAL = r"-?\d+\.\d+(?:e[+-]?\d+)?"


def _decimals(text: str) -> list[str]:
    return re.findall(_DECIMAL, text)


def _pattern(word: str) -> str:
    parts = re.split(rf"({_DECIMAL}|\.\.\.)", word)
    return "".join(
        ".*?" if part == "..." else f"({_DECIMAL})" if re.fullmatch(_DECIMAL, part) else re.escape(part)
        for part in parts
    )


def with_output(text: str) -> Iterator[str]:
    """Yield the page after each step, with the output that appears here."""
    for step, printed in follow(text):
        if step.shown is not None:
            before = f"{step.code}```\n\n```text\n"
            assert text.count(f"{before}{step.shown}```") == 1
            lines = "\n".join(line.rstrip() for line in printed.rstrip().splitlines())
            text = text.replace(f"{before}{step.shown}```", f"{before}{lines}\n```")
            yield text


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = FOLDER / f"{name}.md"
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            for written in with_output(page.read_text(encoding="utf-8")):
                page.write_text(written, encoding="utf-8")
