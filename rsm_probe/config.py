"""Typed configurations read from YAML. Error messages give the position of each mistake and the nearest valid key."""

from __future__ import annotations

import copy
import os
import re
import stat
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from rsm_probe.checks import brief, require_text
from rsm_probe.errors import ConfigError, RsmProbeError, did_you_mean
from rsm_probe.shipped import configuration_file, is_shipped, shipped_files

# Said of a source that is Python code.
NO_CODE = (
    "configurations do not run code unless the command line allows it: `rsm-probe run CONFIG --allow-code` (in Python, "
    "read_study(CONFIG, allow_code=True)); do so only if you trust the code"
)
# Limits far above any real configuration, which takes a few kilobytes, some hundred values and a handful of levels.
_MOST_BYTES = 1 << 20
_MOST_VALUES = 20_000
_DEEPEST = 100
# Digits of a number; the time to parse one grows with the square of its length.
_MOST_DIGITS = 400
# Characters of a text: more than any path or name has. Messages repeat texts.
_LONGEST_TEXT = 4096
# Mistakes listed at once, and characters per line of the list.
_MOST_LINES, _LONGEST_LINE = 20, 2000


@dataclass(frozen=True, eq=False)
class ConfigFolder:
    """The folder of a configuration file, to which the paths written in it are relative.

    A path that does not exist there is relative to the working directory, as on the command line.

    Attributes:
        folder: the folder; None where paths are taken as written: in data that were not read from a file, and in the
            configurations that come with the package, whose data lie in the working directory.
        notes: what to tell the user about paths that were looked up, one sentence per path.
        allow_code: whether models may run the user's Python code when they are loaded.
    """

    folder: Path | None = None
    notes: list[str] = field(default_factory=list)
    allow_code: bool = False

    @classmethod
    def of(cls, file: str | Path, allow_code: bool = False) -> ConfigFolder:
        """The folder of a configuration file."""
        return cls(_folder_of(file), allow_code=allow_code)

    # Where a configuration was read does not make it a different one.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigFolder)

    def __hash__(self) -> int:
        return 0

    def nested(self, file: str | Path) -> ConfigFolder:
        """The folder of a configuration that this one names; notes are shared."""
        return ConfigFolder(_folder_of(file), self.notes, self.allow_code)

    def resolve(self, written: str) -> str:
        """A path that can be opened: absolute where it lies in this folder, otherwise as written."""
        if self.folder is None or not written or os.path.isabs(written) or "://" in written:
            return written
        beside, here = self.folder / written, Path(written)
        try:
            if not beside.exists():
                if here.exists():
                    self._note(
                        f"{written!r} is not in {self.folder}, so {here.absolute()} is used: paths in a "
                        f"configuration are relative to it; write {os.path.relpath(here, self.folder)!r}"
                    )
                return written
            if here.exists():
                if here.samefile(beside):
                    return written
                self._note(
                    f"{written!r} is both in {self.folder}, the folder of the configuration, and in "
                    f"{Path.cwd()}, the working directory; the first is used"
                )
        except (OSError, ValueError):  # not a valid file name; opening it reports why
            return written
        return os.path.normpath(beside)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    @contextmanager
    def both_places(self, *written: str | None) -> Iterator[None]:
        """Add to errors in which folders these paths were looked up, if they are in neither."""
        try:
            yield
        except RsmProbeError as error:
            for path in written:
                if self.folder and path and os.path.normpath(path) in str(error) and not os.path.lexists(path):
                    raise type(error)(
                        f"{error}: {path!r} is neither in {self.folder}, the folder of the configuration, nor in "
                        f"{Path.cwd()}, the working directory"
                    ) from None
            raise


def _folder_of(file: str | Path) -> Path | None:
    return None if is_shipped(file) else Path(os.path.abspath(file)).parent


def config_path(written: str, info: ValidationInfo) -> str:
    """Validate a path by `ConfigFolder.resolve`, with the folder that `Config.parse` was given."""
    return info.context.resolve(written) if isinstance(info.context, ConfigFolder) else written


def read_nested(file: str, info: ValidationInfo) -> tuple[dict[str, Any], ConfigFolder]:
    """Read a configuration that another one names; its own paths are relative to its own folder.

    Args:
        file: its path, or the name of one that comes with the package, such as models/resnet18.
        info: of the validator that calls this.

    Raises:
        ConfigError: see `read_yaml`; the message names both folders in which a missing file was looked up.
    """
    home = info.context if isinstance(info.context, ConfigFolder) else ConfigFolder()
    path = configuration_file(home.resolve(file))
    with home.both_places(file):
        data = read_yaml(path)
    return data, home if home.folder is None else home.nested(path)


# The path of a file or folder that is read.
ConfigPath = Annotated[str, AfterValidator(config_path)]


class Config(BaseModel):
    """Base of all configurations: rejects unknown keys; frozen after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    _home: ConfigFolder = PrivateAttr(default_factory=ConfigFolder)

    def model_post_init(self, context: Any) -> None:
        """Remember where the configuration was read, for messages about its paths."""
        if isinstance(context, ConfigFolder):
            self._home = context

    def naming_paths(self, *paths: str | None) -> AbstractContextManager[None]:
        """See `ConfigFolder.both_places`."""
        return self._home.both_places(*paths)

    @field_validator("*", mode="after")
    @classmethod
    def _texts_can_be_stored(cls, value: Any) -> Any:
        """Require texts that are valid in file names, results and messages: no NUL characters, limited length."""
        for text in value if isinstance(value, tuple | list | dict) else (value,):
            if isinstance(text, str):
                require_text(text, "text", ConfigError)
                if len(text) > _LONGEST_TEXT:
                    raise ValueError(f"must have at most {_LONGEST_TEXT} characters, and has {len(text)}")
        return value

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str = "the configuration", home: ConfigFolder | None = None) -> Self:
        """Validate plain data.

        Args:
            data: keys and values, as read from YAML.
            where: source of the data, for messages (such as the path of a file).
            home: the folder to which paths are relative, and whether models may run code; by default paths are taken as
                written, and no code runs.

        Raises:
            ConfigError: lists every mistake with its position, what was expected and the nearest valid key.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where} must hold keys and values, found {brief(data)} ({type(data).__name__})")
        try:
            return cls.model_validate(dict(data), context=home)
        except ValidationError as error:
            items: list[dict[str, Any]] = [dict(item) for item in error.errors()]
            # pydantic reports a mistake in an item again, in different words, for the list that contains it.
            outer = {tuple(item["loc"][:depth]) for item in items for depth in range(len(item["loc"]))}
            inner = [item for item in items if item["loc"] not in outer]
            lines = [_cut(_explain(cls, item)) for item in inner[:_MOST_LINES]]
            if len(inner) > _MOST_LINES:
                lines.append(f"and {len(inner) - _MOST_LINES} more")
            raise ConfigError(f"{where} is not valid:\n" + "\n".join(f"  {line}" for line in lines)) from None
        except RecursionError:
            raise ConfigError(f"{where} is nested too deeply") from None

    def to_yaml(self) -> str:
        """Dump the resolved configuration, defaults included, as YAML that `read_yaml` can read."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also rejects repeated keys and documents that take too long to read.

    Values are counted during composition, before any value is constructed: a few lines of nested aliases can expand to
    billions of values.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._count = 0
        # Number of values below each anchor, itself included; absent while the anchor is being composed.
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one value and everything below it."""
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
        """Check for repeated keys here, because construction mixes in keys merged by `<<`, which may repeat."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[Any, yaml.Mark] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node)
            if not isinstance(key, Hashable):  # rejected later, when the mapping is constructed
                continue
            if key in first:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping",
                    node.start_mark,
                    f"key {brief(key)} appears twice, first in line {first[key].line + 1}; keep one of the two",
                    key_node.start_mark,
                )
            first[key] = key_node.start_mark
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct one value; turn errors in invalid scalars, such as the date 2024-99-99, into messages."""
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
    """Read a YAML mapping with the safe loader.

    Raises:
        ConfigError: the file is missing, not valid YAML, too large, repeats a key, or does not contain a mapping.
    """
    shown = _cut(str(path))
    try:
        path = Path(path)
        if not path.exists():
            siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
            hint = did_you_mean(str(path), siblings if path.suffix else [*siblings, *shipped_files()])
            if not path.suffix:
                hint += "; `rsm-probe configs` lists those that come with rsm_probe"
            elif path.stem in shipped_files():
                hint += f"; the one that comes with rsm_probe is called {path.stem!r}, without an ending"
            raise ConfigError(f"no configuration at {shown}{hint}")
        # Opening a pipe blocks until something writes to it, and a device may never end.
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
        raise ConfigError(f"{shown} is not valid YAML: {_cut(str(error))}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{shown} must hold keys and values, found {type(data).__name__}")
    return data


def with_changes(data: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Change a configuration by texts such as `images.count=100`; parts of lists go by number, as in `models.0.name`.

    Args:
        data: keys and values, as `read_yaml` returns them; it stays as it is.
        changes: key and value each, with dots between nested keys; values are YAML.

    Raises:
        ConfigError: a text has no key or no value, or a key lies within something that has no keys.
    """
    changed = copy.deepcopy(dict(data))
    for change in changes:
        path, equals, written = change.partition("=")
        names = path.split(".")
        if not equals or not all(names):
            raise ConfigError(f"--set takes KEY=VALUE, such as images.count=100, found {brief(change)}")
        try:
            value = yaml.load(written, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {path}: {brief(written)} is not valid YAML: {_cut(str(error))}") from None
        inner: Any = changed
        for name in names[:-1]:
            inner = _within(inner, name, path)
        _within(inner, names[-1], path)
        inner[int(names[-1]) if isinstance(inner, list) else names[-1]] = value
    return changed


def _within(outer: Any, name: str, path: str) -> Any:
    """The value of a key, or of a number in a list; an empty mapping where there is none."""
    if isinstance(outer, dict):
        if outer.get(name) is None:
            outer[name] = {}
        return outer[name]
    if isinstance(outer, list):
        if name.isdigit() and int(name) < len(outer):
            return outer[int(name)]
        raise ConfigError(f"--set {path}: {name!r} must be a number below {len(outer)}, of an entry of a list")
    raise ConfigError(f"--set {path}: {name!r} lies within {brief(outer)}, which has no keys")


def _explain(root: type[BaseModel], item: dict[str, Any]) -> str:
    """Describe one pydantic error in one line: position, mistake, and what was expected."""
    key_path = ".".join(brief(part)[1:-1] if isinstance(part, str) else str(part) for part in item["loc"])
    key_path = key_path or "(top level)"
    if item["type"] == "extra_forbidden":
        valid = _keys_at(root, item["loc"][:-1])
        hint = did_you_mean(str(item["loc"][-1]), valid)
        return f"{key_path}: unknown key{hint} (valid here: {', '.join(valid)})"
    if item["type"] == "missing":
        return f"{key_path}: required, but missing"
    message = re.sub(r"^(Value error|Assertion failed), ", "", item["msg"])
    problem = f"{key_path}: {message[0].lower() + message[1:]}"
    # For a mapping with many keys, do not print all of them.
    many = isinstance(item["input"], Mapping) and len(item["input"]) > 2
    return problem if many else f"{problem}, found {brief(item['input'])}"


def _cut(text: str) -> str:
    """Truncate text from libraries in the middle: its beginning and end matter."""
    half = _LONGEST_LINE // 2
    return text if len(text) <= _LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"


def described_keys(root: type[BaseModel], within: str = "") -> Iterator[tuple[str, str, str]]:
    """List the keys of a configuration: path, default as in YAML (or "required"), and description.

    Args:
        root: the class of the configuration.
        within: what precedes the paths, such as "images.".
    """
    for name, key in root.model_fields.items():
        if key.is_required():
            default = "required"
        else:
            value = TypeAdapter(Any).dump_python(key.get_default(call_default_factory=True), mode="json")
            default = yaml.safe_dump(value, default_flow_style=True, width=_LONGEST_LINE).removesuffix("...\n").strip()
        yield f"{within}{name}", default, key.description or ""
        for kind in _model_types(key):
            yield from described_keys(kind, f"{within}{name}.")


def _keys_at(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The valid keys of the configuration class at a position inside another."""
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
