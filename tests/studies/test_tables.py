"""Tables as files: nothing in a name runs, and nothing that is damaged is read."""

import csv
import io
import json

import pytest

from rsm_probe.errors import StorageError
from rsm_probe.runs.tables import TableResult, accuracy_line, csv_text, escaped, markdown

FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "＝1", "-", "=1;=2"]


@pytest.mark.parametrize("name", FORMULAS)
def test_no_name_begins_a_formula(name):
    (line,) = csv.DictReader(io.StringIO(csv_text([{"model": name, "value": -0.5}]), newline=""))
    assert line == {"model": f"'{name}", "value": "-0.5"}


@pytest.mark.parametrize(
    "value", [-0.5, -3, 1e-300, float("nan"), float("-inf"), True, "-0.5", "+7", "net-1", "a=b", ""]
)
def test_numbers_and_plain_names_stay_as_they_are(value):
    (line,) = csv.DictReader(io.StringIO(csv_text([{"x": value, "=y": 0}])))
    assert line == {"x": str(value), "'=y": "0"}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("[x](javascript:alert(1))", r"[x\](javascript:alert(1))"),
        ("![x](http://a/b.png)", r"![x\](http://a/b.png)"),
        ("a|b", r"a\|b"),
        ("`code`", r"\`code\`"),
        ("two\nlines\r\n# title", "two lines  # title"),
        ("**bold** _slanted_", r"\*\*bold\*\* \_slanted\_"),
        ("$x$ &lt; ~~y~~", r"\$x\$ &amp;lt; \~\~y\~\~"),
        ("layer1.0.conv_2", "layer1.0.conv_2"),
        ("\u2028\x1b[31mred", "  [31mred"),
    ],
)
def test_names_are_shown_letter_by_letter(name, shown):
    assert escaped(name) == shown
    assert markdown(["model", name], [[name, 0.5]]) == f"| model | {shown} |\n| --- | ---: |\n| {shown} | 0.500 |\n"
    assert f" {shown} 0.50." in accuracy_line({name: 0.5})


def test_numbers_with_intervals_stay_as_they_are():
    assert "| 0.500 [-0.100, 0.700] | 0.1 to 0.9 |" in markdown(["a", "b"], [["0.500 [-0.100, 0.700]", "0.1 to 0.9"]])


@pytest.fixture
def stored(tmp_path):
    TableResult([{"a": "x", "b": 1.5}, {"a": "y", "b": float("nan")}], tmp_path).save("# report\n")
    return tmp_path / "result.json"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("1.5", "1.6"),
        lambda text: text.replace('"x"', '"z"'),
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: json.dumps({}),
        lambda text: json.dumps({"table": []}),
        lambda text: json.dumps({"table": 3}),
        lambda text: json.dumps({"table": ["a"]}),
        lambda text: json.dumps({"table": [{"a": 1}, {"b": 2}]}),
        lambda text: text.replace("{", "\udcff{", 1),
    ],
)
def test_a_damaged_result_is_not_read(stored, damage):
    stored.write_bytes(damage(stored.read_text()).encode("utf-8", "surrogateescape"))
    with pytest.raises(StorageError, match=r"result\.json is damaged; remove it and run again"):
        TableResult.open(stored.parent)
    stored.unlink()
    with pytest.raises(StorageError, match="has no finished run; run it again to continue"):
        TableResult.open(stored.parent)


def test_results_without_a_digest_are_read(stored):
    stored.write_text(json.dumps({"table": json.loads(stored.read_text())["table"]}))
    assert TableResult.open(stored.parent).only(a="x")["b"] == 1.5
