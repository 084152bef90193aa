"""Distillation, the callback that trains a LightningModule to follow a teacher."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from torch import nn

from lit_compress.callbacks.base import CompressionCallback
from lit_compress.callbacks.distillation.distilled_step import DistilledStep
from lit_compress.callbacks.distillation.objective import (
    FeatureMatching,
    LogitsLoss,
    Objective,
)
from lit_compress.callbacks.distillation.teacher import (
    Teacher,
    TeacherFile,
    copy_network,
    digest,
    read_remote,
)
from lit_compress.callbacks.lightning.network_calls import find_network
from lit_compress.callbacks.lightning.run_clock import ScheduleClock
from lit_compress.compress.quantization.network import without_quantizers
from lit_compress.compress.schedules import Moment, Schedule, Unit, check_moment, check_unit
from lit_compress.compress.weight_files import load_checkpoint, read_checkpoint

__all__ = ["Distillation", "FeatureMatching"]

_OTHER_ARCHITECTURE = (
    "Give a file of the same architecture, or the teacher itself with teacher= when it has another "
    "architecture than the student."
)


class Distillation(CompressionCallback):
    r"""Adds a distillation loss to the training loss of an unmodified LightningModule.

    .. math:: L = w_{task} L_{task} + w_{distill} L_{logits} + w_{features} L_{features}

    :math:`L_{task}` is what ``training_step`` returns, or what it hands to ``manual_backward``. The
    callback watches the calls of the student's network inside ``training_step``, asks the teacher
    the same, and compares the answers; with several calls in a step, their losses are averaged.
    The teacher is frozen, in eval mode, on the module's device, and in no checkpoint, optimizer or
    parameter count.

    Works with automatic and manual optimization, mixed and true half precision, accumulated
    gradients, DDP and ``torch.compile``. Under manual optimization the loss is added at each
    ``manual_backward`` for the network's calls since the one before, undivided by whatever the
    module divides its own loss by.

    A snapshot is written once beside the checkpoints, as ``distillation-teacher-<digest>.pt``, a
    plain state dict; the checkpoints hold its digest. A resumed run looks for it beside the
    checkpoint, then where it was written.

    Logs ``distillation/task_loss``, ``distillation/logits_loss`` and
    ``distillation/feature_loss``, unweighted, where the Trainer has a logger.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).

    Args:
        teacher: A module that takes the same input as the student's network. By default a copy of
            that network: with the weights from ``checkpoint``, or else as it is at ``begin`` (a
            snapshot).
        checkpoint: Weights for the teacher: a Lightning checkpoint or a state dict, loaded with
            ``weights_only=True``. A prefix such as ``model.`` is stripped.
        student: Dotted name, inside the LightningModule, of the network that is distilled; ``""``
            for the module's own ``forward``. By default the only child that holds all parameters,
            or else the module's own ``forward``. Its output must be a tensor, a tuple that begins
            with one, a mapping with the key ``logits`` or an object with that attribute.
        temperature: Softens both predictions, in (0, inf).
        loss: ``"kl"``, with the factor of the squared temperature, or ``"soft_cross_entropy"``
            (PocketFlow's form, without it).
        task_loss_weight: Weight of the module's own loss, in [0, inf).
        distill_loss_weight: Weight of the loss on logits, in [0, inf); 0 leaves the logits alone,
            so that the two networks may differ in their classes.
        features: Layers whose outputs are matched too.
        begin: When distillation begins: a float is a fraction of the run, in [0, 1], an int a
            number of ``unit``. Until then the module trains as if by itself.
        unit: What a whole number in ``begin`` counts: ``"step"`` (optimizer steps; under manual
            optimization, training batches) or ``"epoch"``.

    Raises:
        ValueError: If an argument is out of range, a name is no layer, a file does not fit, teacher
            and student answer in different shapes, or a loss is NaN (before any weight changes).
        FileNotFoundError: If ``checkpoint``, or the snapshot of a run that is resumed, is missing.
        MisconfigurationException: If the strategy shards the weights, the student's network or
            ``manual_backward`` is never called, the teacher shares memory with the module, or a
            callback that changes weights comes before one that takes a snapshot.

    Example:
        >>> callback = Distillation(temperature=2.0, begin=0.5)  # a snapshot at half time
        >>> callback.objective.temperature
        2.0
    """

    changes_weights = False

    def __init__(
        self,
        teacher: nn.Module | None = None,
        checkpoint: str | Path | None = None,
        student: str | None = None,
        temperature: float = 4.0,
        loss: LogitsLoss = "kl",
        task_loss_weight: float = 1.0,
        distill_loss_weight: float = 1.0,
        features: FeatureMatching | None = None,
        begin: Moment = 0,
        unit: Unit = "step",
    ) -> None:
        super().__init__()
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise ValueError(
                f"teacher is a {type(teacher).__name__}, expected a torch.nn.Module. "
                "Give a path to weights as checkpoint=."
            )
        check_unit(unit)
        check_moment("begin", begin, unit=unit)
        self.objective = Objective(
            temperature, loss, task_loss_weight, distill_loss_weight, features
        )
        # Modules are held in lists, where nobody takes them for a part of the LightningModule.
        self._given = [] if teacher is None else [teacher]
        self.checkpoint = checkpoint
        self.student = student
        self.schedule = Schedule.at(begin, unit)

        self._teachers: list[Teacher] = []  # at most one
        self._snapshot: TeacherFile | None = None
        self._directories: list[str] = []  # where the snapshot is still to be written
        self._clock = ScheduleClock(self.schedule, type(self).__name__)
        self._step: DistilledStep | None = None  # during a fit

    @property
    def state_key(self) -> str:
        """Tells several distillations in one Trainer apart."""
        teacher = type(self._given[0]).__name__ if self._given else None
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        return self._generate_state_key(
            student=self.student, teacher=teacher, checkpoint=checkpoint
        )

    # --- The run ----------------------------------------------------------------------------------

    def check_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a snapshot that would come after the first change of the weights."""
        super().check_run(trainer, pl_module)
        if self._takes_snapshot and self.schedule.begin > 0:
            _check_unchanged_weights(trainer, self)
        if trainer.global_step == 0:  # else the same run goes on, with the same teacher
            self._teachers, self._snapshot, self._clock.ramp = [], None, None

    def start_or_resume(
        self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None
    ) -> None:
        """Find the student, get the teacher unless it is to come later, and begin to watch."""
        network = find_network(pl_module, self.student)
        self._directories = _checkpoint_directories(trainer)
        if state is not None:
            snapshot = state["snapshot"]
            self._snapshot = None if snapshot is None else TeacherFile(**snapshot)
            if self._has_moment(state) and self.is_same_run(state, "it begins as this run says."):
                self._clock.resume(state)
        if self._clock.ramp is None:  # neither resumed nor continued
            self._clock.start(trainer, "distillation")
        self._step = DistilledStep(pl_module, network, self.objective)
        if not self._takes_snapshot:
            self._adopt(self._load_teacher(network, trainer), pl_module)
        elif self._teachers:
            self._adopt(self._teachers[0].network, pl_module)
        elif self._snapshot is not None:
            self._adopt(self._restore_snapshot(self._snapshot, network, trainer), pl_module)
        if self._clock.active_ramp.begin == 0:
            self._begin(trainer, pl_module)
        self._step.install()

    def on_before_backward(self, *_: Any) -> None:
        """Nothing: the distilled step says which of its losses is NaN."""

    def release(self) -> None:
        """Leave the module as it was."""
        super().release()
        if self._step is not None:
            self._step.remove()
            self._step = None
        for teacher in self._teachers:
            teacher.remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was, and the accelerator's memory to others."""
        super().teardown(trainer, pl_module, stage)
        for teacher in self._teachers:
            teacher.network.cpu()

    # --- Checkpoints ------------------------------------------------------------------------------

    @property
    def declared(self) -> dict[str, Any]:
        """When it begins."""
        return {"begin": self.schedule.begin, "unit": self.schedule.unit}

    def fit_state(self) -> dict[str, Any] | None:
        """The moment, and the digest and the place of the snapshot's file; never the teacher."""
        if self._clock.ramp is None:
            return None
        snapshot = None if self._snapshot is None else asdict(self._snapshot)
        return {"snapshot": snapshot, **self._clock.state_dict()}

    def _has_moment(self, state: dict[str, Any]) -> bool:
        """Whether a state says when this run begins; earlier versions told ``begin`` alone."""
        if "declared" in state:
            return True
        same = state["begin"] == self.schedule.begin
        return same and self.schedule.unit == "step" and state["begin_step"] is not None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the snapshot beside the first checkpoint that needs it."""
        if self._snapshot is None or not self._teachers or not trainer.is_global_zero:
            return
        while self._directories:
            self._snapshot.write(self._teachers[0].network, self._directories[0])
            self._directories.pop(0)

    # --- The teacher ------------------------------------------------------------------------------

    @property
    def _takes_snapshot(self) -> bool:
        return not self._given and self.checkpoint is None

    def _load_teacher(self, network: nn.Module, trainer: Trainer) -> nn.Module:
        if not self._given:
            teacher = copy_network(network)
        elif isinstance(trainer.precision_plugin, (HalfPrecision, DoublePrecision)):
            teacher = trainer.precision_plugin.convert_module(self._given[0])
        else:
            teacher = self._given[0]
        if self.checkpoint is not None:
            content = read_checkpoint(self.checkpoint, read_remote)
            load_checkpoint(teacher, content, self.checkpoint, _OTHER_ARCHITECTURE)
        return teacher

    def _restore_snapshot(
        self, snapshot: TeacherFile, network: nn.Module, trainer: Trainer
    ) -> nn.Module:
        teacher = without_quantizers(copy_network(network))
        content = snapshot.read(beside=trainer.ckpt_path)
        load_checkpoint(teacher, content, snapshot.name, _OTHER_ARCHITECTURE)
        self._snapshot = TeacherFile(snapshot.sha256, self._directories[0])
        return teacher

    def _take_snapshot(self, trainer: Trainer, pl_module: LightningModule) -> None:
        teacher = without_quantizers(copy_network(find_network(pl_module, self.student)))
        if trainer.world_size > 1:  # running statistics may differ between processes
            weights = {name: value.cpu() for name, value in teacher.state_dict().items()}
            teacher.load_state_dict(trainer.strategy.broadcast(weights))
        self._adopt(teacher, pl_module)
        self._snapshot = TeacherFile(digest(teacher.state_dict()), self._directories[0])

    def _adopt(self, network: nn.Module, pl_module: LightningModule) -> None:
        teacher = Teacher(network.to(pl_module.device), self.objective.teacher_layers)
        teacher.check_shared_parameters(pl_module)
        self._teachers = [teacher]

    def follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin when it is due, before other callbacks change the weights."""
        assert self._step is not None
        now = self._clock.now(trainer, pl_module)
        if self._step.teacher is None and now >= self._clock.active_ramp.begin:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._step is not None
        if not self._teachers:
            self._take_snapshot(trainer, pl_module)
        self._step.teacher = self._teachers[0]


def _check_unchanged_weights(trainer: Trainer, callback: Callback) -> None:
    """A snapshot must see the weights before another callback changes them."""
    for earlier in trainer.callbacks:  # type: ignore[attr-defined]
        if earlier is callback:
            return
        if getattr(earlier, "changes_weights", False):
            raise MisconfigurationException(
                f"{type(earlier).__name__} changes weights and comes before Distillation, whose "
                "teacher is a snapshot of the unchanged weights. Put Distillation first in "
                "Trainer(callbacks=[...])."
            )


def _checkpoint_directories(trainer: Trainer) -> list[str]:
    """Where the Trainer's checkpoints go, the default first where nothing else is known."""
    directories = [
        os.fspath(callback.dirpath)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.dirpath
    ]
    known = dict.fromkeys(directories or [trainer.default_root_dir])
    return [path if "://" in path else os.path.abspath(path) for path in known]
