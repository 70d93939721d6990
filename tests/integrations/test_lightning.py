"""The callback of Lightning with its own trainer and loggers."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from rsm_probe import RsmStore
from rsm_probe.errors import ConfigError, LayerError, ModelError
from tests.integrations.watched_net import LAYERS, examples, images, watched_net

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402
from lightning.pytorch.loggers.logger import Logger  # noqa: E402

from rsm_probe.integrations.lightning import RsmCallback  # noqa: E402


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = watched_net()
        self.losses: list[float] = []

    def training_step(self, batch, number):
        loss = self.net(**batch)["loss"]
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Recorder(Logger):
    """What Weights & Biases and others get."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, dict(metrics)))

    def log_hyperparams(self, params):
        pass

    @property
    def rsms(self) -> list[tuple[int, dict[str, float]]]:
        return [call for call in self.calls if any(name.startswith("rsm/") for name in call[1])]


def fit(tmp_path: Path, callbacks: list, loggers: list | None = None, **options) -> Classifier:
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    settings = {"max_steps": 7, "accelerator": "cpu", "log_every_n_steps": 1, **options}
    trainer = pl.Trainer(
        default_root_dir=tmp_path, callbacks=callbacks, logger=loggers or False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader(examples(), batch_size=4, shuffle=True))
    return module


def watching(**options) -> RsmCallback:
    return RsmCallback(images(), **{"every": 3, "part": "net", "layers": LAYERS, **options})


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "max_steps": 3, "precision": "bf16-mixed"}])
def test_training_is_the_same_to_the_bit(tmp_path, options):
    logger = Recorder()
    alone = fit(tmp_path, [], [Recorder()], **options)
    callback = watching(every=1, out=tmp_path / "rsms")
    watched = fit(tmp_path, [callback], [logger], **options)
    assert alone.losses == watched.losses
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    steps = options.get("max_steps", 7)
    assert callback.steps == [*range(steps + 1)]
    assert RsmStore.open(tmp_path / "rsms").models == [f"model@{step}" for step in callback.steps]
    # Lightning's own numbers are logged as ever.
    assert sum("loss" in metrics for _, metrics in logger.calls) == steps


def test_numbers_reach_tensorboard_and_csv_at_their_steps(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv"), Recorder()]
    fit(tmp_path, [watching(reference=watched_net())], loggers)
    events = EventAccumulator(loggers[0].log_dir)
    events.Reload()
    first, last, reference = (
        [(event.step, event.value) for event in events.Scalars(f"rsm/cka_{which}/optimal/layer1")]
        for which in ("first", "last", "reference")
    )
    assert [step for step, _ in first] == [0, 3, 6, 7]
    assert [step for step, _ in last] == [3, 6, 7]
    assert first[0][1] == 1.0
    assert first[1][1] == last[0][1] < 1
    assert [value for _, value in reference] == pytest.approx([value for _, value in first])  # the untrained network
    with open(Path(loggers[1].log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["rsm/seconds"]]
    values = [float(row["rsm/cka_first/optimal/layer1"]) for row in rows]
    assert [int(row["step"]) for row in rows] == [0, 3, 6, 7]
    assert values == pytest.approx([value for _, value in first], abs=1e-6)
    assert [step for step, _ in loggers[2].rsms] == [0, 3, 6, 7]
    assert "4 recordings of RSMs took" in capsys.readouterr().err


def test_the_last_step_is_recorded_where_training_stops_early(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 4

    callback = watching()
    fit(tmp_path, [Stop(), callback])
    assert callback.steps == [0, 3, callback.steps[-1]]
    assert callback.steps[-1] in (4, 6)


def test_a_lost_layer_does_not_stop_training(tmp_path):
    class Cut(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            if trainer.global_step == 4:
                module.net.layer1 = module.net.layer1[0]

    callback, logger = watching(layers=["stem", "layer1.1"]), Recorder()
    with pytest.warns(UserWarning, match=r"step 6 failed: .*layer1\.1"):
        module = fit(tmp_path, [Cut(), callback], [logger])
    assert len(module.losses) == 7
    assert callback.steps == [0, 3]
    assert [step for step, _ in logger.rsms] == [0, 3]


def test_wrong_settings_are_refused_before_the_first_step(tmp_path):
    steps = []

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            steps.append(trainer.global_step)

    with pytest.raises(LayerError, match=r"step 0 failed: .*'layer9'"):
        fit(tmp_path, [watching(layers="layer9"), Count()])
    # A LightningModule without a forward of its own.
    with pytest.raises(ConfigError, match=r"Classifier has no forward .* part= .*: 'net'"):
        fit(tmp_path, [watching(part="", layers="net.stem"), Count()])
    assert not steps


def test_compiled_modules(tmp_path):
    pl.seed_everything(0, verbose=False)
    module, callback = Classifier(), watching(every=2)
    module.net = torch.compile(module.net, backend="eager")
    trainer = pl.Trainer(
        max_steps=3, callbacks=[callback], logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, DataLoader(examples(), batch_size=4))
    assert callback.steps == [0, 2, 3]


SCRIPT = """
import sys, torch
from pathlib import Path
from tests.integrations.test_lightning import fit, watching
options = {"strategy": "ddp", "devices": 2, "max_steps": 3}
alone = fit(Path(sys.argv[1]), [], **options)
callback = watching(every=1)
watched = fit(Path(sys.argv[1]), [callback], **options)
assert torch.distributed.get_world_size() == 2
assert alone.losses == watched.losses
assert all(torch.equal(value, watched.state_dict()[name]) for name, value in alone.state_dict().items())
assert callback.steps == ([0, 1, 2, 3] if torch.distributed.get_rank() == 0 else []), callback.steps
"""


@pytest.mark.slow
def test_of_two_processes_one_records(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    subprocess.run([sys.executable, str(tmp_path / "train.py"), str(tmp_path)], check=True, timeout=300)


def test_sharded_models_are_refused():
    class Sharded(nn.Parameter):
        ds_id = 3

    module = Classifier()
    module.net.head.weight = Sharded(module.net.head.weight.data)
    with pytest.raises(ModelError, match=r"sharded over processes by DeepSpeed ZeRO-3.*checkpoints"):
        watching().record(module, 0)
