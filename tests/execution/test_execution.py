"""`Execution`: values are checked once, and public functions name them alike."""

import inspect
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, fields, is_dataclass
from importlib import import_module
from types import FunctionType

import pytest
import torch

import rsm_probe
from rsm_probe.config import Config
from rsm_probe.errors import CostError, ModelError
from rsm_probe.execution import Execution
from rsm_probe.runs.study import ModelStudy, TimedStudy
from rsm_probe.sources import digits
from rsm_probe.studies.pairs import PairsConfig
from rsm_probe.studies.sweep import SweepConfig

DEFAULTS = {field.name: field.default for field in fields(Execution)}
# Of every function, the sentences that its docstring shares with the others.
WORDS = dict(
    re.findall(r"(\w+): (.+?)(?=\n\s+\w+:|\n\n)", inspect.getdoc(Execution).split("Attributes:")[1], re.DOTALL)
)
assert WORDS.keys() == DEFAULTS.keys()


def public_functions():
    """Every function and class of every face that says how its work runs."""
    faces = ["captures", "pairs", "neighbours", "streaming", "similarity", "matching", "comparison", "studies"]
    found = {}
    for face in faces:
        module = import_module(f"rsm_probe.{face}")
        for name in module.__all__:
            value = getattr(module, name)
            if is_dataclass(value) or (isinstance(value, type) and issubclass(value, Config)):
                continue  # results and configurations hold them as they are
            if isinstance(value, FunctionType | type) and set(inspect.signature(value).parameters) & DEFAULTS.keys():
                found[name] = value
    return found


def test_the_functions_that_take_them_are_known():
    assert public_functions().keys() >= {"rsm", "all_pairs", "nearest", "sweep", "capture", "Accumulator"}


@pytest.mark.parametrize("name", public_functions())
def test_public_functions_take_them_last_in_one_order_and_with_one_default(name):
    parameters = list(inspect.signature(public_functions()[name]).parameters.values())
    own = [parameter for parameter in parameters if parameter.name in DEFAULTS]
    assert parameters[-len(own) :] == own
    assert [parameter.name for parameter in own] == [key for key in DEFAULTS if key in {p.name for p in own}]
    for parameter in own:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default == DEFAULTS[parameter.name], parameter


@pytest.mark.parametrize("name", public_functions())
def test_public_docstrings_say_the_same_words(name):
    text = " ".join(inspect.getdoc(public_functions()[name]).split())
    for key in inspect.signature(public_functions()[name]).parameters.keys() & DEFAULTS.keys():
        assert f"{key}: {' '.join(WORDS[key].split()).rstrip('.')}" in text, key


def test_no_function_hides_them():
    for value in public_functions().values():
        kinds = {parameter.kind for parameter in inspect.signature(value).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_configurations_have_the_same_fields_and_defaults():
    config = {name: field.default for name, field in SweepConfig.model_fields.items() if name in DEFAULTS}
    assert config == {key: DEFAULTS[key] for key in ("device", "workers", "memory", "max_hours")} | {"device": "auto"}
    assert not ModelStudy.model_fields.keys() & {"max_hours"}  # what is estimated has a limit
    assert TimedStudy.execution_keys >= config.keys()


class Here(SweepConfig):
    """A study that has no use for an executor."""

    on_cluster = False


def test_a_study_that_runs_here_keeps_its_limit_whatever_executor_it_is_given():
    shared = {"models": [{"source": "torchvision:resnet18"}], "images": {"source": "digits"}}
    with ThreadPoolExecutor(1) as pool:
        studies = ((Here, "sweep"), (SweepConfig, "sweep"), (PairsConfig, "pairs"))
        here, sweep, pairs = (kind.parse(shared | {"study": name}, "it").execution(pool) for kind, name in studies)
        assert (here.executor, here.max_hours) == (None, 12.0)
        assert (sweep.executor, sweep.max_hours) == (pool, 12.0)
        assert (pairs.executor, pairs.max_hours) == (pool, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, found 0"),
        ({"workers": -1}, "workers must be at least 1, found -1"),
        ({"workers": 2.5}, "workers must be a whole number, found 2.5"),
        ({"workers": True}, "workers must be a whole number, found True"),
        ({"memory": "much"}, "memory must be a number of bytes or text such as '2GB', found 'much'"),
        ({"memory": 0}, "memory must be above 0, found 0"),
        ({"memory": None}, "memory must be a number of bytes or text such as '2GB', found None"),
        ({"max_hours": 0}, r"max_hours \(None for no limit\) must be above 0, found 0"),
        ({"max_hours": "12"}, r"max_hours \(None for no limit\) must be a number, found '12'"),
        ({"max_hours": float("nan")}, r"max_hours \(None for no limit\) must be a finite number, found nan"),
        ({"executor": "threads"}, r"executor must be a concurrent\.futures\.Executor, found 'threads'"),
        ({"executor": ThreadPoolExecutor}, r"executor must be a concurrent\.futures\.Executor, found <class"),
        ({"progress": 1}, "progress must be True or False, found 1"),
        ({"progress": None}, "progress must be True or False, found None"),
    ],
    ids=str,
)
def test_values_are_refused_with_the_reason(values, message):
    with pytest.raises(CostError, match=message):
        Execution(**values)


def test_it_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Execution().workers = 2


def test_amounts_are_parsed():
    assert Execution(memory="500MB").memory_bytes == 500_000_000
    assert Execution(workers=3).worker_count == 3
    assert Execution().worker_count >= 1


def test_a_device_is_the_one_that_is_named_or_else_the_default():
    assert Execution().device_or("cpu") == torch.device("cpu")
    assert Execution("cpu").device_or("cuda:99") == torch.device("cpu")
    with pytest.raises(ModelError, match="cannot run on device 'cuda:99'"):
        Execution("cuda:99").device_or("cpu", ModelError)


def test_workers_elsewhere_look_for_their_device_themselves():
    with ThreadPoolExecutor(1) as pool:
        assert Execution(executor=pool).worker_device() == torch.device("cpu")
        assert Execution("auto", executor=pool).worker_device() == torch.device("cpu")
        assert Execution("cuda:99", executor=pool).worker_device() == torch.device("cuda:99")
        with pytest.raises(CostError, match="device must be a name such as 'auto', 'cpu' or 'cuda', found 'nope'"):
            Execution("nope", executor=pool).worker_device()
        with Execution(executor=pool).pool(3, torch.device("cpu")) as same:
            assert same is pool
    with Execution().pool(1, torch.device("cpu")) as threads:
        assert threads.submit(int, "3").result() == 3


def test_work_beyond_the_limit_is_refused_with_advice():
    Execution(max_hours=1.0).require_time(3600, "this", lambda limit: "never asked")
    Execution(max_hours=None).require_time(1e12, "this", lambda limit: "never asked")
    with pytest.raises(
        CostError,
        match=r"^this would take about 2\.0 h, above max_hours=1; do less than 3600 s, or raise max_hours \(None .*\)$",
    ):
        Execution(max_hours=1.0).require_time(7200, "this", lambda limit: f"do less than {limit:g} s")
    with ThreadPoolExecutor(1) as pool:  # how fast it is, is not known
        Execution(max_hours=1.0, executor=pool).require_time(1e12, "this", lambda limit: "never asked")


def test_nothing_is_shown_unless_asked(capfd):
    for progress in (False, True):
        execution = Execution(progress=progress)
        with execution.bar("matching", 2, "pair") as bar:
            bar.update(2)
        assert list(execution.bar("reading", 2, "tile", items="ab")) == ["a", "b"]
        execution.say("two pairs")
        shown = capfd.readouterr()
        assert not shown.out
        assert all((words in shown.err) == progress for words in ("matching", "reading", "two pairs", "2.00/2.00"))


def test_of_tokens_nothing_moves_without_a_device(monkeypatch):
    # A machine with a GPU would be asked by "auto".
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    tokens = torch.rand(3, 4, 5)
    rsm_probe.rsm(tokens)
    rsm_probe.nearest(tokens, tokens, k=1, matching="identity")


def test_warnings_point_at_the_line_that_calls_a_public_function(tmp_path):
    tokens = torch.rand(3, 4, 5)
    with pytest.warns(UserWarning, match="takes its width from the distances") as caught:
        rsm_probe.nearest(tokens, tokens, k=1, kernel="rbf")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="no preprocessing given") as caught:
        rsm_probe.capture(torch.nn.Conv2d(3, 4, 3).eval(), digits("test", size=8), [""], tmp_path / "c.zarr")
    assert caught[0].filename == __file__
