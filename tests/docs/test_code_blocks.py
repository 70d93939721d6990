"""Code on the pages: configurations are valid, commands and their options exist. Python is run by `test_pages.py`."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import PAGES, ROOT, all_blocks, blocks
from typer.main import get_command

from rsm_probe.cli import app
from rsm_probe.config import ConfigFolder, read_yaml
from rsm_probe.errors import ConfigError
from rsm_probe.sources import TrainingConfig
from rsm_probe.studies import STUDIES, read_study

LANGUAGES = {
    "python",
    "yaml",
    "bash",
    "text",
    "",
    "{toctree}",
    "{include}",
    "{eval-rst}",
    "{commands}",
    "{configuration-keys}",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_name_a_language_that_is_checked(page):
    assert {block.language for block in blocks(page)} <= LANGUAGES


def test_a_block_that_is_not_run_says_why():
    for language in ("python", "yaml", "bash"):
        for block in all_blocks(language):
            assert not block.mark.startswith("not run") or len(block.why_not_run.split()) > 2, str(block)


# Configurations

SWEEP: dict[str, Any] = {
    "study": "sweep",
    "models": [{"name": "a", "source": "timm:test_resnet", "weights": None}],
    "images": {"source": "digits"},
}


def parts(text: str) -> list[str]:
    """A configuration; or, where it shows several values of one key, each of them."""
    keys = re.findall(r"^(\w+):", text, re.MULTILINE)
    return [text] if len(keys) == len(set(keys)) else [line for line in text.splitlines() if line.strip()]


def check_configuration(text: str, folder: Path) -> None:
    """Parse a study, a recipe, or some keys of a study."""
    content = yaml.safe_load(text)
    if (
        "study" not in content
        and content.keys() <= TrainingConfig.model_fields.keys() | {"images"}
        and "steps" in content
    ):
        TrainingConfig.parse(content, "page", ConfigFolder.of(folder / "recipe.yaml", True))
        return
    file = folder / "page.yaml"
    file.write_text(yaml.safe_dump(content if "study" in content else SWEEP | content), encoding="utf-8")
    read_study(file, allow_code=True)


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_a_configuration_on_a_page_is_valid(block, tmp_path):
    if block.why_not_run:
        pytest.skip(block.why_not_run)
    for pattern in re.findall(r"^ *checkpoints: (\S+\*\S*)", block.code, re.MULTILINE):
        for step in ("100", "200"):
            file = tmp_path / pattern.replace("*", step)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    for text in parts(block.code):
        check_configuration(text, tmp_path)


def test_a_wrong_configuration_is_noticed(tmp_path):
    for wrong in ("images: {source: digits, siize: 3}", "study: sweeep", "steps: 3\nimages: digits\nseeed: 3"):
        with pytest.raises(ConfigError):
            check_configuration(wrong, tmp_path)


# Commands

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def invocations(text: str) -> list[list[str]]:
    """The words of every call of rsm-probe in lines of a shell."""
    lines = text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        for command in re.split(r"&&|;|\|", line.removeprefix("$ ")):
            split = shlex.split(command, comments=True)
            if split and Path(split[0]).name == "rsm-probe":
                found.append(split[1:])
    return found


def check_call(words: list[str]) -> None:
    """Check that command and options exist, that the file is there, and that `--set` names keys that it may have."""
    if not words or words[0].startswith("-") or words[0].isupper():
        assert set(words) <= {"--help", "--version", "COMMAND"}, words
        return
    assert words[0] in COMMANDS, f"there is no command {words[0]}"
    options = {option: p for p in COMMANDS[words[0]].params for option in (*p.opts, *p.secondary_opts)}
    changes, files = [], []
    rest = iter(words[1:])
    for word in rest:
        name, given, value = word.partition("=")
        if word.startswith("-"):
            assert name in options or name == "--help", f"{words[0]} has no option {name}"
            if name in options and not given and not getattr(options[name], "is_flag", False):
                value = next(rest, "")
            changes += [value] if name == "--set" else []
        else:
            files.append(word)
    for file in files:
        if file.startswith(("configs/", "tests/", "notebooks/")):
            assert (ROOT / file).is_file(), file
            if words[0] in ("run", "check"):
                read_study(ROOT / file, changes=[change for change in changes if not change.isupper()])
            else:
                read_yaml(ROOT / file)
    if words[0] == "keys":
        assert set(files) <= {*STUDIES, "STUDY"}


def calls() -> list[Any]:
    """Calls in blocks of a shell, in output that shows a command, and in running text."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            if not block.why_not_run:
                found += [pytest.param(words, id=f"{block}-{' '.join(words)}") for words in invocations(block.code)]
        for block in blocks(page, ""):
            # An overview: options in brackets, and what a command does behind two spaces; or what a command printed.
            lines = [line for line in block.code.splitlines() if line.removeprefix("$ ").startswith("rsm-probe ")]
            plain = [re.sub(r"(?<=\S) {2,}.*", "", line).translate(str.maketrans("[]", "  ")) for line in lines]
            for words in invocations("\n".join(plain)):
                found.append(pytest.param(words, id=f"{block}-{' '.join(words)}"))
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for code in re.findall(r"`(rsm-probe\b[^`]*)`", text):
            for words in invocations(" ".join(code.split()).translate(str.maketrans("[]", "  "))):
                if words:
                    found.append(pytest.param(words, id=f"{page.relative_to(ROOT).as_posix()}-{' '.join(words)}"))
    return found


@pytest.mark.parametrize("words", calls())
def test_a_command_on_a_page_exists_with_its_options(words):
    check_call(words)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("rsm-probe rnu configs/quickstart.yaml", "no command rnu"),
        ("rsm-probe run configs/quickstart.yaml --ot runs", "no option --ot"),
        ("rsm-probe run configs/quickstrt.yaml", "quickstrt"),
        ("rsm-probe run configs/quickstart.yaml --set images.cuont=3", "cuont"),
    ],
)
def test_a_wrong_command_is_noticed(line, problem):
    (words,) = invocations(line)
    with pytest.raises((AssertionError, ConfigError), match=problem):
        check_call(words)


@pytest.mark.parametrize("block", [b for b in all_blocks("bash") if "python " in b.code], ids=str)
def test_a_script_on_a_page_exists_with_its_options(block):
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["python"] and words[1:2] and words[1].endswith(".py"):
            script = (ROOT / words[1]).read_text(encoding="utf-8")
            options = [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
            assert [option for option in options if f'"{option}"' not in script] == []
