"""Wrap a LightningModule's training step so that its loss includes distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lit_compress.callbacks.distillation.objective import Objective
from lit_compress.callbacks.distillation.teacher import Teacher
from lit_compress.callbacks.lightning.method_wrapping import MethodWrapper
from lit_compress.callbacks.lightning.network_calls import NetworkCalls, is_compiled


class DistilledStep:
    """Adds the losses of an objective to those of a module, from :meth:`install` to :meth:`remove`.

    Under automatic optimization ``training_step`` is wrapped, since what it returns is neither
    divided by the accumulated batches nor scaled yet. Under manual optimization there is nothing to
    return: ``backward`` is wrapped, where Lightning hands over the loss, scaled already.

    Args:
        pl_module: The module whose steps are distilled.
        network: The student, inside of the module or the module itself.
        objective: What is added.

    Attributes:
        teacher: Nothing is added while it is ``None``.

    Raises:
        ValueError: If the objective names a layer that the network does not have.
    """

    def __init__(
        self, pl_module: LightningModule, network: nn.Module, objective: Objective
    ) -> None:
        self.teacher: Teacher | None = None
        self._module = pl_module
        self._objective = objective
        self._calls = NetworkCalls(network, objective.student_layers)
        self._wrappers: list[MethodWrapper] = []
        self._was_called = False
        self._went_backward = False

    def install(self) -> None:
        """Wrap the module's methods and watch its network."""
        self._calls.install()
        around: dict[str, Callable[..., Any]] = {"training_step": self._automatic_step}
        if not self._module.automatic_optimization:
            around = {"training_step": self._manual_step, "backward": self._manual_backward}
        self._wrappers = [MethodWrapper(self._module, name, call) for name, call in around.items()]
        if is_compiled(self._module):
            torch.compiler.reset()  # code compiled before now knows nothing of the hooks

    def remove(self) -> None:
        """Leave the module as it was."""
        while self._wrappers:
            self._wrappers.pop().remove()
        self._calls.remove()

    def _automatic_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module's step and add the distillation losses to what it returns."""
        teacher = self.teacher
        if teacher is None:
            return step(*args, **kwargs)
        with self._calls.recording():
            output = step(*args, **kwargs)
        calls = self._calls.take()
        task_loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(task_loss, Tensor):  # None skips the step; Lightning refuses the rest
            return output
        self._refuse_uncalled(bool(calls))
        losses = self._objective.losses(calls, teacher)
        self._inspect(task_loss, losses)
        total = self._objective.total(task_loss, losses)
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def _manual_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module's step, inside of which :meth:`_manual_backward` adds the losses."""
        if self.teacher is None:
            return step(*args, **kwargs)
        with self._calls.recording():
            output = step(*args, **kwargs)
        self._refuse_uncalled(bool(self._calls.take()))
        if not self._went_backward:
            raise MisconfigurationException(
                f"{type(self._module).__name__}.training_step optimizes manually and did not call "
                "manual_backward, so there is no loss to add the distillation loss to. Call "
                "self.manual_backward(loss) instead of loss.backward()."
            )
        return output

    def _manual_backward(
        self, backward: Callable[..., None], loss: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """Add the distillation losses to the loss on its way into ``backward``."""
        calls = self._calls.take()
        teacher = self.teacher
        if teacher is None or not self._calls.is_recording():
            backward(loss, *args, **kwargs)
            return
        self._went_backward = True
        with self._calls.recording(armed=False):  # checkpointed layers run again in backward
            if calls:
                self._was_called = True
                scaler = getattr(self._module.trainer.precision_plugin, "scaler", None)
                losses = self._objective.losses(calls, teacher)
                self._inspect(loss, losses, scaler)
                scale = (lambda loss: loss) if scaler is None else scaler.scale
                loss = self._objective.total(loss, losses, scale)
            backward(loss, *args, **kwargs)

    def _refuse_uncalled(self, called: bool) -> None:
        """Only the first step tells: later ones may leave the network out on purpose."""
        self._was_called |= called
        if self._was_called:
            return
        name = type(self._module).__name__
        children = [
            repr(child)
            for child, module in self._module.named_children()
            if next(module.parameters(), None) is not None
        ]
        raise MisconfigurationException(
            f"{name}.training_step did not call {self._calls.description} with gradients enabled, "
            f"so there is nothing to distil. Name the network it calls with student=: "
            f"{', '.join(children) or 'one of its modules'}, or '' for the module's own forward "
            "when it is called as self(...)."
        )

    def _inspect(
        self, task_loss: Tensor, losses: Mapping[str, Tensor], scaler: Any | None = None
    ) -> None:
        """Refuse NaN while the weights are still good, and log."""
        trainer = self._module.trainer
        shown = {"task_loss": task_loss.detach()}
        shown |= {name: loss.detach() for name, loss in losses.items()}
        # One transfer from the device for all of them.
        is_nan = torch.stack([loss.isnan().any() for loss in shown.values()]).tolist()
        if any(is_nan):
            names = " and ".join(name for name, bad in zip(shown, is_nan, strict=True) if bad)
            raise ValueError(
                f"In the training step after {trainer.global_step} optimizer steps {names} is NaN, "
                "expected a number; no weight was changed by it. A task_loss points to the "
                "learning rate or the data, a logits_loss alone to the teacher's weights or an "
                "overflow in half precision (precision='bf16-mixed' has the range of float32)."
            )
        if trainer.loggers and trainer._logger_connector.should_update_logs:
            if scaler is not None:
                shown["task_loss"] = shown["task_loss"] / scaler.get_scale()
            for name, loss in shown.items():
                self._module.log(f"distillation/{name}", loss, on_step=True, on_epoch=False)
