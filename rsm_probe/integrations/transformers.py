"""`RsmTrainerCallback`: records RSMs during `transformers.Trainer.train`, and logs as the trainer does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import nn

from rsm_probe.errors import ConfigError
from rsm_probe.integrations.training_watch import TrainingWatch

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ConfigError(
        f"the callback for transformers cannot import its Trainer ({error}); pip install 'rsm-probe[trainer]'"
    ) from error


class RsmTrainerCallback(TrainingWatch, TrainerCallback):
    """Records RSMs before the first training step, every `every` optimizer steps, and after the last.

    The numbers go through `Trainer.log` to the log history and to all reporters of the trainer (`report_to=`:
    TensorBoard, Weights & Biases and others); for their names, see `TrainingWatch.record`. Reporters put "train/" in
    front. As a trainer does not show itself to its callbacks, add this one by `add_to(trainer)`. At the end, the time
    that recordings took is printed.

    With several processes, the first one records and the others wait for it. Wrappers of data parallelism and
    `torch.compile` are taken off; models that are sharded (FSDP, DeepSpeed ZeRO-3) are refused when training starts.

    Example::

        trainer = Trainer(model, TrainingArguments("runs", report_to="tensorboard"), train_dataset=...)
        RsmTrainerCallback(images, every=500, layers="blocks").add_to(trainer)
        trainer.train()

    Arguments, attributes and errors are those of `TrainingWatch`.
    """

    _trainer_log: Callable[[dict[str, float]], None] | None = None
    _in_training = False

    def add_to(self, trainer: Trainer) -> Self:
        """Add the callback to a trainer, unless `callbacks=` holds it already, and log by its `log`."""
        if not any(callback is self for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        self._trainer_log = trainer.log
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Record before the first step.

        Raises:
            ConfigError: there are reporters, which `add_to` would have reached.
        """
        if self._trainer_log is None and args.report_to:
            raise ConfigError(
                f"the numbers of {type(self).__name__} would not reach {', '.join(args.report_to)}: a trainer does not "
                f"show itself to its callbacks; call callback.add_to(trainer) before trainer.train(), instead of or "
                f"beside Trainer(callbacks=[callback])"
            )
        self._in_training = True
        self._log(state, control, model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Record if the schedule asks for it, or after the last step."""
        if self.due(state.global_step) or control.should_training_stop:
            self._log(state, control, model)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Record after the last step, if an evaluation has decided that training stops."""
        if self._in_training and control.should_training_stop and self._seen != state.global_step:
            self._log(state, control, model)

    on_epoch_end = on_evaluate

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Record after the last step unless that is done, and print what recordings cost."""
        # The best weights, where the trainer has loaded them again, are not those of the last step.
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if self._seen != state.global_step and not best:
            self._log(state, control, model)
        self._in_training = False
        self._finish()

    def _log(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        if not state.is_world_process_zero or not (metrics := self.record(model, state.global_step)):
            return
        if self._trainer_log is None:
            state.log_history.append({**metrics, "epoch": state.epoch, "step": state.global_step})
            return
        # The trainer takes its loss for logged once anything is logged.
        should_log = control.should_log
        self._trainer_log(metrics)
        control.should_log = should_log
