"""Typed configurations read from YAML; a mistake is answered with its place and the nearest valid key."""

from __future__ import annotations

import re
import stat
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from rsm_probe.checks import brief, require_text
from rsm_probe.errors import ConfigError, nearest

# A configuration takes a few kilobytes, a few hundred values and a handful of levels.
_MOST_BYTES = 1 << 20
_MOST_VALUES = 20_000
_DEEPEST = 100
# Of a number; the time to read one grows with the square of its length.
_MOST_DIGITS = 400
# No path is longer, and no name; messages repeat a text where it is used.
_LONGEST_TEXT = 4096
# Mistakes listed at once, and characters of each.
_MOST_LINES, _LONGEST_LINE = 20, 2000


class Config(BaseModel):
    """Base of all configurations: unknown keys are refused, values are not changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _texts_can_be_stored(cls, value: Any) -> Any:
        """Texts become names of files, entries of results and parts of messages: no NUL characters, and short."""
        for text in value if isinstance(value, tuple | list | dict) else (value,):
            if isinstance(text, str):
                require_text(text, "text", ConfigError)
                if len(text) > _LONGEST_TEXT:
                    raise ValueError(f"must have at most {_LONGEST_TEXT} characters, and has {len(text)}")
        return value

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str = "the configuration") -> Self:
        """Validates plain data.

        Args:
            data: keys and values as YAML gives them.
            where: what the data is, for the error message (a file's path).

        Raises:
            ConfigError: names every wrong place, what was expected there and the nearest valid key.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where} must hold keys and values, found {brief(data)} ({type(data).__name__})")
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            items: list[dict[str, Any]] = [dict(item) for item in error.errors()]
            # A mistake in an item is reported again, in other words, for the list that holds it.
            outer = {tuple(item["loc"][:depth]) for item in items for depth in range(len(item["loc"]))}
            inner = [item for item in items if item["loc"] not in outer]
            lines = [_cut(_explain(cls, item)) for item in inner[:_MOST_LINES]]
            if len(inner) > _MOST_LINES:
                lines.append(f"and {len(inner) - _MOST_LINES} more")
            raise ConfigError(f"{where} is not valid:\n" + "\n".join(f"  {line}" for line in lines)) from None
        except RecursionError:
            raise ConfigError(f"{where} is nested too deeply") from None

    def to_yaml(self) -> str:
        """The resolved configuration, defaults included, as YAML that `read_yaml` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses repeated keys, and what would take long to read.

    Everything is counted while it is composed, before any value is made: a few lines of nested aliases stand for
    billions of values.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._count = 0
        # Values below each anchor, itself included; none while it is still open.
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One value and all below it."""
        event = self.peek_event()
        self._depth += 1
        before = self._count
        if self._depth > _DEEPEST:
            self._refuse(f"more than {_DEEPEST} levels", event.start_mark)
        self._count += 1
        self._require_few(event)
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if node not in self._sizes:
                self._refuse("an alias within its own anchor", event.start_mark)
            self._count += self._sizes[node]
            self._require_few(event)
        elif getattr(event, "anchor", None) is not None and node is not None:
            self._sizes[node] = self._count - before
        self._depth -= 1
        return node

    def _require_few(self, event: Any) -> None:
        if self._count > _MOST_VALUES:
            self._refuse(f"more than {_MOST_VALUES} values, those that aliases repeat included", event.start_mark)

    def _refuse(self, problem: str, mark: Any) -> NoReturn:
        raise yaml.composer.ComposerError(None, None, problem, mark)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Keys and values; here, since constructing mixes in the keys that `<<` merges, which may be repeated."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[Any, yaml.Mark] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node)
            if not isinstance(key, Hashable):  # refused when the mapping is made
                continue
            if key in first:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping",
                    node.start_mark,
                    f"key {brief(key)} is there twice, first in line {first[key].line + 1}; keep one of the two",
                    key_node.start_mark,
                )
            first[key] = key_node.start_mark
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """One value; the constructors of single values stumble over what only looks like one, such as 2024-99-99."""
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        kind = node.tag.rpartition(":")[2]
        if kind in ("int", "float") and len(node.value) > _MOST_DIGITS:
            problem = f"a number of {len(node.value)} characters; at most {_MOST_DIGITS} are read"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        try:
            value = super().construct_object(node, deep)
            return require_text(value, "text", ConfigError) if isinstance(value, str) else value
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            problem = str(error) if isinstance(error, ConfigError) else f"{brief(node.value)} cannot be read as {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping with the safe loader.

    Raises:
        ConfigError: the file is missing, is no YAML, repeats a key, is larger than any configuration, or holds no
            mapping.
    """
    shown = _cut(str(path))
    try:
        path = Path(path)
        if not path.exists():
            siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
            raise ConfigError(f"no configuration at {shown}{nearest(str(path), siblings)}")
        # Opening a pipe waits for somebody who writes into it, and a device may never end.
        if not stat.S_ISREG(path.stat().st_mode):
            what = "a folder" if path.is_dir() else "not a regular file"
            raise ConfigError(f"cannot read the configuration {shown}: it is {what}")
        with path.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(
                f"cannot read the configuration {shown}: it has more than {_MOST_BYTES} bytes; is it another file?"
            )
        data = yaml.load(content.decode("utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read the configuration {shown}: it is not UTF-8 text ({error})") from None
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot read the configuration {shown}: {_cut(str(error))}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown} is no valid YAML: {_cut(str(error))}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{shown} must hold keys and values, found {type(data).__name__}")
    return data


def _explain(root: type[BaseModel], item: dict[str, Any]) -> str:
    """One line for one pydantic error: place, what was wrong, what was expected."""
    key_path = ".".join(brief(part)[1:-1] if isinstance(part, str) else str(part) for part in item["loc"])
    key_path = key_path or "(top level)"
    if item["type"] == "extra_forbidden":
        valid = _keys_at(root, item["loc"][:-1])
        hint = nearest(str(item["loc"][-1]), valid)
        return f"{key_path}: unknown key{hint} (valid here: {', '.join(valid)})"
    if item["type"] == "missing":
        return f"{key_path}: required, but missing"
    message = re.sub(r"^(Value error|Assertion failed), ", "", item["msg"])
    problem = f"{key_path}: {message[0].lower() + message[1:]}"
    # What concerns several keys at once would show all of them.
    many = isinstance(item["input"], Mapping) and len(item["input"]) > 2
    return problem if many else f"{problem}, found {brief(item['input'])}"


def _cut(text: str) -> str:
    """Text of others, whose beginning and end say what matters, without what would flood a message."""
    half = _LONGEST_LINE // 2
    return text if len(text) <= _LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"


def _keys_at(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The valid keys of the configuration class that sits at a place inside another."""
    models: list[type[BaseModel]] = [root]
    for part in location:
        if isinstance(part, int):
            continue
        types = [m for model in models for m in _model_types(model.model_fields.get(part))]
        models = types or models
    return sorted({key for model in models for key in model.model_fields})


def _model_types(field: Any) -> list[type[BaseModel]]:
    pending, types = [field.annotation] if field is not None else [], []
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            types.append(annotation)
        pending.extend(get_args(annotation))
    return types
