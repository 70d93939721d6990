"""`RsmCallback`: records RSMs during `lightning.pytorch.Trainer.fit`, and logs to the trainer's loggers."""

from __future__ import annotations

from typing import Any

from rsm_probe.checks import listed
from rsm_probe.errors import ConfigError
from rsm_probe.integrations.training_watch import TrainingWatch
from rsm_probe.integrations.undisturbed import require_unsharded

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ConfigError(
        f"the callback for Lightning needs the package lightning ({error}); pip install 'rsm-probe[lightning]'"
    ) from error


class RsmCallback(TrainingWatch, Callback):
    """Records RSMs before the first training step, every `every` optimizer steps, and after the last.

    The numbers go to all loggers of the trainer, at the number of optimizer steps; for their names, see
    `TrainingWatch.record`. At the end, the time that recordings took is printed.

    With several processes, the first one records and the others wait for it. `torch.compile` and DDP are unwrapped;
    models that are sharded (FSDP, DeepSpeed ZeRO-3, tensor parallelism) are refused when training starts. A
    LightningModule without a `forward` of its own needs `part=`, the attribute that holds the network.

    Example::

        callback = RsmCallback(images, every=500, part="net", layers="blocks")
        lightning.Trainer(callbacks=[callback], max_steps=10_000).fit(module, loader)

    Arguments, attributes and errors are those of `TrainingWatch`.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record before the first step.

        Raises:
            ConfigError: the module has no forward of its own, and no `part` is named.
            ModelError: the model is sharded over processes.
        """
        if self.calls_the_module and type(pl_module).forward is LightningModule.forward:
            parts = listed([repr(name) for name, _ in pl_module.named_children()])
            raise ConfigError(
                f"{type(pl_module).__name__} has no forward of its own, which a recording could call; name the network "
                f"by part= (its parts: {parts}), or give method= or forward="
            )
        if (model := trainer.strategy.model) is not None:
            require_unsharded(model)
        self._log(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record if the schedule asks for it; a batch whose gradients are only accumulated is not a step."""
        if self.due(trainer.global_step):
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record after the last step, and print what recordings cost."""
        if self._seen != trainer.global_step:
            self._log(trainer, pl_module)
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the model."""
        self._finish()

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if metrics := self.record(pl_module, trainer.global_step):
            for logger in trainer.loggers:
                logger.log_metrics(metrics, trainer.global_step)
