"""Configurations: what is wrong is said with its place and the nearest valid key."""

import os
import re
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field, PositiveInt, ValidationError

import rsm_probe
from rsm_probe.config import Config, ConfigFolder, read_yaml, with_changes
from rsm_probe.errors import ConfigError
from rsm_probe.sources import TrainingConfig
from rsm_probe.studies.registry import STUDIES, read_study
from rsm_probe.studies.sweep import SweepConfig


class Inner(Config):
    width: PositiveInt = 3
    colour: Literal["red", "green"] = "red"


class Outer(Config):
    name: str
    rate: float = 0.5
    inner: Inner = Inner()
    maybe: Inner | None = None
    several: tuple[Inner, ...] = ()
    by_name: dict[str, Inner] = Field(default_factory=dict)


def refused(data: dict, config: type[Config] = Outer) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse(data)
    return str(caught.value)


def test_valid_data_is_read_with_defaults():
    config = Outer.parse({"name": "x", "inner": {"width": 5}, "several": [{"colour": "green"}, {}]})
    assert config.rate == 0.5
    assert config.inner == Inner(width=5)
    assert config.maybe is None
    assert [item.colour for item in config.several] == ["green", "red"]


@pytest.mark.parametrize(
    ("data", "place", "near"),
    [
        ({"nmae": "x"}, "nmae", "name"),
        ({"name": "x", "Rate": 1}, "Rate", "rate"),
        ({"name": "x", "inner": {"widht": 1}}, "inner.widht", "width"),
        ({"name": "x", "maybe": {"color": "red"}}, "maybe.color", "colour"),
        ({"name": "x", "several": [{}, {"widths": 1}]}, "several.1.widths", "width"),
        ({"name": "x", "by_name": {"a": {"colours": 1}}}, "by_name.a.colours", "colour"),
    ],
)
def test_unknown_key_is_named_with_its_place_and_the_nearest_valid_key(data, place, near):
    line = next(line for line in refused(data).splitlines() if f"{place}: unknown key" in line)
    assert f"nearest: {near!r}" in line
    # Those of the class at that place, not of another.
    valid = sorted(Inner.model_fields if "." in place else Outer.model_fields)
    assert f"(valid here: {', '.join(valid)})" in line


def test_key_like_no_other_lists_the_valid_ones_without_a_guess():
    message = refused({"name": "x", "inner": {"zzzzzz": 1}})
    assert "inner.zzzzzz: unknown key (valid here: colour, width)" in message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"name": "x", "rate": "fast"}, ["rate: ", "valid number", "'fast'"]),
        ({"name": 3}, ["name: ", "valid string", "3"]),
        ({"name": "x", "inner": {"width": -2}}, ["inner.width: ", "greater than 0", "-2"]),
        ({"name": "x", "inner": {"width": 2.5}}, ["inner.width: ", "valid integer", "2.5"]),
        ({"name": "x", "inner": {"colour": "blue"}}, ["inner.colour: ", "'red' or 'green'", "'blue'"]),
        ({"name": "x", "several": [{}, {"width": "wide"}]}, ["several.1.width: ", "'wide'"]),
        ({"name": "x", "inner": [1, 2]}, ["inner: ", "[1, 2]"]),
        ({"name": "x", "several": {"width": 1}}, ["several: ", "{'width': 1}"]),
        ({}, ["name: required, but missing"]),
    ],
)
def test_wrong_value_is_named_with_its_place_what_was_expected_and_what_was_found(data, expected):
    message = refused(data)
    assert any(all(part in line for part in expected) for line in message.splitlines()), message


def test_every_mistake_is_listed_at_once():
    message = refused({"nmae": "x", "rate": "fast", "inner": {"widht": 1, "colour": "blue"}})
    for part in ("nmae", "name: required", "rate:", "inner.widht", "inner.colour"):
        assert part in message


def test_message_says_what_was_read():
    with pytest.raises(ConfigError, match=r"^my.yaml is not valid"):
        Outer.parse({}, "my.yaml")


@pytest.mark.parametrize(
    ("config", "data", "expected"),
    [
        (TrainingConfig, {"network": {"widht": [1]}}, "network.widht: unknown key; nearest: 'widths'"),
        (TrainingConfig, {"stesp": 1}, "stesp: unknown key; nearest: 'steps'"),
        (
            TrainingConfig,
            {"images": "digit"},
            "images: input should be 'digits', 'scenes', 'cluttered', 'photos', 'cifar100' or the path of a folder, "
            "such as './digit', found 'digit'",
        ),
        (
            SweepConfig,
            {"models": [{"recipe": {"network": {"block": [1]}}}], "images": {"source": "digits"}},
            "models.0.recipe.network.block: unknown key; nearest: 'blocks'",
        ),
        (SweepConfig, {"models": [{"source": "x"}], "images": {"sorce": "digits"}}, "images.sorce: unknown key"),
    ],
)
def test_mistakes_in_the_configurations_of_studies_are_placed(config, data, expected):
    assert expected in refused(data, config)


def test_mistake_in_an_item_is_not_said_of_its_list_too():
    message = refused({"models": [{"recipe": {"stesp": 1}}], "images": {"source": "digits"}}, SweepConfig)
    assert "models.0.recipe.stesp" in message
    # A list of one model is no empty list.
    assert "at least 1 item" not in message


def test_configuration_does_not_change_after_reading():
    config = Outer(name="x")
    with pytest.raises(ValidationError):
        config.name = "y"
    assert config.name == "x"


@pytest.mark.parametrize(
    "config",
    [
        Outer(name="x"),
        Outer(
            name="ünïcode: yes",
            rate=1e-7,
            inner=Inner(width=9),
            maybe=Inner(),
            several=(Inner(colour="green"), Inner()),
            by_name={"on": Inner(), "3": Inner()},
        ),
        TrainingConfig(),
        TrainingConfig(steps=0, weight_decay=5e-4, network={"widths": (1, 2, 3, 4)}),
        SweepConfig.parse(
            {"models": [{"source": "timm:resnet18", "weights": None}, {"recipe": {}, "seeds": [1, 2]}],
             "images": {"source": "scenes", "count": 7}, "layers": ["layer*", "fc"], "max_hours": None}
        ),
    ],
    ids=["plain", "full", "training", "training-changed", "sweep"],
)  # fmt: skip
def test_yaml_is_read_back_as_the_same_configuration(config, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert type(config).parse(read_yaml(path)) == config


def test_yaml_holds_the_defaults():
    data = yaml.safe_load(Outer(name="x").to_yaml())
    assert data == {
        "name": "x",
        "rate": 0.5,
        "inner": {"width": 3, "colour": "red"},
        "maybe": None,
        "several": [],
        "by_name": {},
    }


# Numbers that YAML 1.1 reads as text.
@pytest.mark.parametrize("text", ["5e-4", "1E-3", "0.5"])
def test_numbers_as_people_write_them_are_numbers(text, tmp_path):
    (tmp_path / "c.yaml").write_text(f"name: x\nrate: {text}\n")
    assert Outer.parse(read_yaml(tmp_path / "c.yaml")).rate == float(text)


# Files


def test_missing_file_is_named_with_the_nearest_beside_it(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("name: x")
    with pytest.raises(ConfigError, match=r"no configuration at .*quikstart.yaml; nearest: .*quickstart.yaml"):
        read_yaml(tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match=r"no configuration at .*absent/c.yaml"):
        read_yaml(tmp_path / "absent" / "c.yaml")


@pytest.mark.parametrize(
    ("text", "kind"),
    [("", "NoneType"), ("- a\n- b\n", "list"), ("just text", "str"), ("3", "int"), ("# only a comment", "NoneType")],
)
def test_file_that_holds_no_mapping_says_what_it_holds(text, kind, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"c.yaml must hold keys and values, found {kind}"):
        read_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "\tname: x", "name: 'x"])
def test_invalid_yaml_is_said_with_file_and_line(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"(?s)c.yaml is not valid YAML: .*line \d"):
        read_yaml(tmp_path / "c.yaml")


def test_yaml_cannot_run_code(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "c.yaml").write_text(f'a: !!python/object/apply:os.system ["touch {mark}"]\n')
    with pytest.raises(ConfigError, match=r"c.yaml is not valid YAML"):
        read_yaml(tmp_path / "c.yaml")
    assert not mark.exists()


def test_a_change_on_the_command_line_cannot_run_code(tmp_path):
    mark = tmp_path / "ran"
    with pytest.raises(ConfigError, match=r"--set a: .* is not valid YAML"):
        with_changes({}, [f'a=!!python/object/apply:os.system ["touch {mark}"]'])
    assert not mark.exists()


def test_folder_or_binary_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_yaml(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*c.yaml"):
        read_yaml(tmp_path / "c.yaml")


def test_keys_that_are_no_text_are_placed(tmp_path):
    # YAML 1.1 reads `on` as true.
    (tmp_path / "c.yaml").write_text("name: x\non: 1\n")
    assert "keys should be strings" in refused(read_yaml(tmp_path / "c.yaml"))


def test_configurations_that_come_with_the_project_are_valid():
    root = Path(rsm_probe.__file__).parent.parent
    files = sorted((root / "configs").glob("*.yaml"))
    assert files
    for file in files:
        data = read_yaml(file)
        config = STUDIES[data["study"]] if "study" in data else TrainingConfig
        parsed = config.parse(data, str(file), ConfigFolder.of(file))
        assert config.parse(yaml.safe_load(parsed.to_yaml())) == parsed


# Files that would take long, or that hold what nothing can keep


def of_file(text: str | bytes, folder: Path) -> str:
    """The message with which a file of this content is refused."""
    (folder / "c.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=r"c\.yaml") as caught:
        read_yaml(folder / "c.yaml")
    assert len(str(caught.value)) < 5000
    return str(caught.value)


BILLIONS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BILLIONS, "more than 20000 values, those that aliases repeat included"),
        (BILLIONS.replace("[", "{k: [").replace("]", "]}"), "more than 20000 values"),
        ("a: [" + "1, " * 20_001 + "]", "more than 20000 values"),
        ("a: " + "[" * 3000 + "]" * 3000, "more than 100 levels"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "more than 100 levels"),
        ("".join(f"{'  ' * k}a:\n" for k in range(300)), "more than 100 levels"),
        ("a: &x [1, *x]", "an alias within its own anchor"),
        ("a: &x {b: *x}", "an alias within its own anchor"),
        ("a: " + "7" * 5000, "a number of 5000 characters; at most 400"),
        ("a: 1" + ":1" * 5000, "a number of 10001 characters"),
        ("a: *" + "x" * 500_000, "undefined alias"),
        ("a: !!" + "x" * 500_000 + " 1", "could not determine a constructor"),
        ("a: 2024-99-99", "'2024-99-99' cannot be read as timestamp"),
        ("a: !!int ''", "'' cannot be read as int"),
        ("a: !!bool perhaps", "'perhaps' cannot be read as bool"),
        ('a: "x\\0"', "NUL character"),
        ('a: "x\\ud800"', "not valid Unicode"),
        (b"a: x\0", "special characters are not allowed"),
        ("a: 1\n---\na: 2\n", "expected a single document"),
        ("? [1, 2]\n: 3", "unhashable key"),
        ("!!seq x: 3", "expected a sequence node"),
        ("a: 1".encode("utf-16"), "not UTF-8 text"),
        (b"a: caf\xe9", "not UTF-8 text"),
        (b"# much\n" * 160_000, "more than 1048576 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_no_configuration_looks_like_is_refused_at_once(text, expected, tmp_path):
    assert expected in of_file(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "key", "line", "first"),
    [
        ("batch_size: 8\nseed: 1\nbatch_size: 16\n", "batch_size", 3, 1),
        ("models:\n  - name: a\n    name: b\n", "name", 3, 2),
        ("inner: {width: 1, width: 1}", "width", 1, 1),
        ("on: 1\n\ntrue: 2\n", "True", 3, 1),
        ("1: a\n0x1: b\n", "1", 2, 1),
    ],
)
def test_a_repeated_key_is_refused_with_both_lines(text, key, line, first, tmp_path):
    message = of_file(text, tmp_path)
    shown = key if key[0] in "T1" else repr(key)
    assert f"key {shown} appears twice, first in line {first}; keep one of the two" in message
    assert f"line {line}" in message.partition("twice")[2]


def test_keys_that_a_mapping_merges_may_be_repeated(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\nc: {<<: [*a, {z: 1}], x: 0}\nd: *a\n")
    a = {"x": 1, "y": 2}
    assert read_yaml(tmp_path / "c.yaml") == {"a": a, "b": {"x": 1, "y": 3}, "c": {"x": 0, "y": 2, "z": 1}, "d": a}


def test_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfname: x\n")
    assert read_yaml(tmp_path / "c.yaml") == {"name": "x"}


def test_what_is_not_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "c.yaml")
    for path in (tmp_path / "c.yaml", "/dev/zero"):
        with pytest.raises(ConfigError, match="it is not a regular file"):
            read_yaml(path)


@pytest.mark.parametrize("path", ["x" * 300 + ".yaml", "a\0b.yaml", "", 3, None], ids=str)
def test_a_path_that_no_file_has_is_said(path):
    with pytest.raises(ConfigError, match=r"configuration"):
        read_yaml(path)


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "data",
    [
        {"name": "x", "rate": "y" * 1_000_000},
        {"name": "x", "y" * 1_000_000: 1},
        {"name": "x", "inner": {"y" * 1_000_000: 1}},
        {"name": "x", "by_name": {"y" * 1_000_000: {"colour": "blue"}}},
        {"name": "x", "rate": [1] * 1_000_000},
        {"name": "x", "several": [{"width": 0}] * 1000},
        {"name": "x", "rate": 10**5000},
        {"name": "x", "inner": {"width": 10**5000, "colour": 10**5000}},
        {"name": "x", "rate": deep(5000)},
        {"name": deep(5000)},
    ],
    ids=["text", "key", "inner key", "place", "list", "many", "integer", "integers", "deep", "deep name"],
)
def test_what_was_found_does_not_flood_the_message(data):
    assert len(refused(data)) < 6000


def test_names_that_are_unknown_do_not_flood_the_message():
    models = {"models": [{"source": "x"}], "images": {"source": "digits"}}
    for key in ("matchings", "kernels", "estimators"):
        assert len(refused({**models, key: ["x" * 1_000_000]}, SweepConfig)) < 1000


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_are_finite(number):
    assert "rate: input should be a finite number" in refused({"name": "x", "rate": number})
    sweep = {"models": [{"source": "x"}], "images": {"source": "digits"}, "max_hours": number}
    assert "max_hours: input should be" in refused(sweep, SweepConfig)
    for key in ("learning_rate", "weight_decay", "expected_accuracy"):
        assert f"{key}: input should be" in refused({key: number}, TrainingConfig)


@pytest.mark.parametrize("hours", [-1, -0.0, 0])
def test_hours_are_positive(hours):
    sweep = {"models": [{"source": "x"}], "images": {"source": "digits"}, "max_hours": hours}
    assert "max_hours: input should be greater than 0" in refused(sweep, SweepConfig)


@pytest.mark.parametrize("text", ["x\0", "\0", "caf\udce9"])
def test_texts_that_results_cannot_keep_are_refused(text):
    for data, place in (
        ({"name": text}, "name"),
        ({"name": "x", "by_name": {text: {}}}, "by_name"),
    ):
        message = refused(data)
        assert place in message
        assert "NUL" in message or "unicode" in message.lower()
    message = refused({"models": [{"source": "x"}], "images": {"source": "digits"}, "keep": ["x", text]}, SweepConfig)
    assert "keep" in message


@pytest.mark.parametrize("data", [None, [1], "name", 3])
def test_data_that_is_no_mapping_is_said(data):
    assert f"must hold keys and values, found {data!r}" in refused(data)


@pytest.mark.parametrize(
    "text",
    [
        "study: {long}",
        "study: [{long}]",
        "study: sweep\nimages: {{source: ./{long}}}\nmodels: [{{recipe: {{}}}}]",
        "study: sweep\nimages: {{source: digits}}\nmodels: [{{source: 'timm:{long}'}}]",
        "study: sweep\nimages: {{source: digits}}\nmodels: [{{recipe: {{}}, layers: [a, {long}]}}]",
        "study: sweep\nimages: {{source: digits}}\nmodels: [{{recipe: {{}}}}]\nlayers: {long}",
        "study: sweep\nimages: {{source: digits}}\nmodels: [{{recipe: {{}}}}]\ndevice: {long}",
    ],
)
def test_no_message_repeats_a_text_of_any_length(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text.format(long="x" * 300_000))
    with pytest.raises(ConfigError) as caught:  # if not here, the text itself comes in a later message
        read_study(tmp_path / "c.yaml")
    assert len(str(caught.value)) < 5000


def test_changes_by_text_reach_nested_keys_and_entries_of_lists():
    data = {"images": {"count": 5}, "models": [{"name": "a"}, {"name": "b"}], "layers": None}
    changed = with_changes(data, ["images.count=7", "models.1.name=c", "layers=[x, y]", "new.key=1.5", "folder=/a/b=c"])
    assert changed == {
        "images": {"count": 7}, "models": [{"name": "a"}, {"name": "c"}], "layers": ["x", "y"], "new": {"key": 1.5},
        "folder": "/a/b=c",
    }  # fmt: skip
    assert data["images"] == {"count": 5}
    assert with_changes(data, ["images=null"])["images"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("images", "KEY=VALUE"),
        ("=5", "KEY=VALUE"),
        ("images..count=5", "KEY=VALUE"),
        ("images.count.more=5", "'more' lies within 5, which has no keys"),
        ("models.2.name=c", "'2' must be a number below 2"),
        ("models.name=c", "'name' must be a number below 2"),
        ("images={count: ", "not valid YAML"),
    ],
)
def test_changes_that_fit_nowhere_are_refused(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        with_changes({"images": {"count": 5}, "models": [{"name": "a"}, {"name": "b"}]}, [change])


def test_changes_are_checked_like_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("study: pairs\nmodels: [{source: timm:test_resnet, weights: null}]\nimages: {source: digits}\n")
    assert read_study(file, changes=["images.count=7"]).images.count == 7
    with pytest.raises(ConfigError, match=r"images\.cuont: unknown key; nearest: 'count'"):
        read_study(file, changes=["images.cuont=7"])
