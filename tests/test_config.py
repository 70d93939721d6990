"""Configurations: what is wrong is said with its place and the nearest valid key."""

from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field, PositiveInt, ValidationError

import rsm_probe
from rsm_probe.config import Config, read_yaml
from rsm_probe.errors import ConfigError
from rsm_probe.sources.training import TrainingConfig
from rsm_probe.studies.registry import STUDIES
from rsm_probe.studies.sweep_study import SweepConfig


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
    with pytest.raises(ConfigError, match=r"(?s)c.yaml is no valid YAML: .*line \d"):
        read_yaml(tmp_path / "c.yaml")


def test_yaml_cannot_run_code(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "c.yaml").write_text(f'a: !!python/object/apply:os.system ["touch {mark}"]\n')
    with pytest.raises(ConfigError, match=r"c.yaml is no valid YAML"):
        read_yaml(tmp_path / "c.yaml")
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


def test_configurations_that_come_with_the_project_are_valid(monkeypatch):
    root = Path(rsm_probe.__file__).parent.parent
    monkeypatch.chdir(root)  # some name others, as seen from there
    files = sorted((root / "configs").glob("*.yaml"))
    assert files
    for file in files:
        data = read_yaml(file)
        config = STUDIES[data["study"]] if "study" in data else TrainingConfig
        parsed = config.parse(data, str(file))
        assert config.parse(yaml.safe_load(parsed.to_yaml())) == parsed
