"""Typed configurations read from YAML; a mistake is answered with its place and the nearest valid key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from rsm_probe.errors import ConfigError, nearest


class Config(BaseModel):
    """Base of all configurations: unknown keys are refused, values are not changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str = "the configuration") -> Self:
        """Validates plain data.

        Args:
            data: keys and values as YAML gives them.
            where: what the data is, for the error message (a file's path).

        Raises:
            ConfigError: names every wrong place, what was expected there and the nearest valid key.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            items: list[dict[str, Any]] = [dict(item) for item in error.errors()]
            # A mistake in an item is reported again, in other words, for the list that holds it.
            inner = [i for i in items if not any(o["loc"][: len(i["loc"])] == i["loc"] != o["loc"] for o in items)]
            lines = [_explain(cls, item) for item in inner]
            raise ConfigError(f"{where} is not valid:\n" + "\n".join(f"  {line}" for line in lines)) from None

    def to_yaml(self) -> str:
        """The resolved configuration, defaults included, as YAML that `read_yaml` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping with the safe loader.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds no mapping.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"no configuration at {path}{nearest(str(path), siblings)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold keys and values, found {type(data).__name__}")
    return data


def _explain(root: type[BaseModel], item: dict[str, Any]) -> str:
    """One line for one pydantic error: place, what was wrong, what was expected."""
    place = ".".join(str(part) for part in item["loc"]) or "(top level)"
    if item["type"] == "extra_forbidden":
        valid = _keys_at(root, item["loc"][:-1])
        hint = nearest(str(item["loc"][-1]), valid)
        return f"{place}: unknown key{hint} (valid here: {', '.join(valid)})"
    if item["type"] == "missing":
        return f"{place}: required, but missing"
    message = re.sub(r"^(Value error|Assertion failed), ", "", item["msg"])
    said = f"{place}: {message[0].lower() + message[1:]}"
    # What concerns several keys at once would show all of them.
    return said if isinstance(item["input"], Mapping) and len(item["input"]) > 2 else f"{said}, found {item['input']!r}"


def _keys_at(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The valid keys of the configuration class that sits at a place inside another."""
    models: list[type[BaseModel]] = [root]
    for part in location:
        if isinstance(part, int):
            continue
        found = [m for model in models for m in _model_types(model.model_fields.get(part))]
        models = found or models
    return sorted({key for model in models for key in model.model_fields})


def _model_types(field: Any) -> list[type[BaseModel]]:
    pending, found = [field.annotation] if field is not None else [], []
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        pending.extend(get_args(annotation))
    return found
