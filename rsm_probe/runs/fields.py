"""Types of configuration keys. Pydantic reports where a value is wrong, and the checks here report why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from rsm_probe.checks import brief
from rsm_probe.comparison.alignment import get_estimator
from rsm_probe.config import NO_CODE, ConfigFolder, config_path
from rsm_probe.errors import ConfigError, RsmProbeError, repeated
from rsm_probe.execution.amounts import parse_bytes
from rsm_probe.forward.token_kinds import token_kinds
from rsm_probe.matching.registry import get_matching
from rsm_probe.probe.representation import Layout
from rsm_probe.similarity.kernels import get_kernel
from rsm_probe.sources.images.limits import MOST_PIXELS
from rsm_probe.sources.models.preprocessing_words import PREPROCESSING, preprocessing
from rsm_probe.storage.paths import file_name, local_folder, path_or_url

# Begins the source of models and images that Python gave to a study; their fingerprint follows.
IN_PYTHON = "python"
# With more images or draws, their names or weights alone would fill the memory.
_MOST_IMAGES, _MOST_DRAWS = 10_000_000, 1_000_000


def _checked(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make a validator from a check of the project; it returns the value unchanged."""

    def validate(value: Any) -> Any:
        try:
            check(value)
        except (RsmProbeError, OverflowError) as error:
            raise ValueError(str(error)) from None
        return value

    return validate


def _number(value: Any) -> Any:
    """Reject booleans: YAML reads `yes` and `on` as true, and pydantic reads true as 1."""
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


def _amount(value: Any) -> Any:
    parse_bytes(value if isinstance(value, int) else str(value))
    return value


def _distinct(values: Any) -> Any:
    """Reject repeated names: results are identified by name."""
    if isinstance(values, tuple) and (twice := repeated(values)) is not None:
        raise ValueError(f"{twice!r} occurs more than once; name it once")
    return values


def _layers(value: str | tuple[str, ...]) -> None:
    names = [value] if isinstance(value, str) else value
    if not names or not all(names):
        raise ConfigError("name at least one layer, or leave the key out")


def each(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make a validator that applies `check` to each of several values."""
    return _checked(lambda values: [check(value) for value in values])


def each_named(known: Callable[[str], str]) -> Callable[[Any], Any]:
    """Make a validator that replaces each of several names by the one under which results have it."""

    def validate(names: Any) -> Any:
        try:
            return tuple(known(name) for name in names)
        except (RsmProbeError, OverflowError) as error:
            raise ValueError(str(error)) from None

    return validate


def folder_names(entries: Any, taken: Collection[str]) -> Any:
    """Reject mappings with keys that cannot be names of folders within a run folder.

    Args:
        entries: the mapping; pydantic rejects anything else.
        taken: other names in the run folder.

    Raises:
        ValueError: a key is unsuitable; the message names it.
    """
    seen = {name.casefold() for name in taken}
    for name in entries if isinstance(entries, Mapping) else ():
        # Some file systems do not distinguish upper and lower case.
        plain = isinstance(name, str) and not name.startswith(".") and file_name(name) == name
        if not plain or name.casefold() in seen:
            raise ValueError(
                f"names become folders: use letters, digits and '-_+=,@()', no '/' and no leading '.', each name once, "
                f"and none of {', '.join(taken)}; found {brief(name)}"
            )
        seen.add(name.casefold())
    return entries


_Number = BeforeValidator(_number)
Distinct = AfterValidator(_distinct)

# Numbers
Count = Annotated[int, Field(ge=1), _Number]
Images = Annotated[int, Field(ge=1, le=_MOST_IMAGES), _Number]
AtLeastTwo = Annotated[int, Field(ge=2, le=_MOST_IMAGES), _Number]
Edge = Annotated[int, Field(ge=1, le=MOST_PIXELS), _Number]
Draws = Annotated[int, Field(ge=2, le=_MOST_DRAWS), _Number]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1), _Number]
Level = Annotated[float, Field(gt=0, lt=1), _Number]
Share = Annotated[float, Field(ge=0, le=1), _Number]
WholeNumber = Annotated[int, Field(ge=0), _Number]


def _user_function(written: str | None, info: ValidationInfo) -> str | None:
    if written is None:
        return None
    file, _, name = written.rpartition(":")
    if not file.endswith(".py") or not name:
        raise ValueError(f"write file.py:function, found {brief(written)}")
    if not (isinstance(info.context, ConfigFolder) and info.context.allow_code):
        raise ValueError(NO_CODE)
    return f"{config_path(file, info)}:{name}"


Hours = Annotated[float, Field(gt=0, allow_inf_nan=False, description="null for no limit"), _Number]
Memory = Annotated[str | int, BeforeValidator(_number), BeforeValidator(_checked(_amount))]
# Distinct names
Layers = Annotated[str | tuple[str, ...], AfterValidator(_checked(_layers)), Distinct]
Tokens = Annotated[
    str | tuple[str, ...] | None,
    AfterValidator(_checked(token_kinds)),
    Field(description="vectors to compare: locations, class, mean, max, gem, or several of these"),
]
Matchings = Annotated[tuple[str, ...], AfterValidator(each_named(lambda name: get_matching(name)[0])), Distinct]
Kernels = Annotated[tuple[str, ...], AfterValidator(each(get_kernel)), Distinct]
Estimators = Annotated[tuple[str, ...], AfterValidator(each(get_estimator)), Distinct]
# How models are called and read
Layouts = Annotated[
    dict[str, Layout] | None, Field(description="layer name or glob -> how to read its output, such as NTC or NHWC")
]
Method = Annotated[str | None, Field(description="method whose calls are forward passes, such as encode_image")]
Forward = Annotated[
    str | None,
    AfterValidator(_user_function),
    Field(
        description="file.py:function of a model and a batch, which makes the call with prompts or timesteps; runs "
        "code and needs `rsm-probe run CONFIG --allow-code`"
    ),
]
Inputs = Annotated[str | tuple[str, ...] | None, Field(description="inputs that hold images; by default all")]
Preprocessing = Annotated[
    str | None,
    AfterValidator(_checked(lambda value: preprocessing(value, None))),
    Field(description=f"preprocessing of images, in place of the model's own: {', '.join(PREPROCESSING)}"),
]
# Destinations
Folder = Annotated[str, AfterValidator(_checked(lambda value: local_folder(value, "the folder")))]
FolderOrUrl = Annotated[str, AfterValidator(_checked(lambda value: path_or_url(value, "the destination")))]
