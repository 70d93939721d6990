"""The callback of transformers with its own trainer and reporters."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rsm_probe import RsmStore
from rsm_probe.errors import ConfigError, LayerError
from tests.integrations.watched_net import LAYERS, examples, images, watched_net

pytest.importorskip("accelerate")

from transformers import Trainer, TrainerCallback, TrainingArguments

from rsm_probe.integrations.transformers import RsmTrainerCallback


class Reporter(TrainerCallback):
    """What Weights & Biases and other reporters get."""

    def __init__(self):
        self.calls: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args, state, control, logs=None, **_):
        self.calls.append((state.global_step, dict(logs)))


def trainer_in(folder: Path, callbacks: list, **options) -> Trainer:
    settings = {"max_steps": 7, "logging_steps": 1, "report_to": "none", "save_strategy": "no", **options}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, learning_rate=0.1, optim="sgd",
        seed=0, **settings,
    )  # fmt: skip
    return Trainer(watched_net(), arguments, train_dataset=examples(), eval_dataset=examples(), callbacks=callbacks)


def watching(**options) -> RsmTrainerCallback:
    return RsmTrainerCallback(images(), **{"every": 3, "layers": LAYERS, **options})


def own(history: list[dict]) -> list[dict]:
    """What the trainer logs by itself, without times."""
    timed = ("runtime", "per_second")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timed)}
        for entry in history
        if "rsm/seconds" not in entry
    ]


@pytest.mark.parametrize(
    "options", [{"logging_steps": 3}, {"gradient_accumulation_steps": 2, "max_steps": 4, "bf16": True}]
)
def test_training_is_the_same_to_the_bit(tmp_path, options):
    alone = trainer_in(tmp_path, [], **options)
    alone.train()
    callback = watching(every=1, out=tmp_path / "rsms")
    watched = trainer_in(tmp_path, [], **options)
    callback.add_to(watched)
    watched.train()
    assert own(alone.state.log_history) == own(watched.state.log_history)
    assert any("loss" in entry for entry in own(watched.state.log_history))
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name
    assert callback.steps == [*range(options.get("max_steps", 7) + 1)]
    assert RsmStore.open(tmp_path / "rsms").models == [f"model@{step}" for step in callback.steps]


def test_numbers_reach_tensorboard_and_reporters_at_their_steps(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    reporter = Reporter()
    trainer = trainer_in(tmp_path, [reporter], report_to="tensorboard")
    assert watching().add_to(trainer) in trainer.callback_handler.callbacks
    trainer.train()
    (file,) = (tmp_path / "tb").glob("events*")
    events = EventAccumulator(str(file))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/rsm/cka_first/optimal/layer1")]
    assert [step for step, _ in logged] == [0, 3, 6, 7]
    history = [
        (entry["step"], pytest.approx(entry["rsm/cka_first/optimal/layer1"]))
        for entry in trainer.state.log_history
        if "rsm/cka_first/optimal/layer1" in entry
    ]
    assert logged == history
    assert [step for step, logs in reporter.calls if "rsm/cka_first/optimal/layer1" in logs] == [0, 3, 6, 7]
    assert "4 recordings of RSMs took" in capsys.readouterr().err


def test_a_callback_that_is_not_added_to_the_trainer(tmp_path):
    pytest.importorskip("tensorboard")
    with pytest.raises(ConfigError, match=r"reach tensorboard.*add_to\(trainer\)"):
        trainer_in(tmp_path, [watching()], report_to="tensorboard").train()
    callback = watching()
    trainer = trainer_in(tmp_path, [callback])
    trainer.train()  # nobody reports: the history is all there is
    assert [entry["step"] for entry in trainer.state.log_history if "rsm/seconds" in entry] == [0, 3, 6, 7]
    # Both ways at once is once.
    callback = watching()
    trainer = trainer_in(tmp_path, [callback])
    callback.add_to(trainer)
    assert trainer.callback_handler.callbacks.count(callback) == 1


class Stop(TrainerCallback):
    """Stops when an evaluation says so, as early stopping does."""

    def on_evaluate(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= 4


@pytest.mark.parametrize("watch_first", [True, False])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_last_step_is_recorded_where_training_stops_early(tmp_path, strategy, watch_first):
    callback, reporter = watching(every=100), Reporter()
    trainer = trainer_in(tmp_path, [reporter], max_steps=40, eval_strategy=strategy, eval_steps=2)
    for added in (callback, Stop()) if watch_first else (Stop(), callback):
        trainer.add_callback(added)
    callback.add_to(trainer)
    trainer.train()
    last = trainer.state.global_step
    assert last in (4, 6)
    assert callback.steps == [0, last]
    assert [step for step, logs in reporter.calls if "rsm/seconds" in logs] == [0, last]
    trainer.evaluate()  # after training
    assert callback.steps == [0, last]


def test_the_best_weights_are_not_taken_for_those_of_the_last_step(tmp_path):
    callback = watching(every=100)
    trainer = trainer_in(
        tmp_path, [], max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    callback.add_to(trainer)
    trainer.train()
    assert callback.steps == [0, 4]


def test_training_goes_on_without_a_lost_layer(tmp_path):
    class Cut(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            if state.global_step == 4:
                model.layer1 = model.layer1[0]

    callback = watching(layers=["stem", "layer1.1"])
    trainer = trainer_in(tmp_path, [Cut()])
    callback.add_to(trainer)
    with pytest.warns(UserWarning, match=r"step 6 failed: .*layer1\.1"):
        trainer.train()
    assert trainer.state.global_step == 7
    assert callback.steps == [0, 3]
    trainer = trainer_in(tmp_path, [])
    watching(layers="layer9").add_to(trainer)
    with pytest.raises(LayerError, match=r"step 0 failed: .*'layer9'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_missing_library_is_named_with_its_extra():
    code = """
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import rsm_probe.integrations
from rsm_probe.integrations import TrainingWatch
assert not {"lightning", "transformers"} & sys.modules.keys()
from rsm_probe import RsmStore
from rsm_probe.errors import ConfigError
try:
    rsm_probe.integrations.RsmCallback
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'rsm-probe[lightning]'" in done.stdout


SCRIPT = """
import sys, torch
from transformers import Trainer, TrainingArguments
from tests.integrations.watched_net import LAYERS, examples, images, watched_net
from rsm_probe.integrations import RsmTrainerCallback
arguments = TrainingArguments(
    sys.argv[1], per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, learning_rate=0.1, optim="sgd", seed=0,
    max_steps=3, report_to="none", save_strategy="no",
)
states = []
for watched in (False, True):
    trainer = Trainer(watched_net(), arguments, train_dataset=examples())
    callback = RsmTrainerCallback(images(), layers=LAYERS, every=1)
    if watched:
        callback.add_to(trainer)
    trainer.train()
    states.append(trainer.model.state_dict())
assert torch.distributed.get_world_size() == 2
assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
assert callback.steps == ([0, 1, 2, 3] if torch.distributed.get_rank() == 0 else []), callback.steps
"""


@pytest.mark.slow
def test_of_two_processes_one_records(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    subprocess.run([sys.executable, *command, str(tmp_path / "train.py"), str(tmp_path)], check=True, timeout=300)
