"""Run the user's validation on other networks, on batches that stay in memory.

A search evaluates hundreds of slim copies. ``Trainer.validate`` would load and decode the data each
time and cannot run inside a fit; here ``validation_step`` is called on batches recorded once, and
what it logs is reduced as Lightning reduces it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lit_compress.callbacks.lightning.method_wrapping import MethodWrapper
from lit_compress.compress.calibration import evaluation_mode
from lit_compress.compress.layers import plain_name

__all__ = [
    "ResidentValidation",
    "StopAfter",
    "ValidationBatch",
    "record_validation",
    "with_network",
]


@dataclass(frozen=True, eq=False)
class ValidationBatch:
    """One batch as ``validation_step`` gets it: decoded, on its device.

    Attributes:
        content: The batch.
        index: Its number in its loader.
        loader: The number of the loader.
    """

    content: Any
    index: int
    loader: int = 0


StopAfter: TypeAlias = Callable[[Mapping[str, float], ValidationBatch], bool]
"""Whether to end a validation after a batch, for the metrics so far."""


class ResidentValidation:
    """Validates networks in the place of a LightningModule's own; called with one, gives metrics.

    Every call works on a copy of the module, so that metrics and attributes of one evaluation do
    not reach the next. Hooks run as in ``Trainer.validate``, in evaluation and inference mode, with
    the module's precision, and with the same random numbers each time.

    Args:
        pl_module: The LightningModule.
        network: The network in it that the others take the place of, or the module itself.
        batches: What to validate on; see :func:`record_validation`. They are gone through at
            every call, and may be loaded again each time.
        trainer: The Trainer that the module's hooks see.
        several_loaders: Whether hooks are given the number of the loader; by default, if batches
            of several are there.

    Raises:
        ValueError: If there are no batches.
    """

    def __init__(
        self,
        pl_module: pl.LightningModule,
        network: nn.Module,
        batches: Iterable[ValidationBatch],
        trainer: pl.Trainer,
        several_loaders: bool | None = None,
    ) -> None:
        if not batches:
            raise ValueError(
                "the validation data are empty; expected at least one batch to evaluate on. Give a "
                "val_dataloader that holds examples, and do not limit it to 0 batches."
            )
        self._pl_module = pl_module
        self._network = network
        self._batches = batches
        self._trainer = trainer
        if several_loaders is None:
            several_loaders = len({batch.loader for batch in batches}) > 1
        self._several = several_loaders

    def __call__(self, network: nn.Module, stop_after: StopAfter | None = None) -> dict[str, float]:
        """Validate a network, which stays as it is, modes included.

        Args:
            network: Has the structure of the one it stands for, other sizes perhaps.
            stop_after: Asked after each batch, with what was logged for the epoch up to there and
                the batch; where it says so, no more batches are looked at.

        Returns:
            What was logged for the epoch, by the names it has in ``trainer.callback_metrics``.
        """
        module = self.module_with(network)
        logged = _LoggedValues()
        _reset_metrics(module)
        with (
            isolate_rng(),
            torch.inference_mode(),
            self._stage_of_trainer(),
            self._trainer.precision_plugin.val_step_context(),
            _log_replaced(module, logged),
            evaluation_mode(module),  # a fit that follows trains in the modes that it finds
        ):
            torch.manual_seed(0)
            self._run(module, logged, stop_after)
            values = logged.reduced()
        _reset_metrics(module)
        return values

    def module_with(self, network: nn.Module) -> pl.LightningModule:
        """A copy of the LightningModule around another network, to validate or train."""
        module = with_network(self._pl_module, self._network, network)
        module.trainer = self._trainer
        return module

    def _run(
        self, module: pl.LightningModule, logged: _LoggedValues, stop_after: StopAfter | None
    ) -> None:
        step = module.validation_step
        takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        module.on_validation_start()
        module.on_validation_epoch_start()
        for batch in self._batches:
            loader = (batch.loader,) if self._several else ()
            logged.begin_batch(batch, self._several)
            module.on_validation_batch_start(batch.content, batch.index, *loader)
            index = (batch.index,) if takes_index else ()
            output = step(batch.content, *index, *loader)
            module.on_validation_batch_end(output, batch.content, batch.index, *loader)
            if stop_after is not None and stop_after(logged.reduced(), batch):
                break
        logged.begin_epoch_end()
        module.on_validation_epoch_end()
        module.on_validation_end()

    @contextmanager
    def _stage_of_trainer(self) -> Iterator[None]:
        before = self._trainer.state.stage
        self._trainer.state.stage = RunningStage.VALIDATING
        try:
            yield
        finally:
            self._trainer.state.stage = before


def record_validation(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    data: pl.LightningDataModule | None = None,
) -> tuple[list[ValidationBatch], dict[str, float]]:
    """Validate once with Lightning, and keep the batches.

    Args:
        trainer: A Trainer that is not running.
        pl_module: The module, with ``validation_step``.
        data: Its data, unless it has a loader of its own.

    Returns:
        The batches, on the Trainer's device, and ``trainer.callback_metrics``.

    Raises:
        MisconfigurationException: If there is no ``validation_step`` or no data.
    """
    recorder = _Recorder()
    trainer.callbacks.append(recorder)  # type: ignore[attr-defined]
    try:
        trainer.validate(pl_module, data, verbose=False)
    finally:
        trainer.callbacks.remove(recorder)  # type: ignore[attr-defined]
    return recorder.batches, {k: float(v) for k, v in trainer.callback_metrics.items()}


def with_network(
    pl_module: pl.LightningModule, network: nn.Module, other: nn.Module
) -> pl.LightningModule:
    """A copy of a LightningModule in which one network stands for another.

    Wherever the module refers to the network or to a part of it, the copy refers to the other or
    to the part of that name.

    Args:
        pl_module: The module; without its Trainer in the copy.
        network: The network in it, or the module itself.
        other: A network of the same structure, compiled or not; not copied. Where ``network`` is
            the module itself, it is what is returned.
    """
    if network is pl_module:
        assert isinstance(other, pl.LightningModule)
        return other
    pairs = [
        (network.named_modules(), other.named_modules()),
        (network.named_parameters(), other.named_parameters()),
        (network.named_buffers(), other.named_buffers()),
    ]
    memo: dict[int, Any] = {}
    for ours, theirs in pairs:
        by_name: Mapping[str, Any] = dict(theirs)
        for name, part in ours:  # a part may be compiled here and not in the other one
            memo[id(part)] = by_name[name if name in by_name else plain_name(name)]
    copied: pl.LightningModule = copy.deepcopy(pl_module, memo)
    return copied


class _Recorder(pl.Callback):
    """Keeps the batches that it sees."""

    def __init__(self) -> None:
        self.batches: list[ValidationBatch] = []

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.batches.append(ValidationBatch(batch, batch_idx, dataloader_idx))


_LOG = inspect.signature(pl.LightningModule.log)


class _LoggedValues:
    """Stands for Lightning's result collection: mean by batch size, sum, min, max or a metric."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}
        self._sums: dict[str, tuple[str, Tensor, int]] = {}
        self._batch: Any = None
        self._suffix = ""

    def begin_batch(self, batch: ValidationBatch, several_loaders: bool) -> None:
        self._batch = batch.content
        self._suffix = f"/dataloader_idx_{batch.loader}" if several_loaders else ""

    def begin_epoch_end(self) -> None:
        self._batch, self._suffix = None, ""

    def log(self, method: Any, *args: Any, **kwargs: Any) -> None:
        """Take the place of ``LightningModule.log``."""
        given = _LOG.bind(None, *args, **kwargs)
        given.apply_defaults()
        said = given.arguments
        if said["on_epoch"] is False:
            return
        name = said["name"] + (self._suffix if said["add_dataloader_idx"] else "")
        for known in (name, f"{name}_epoch") if said["on_step"] else (name,):
            if isinstance(said["value"], Metric):
                self._metrics[known] = said["value"]
            else:
                self._add(known, said["value"], said["reduce_fx"], said["batch_size"])

    def reduced(self) -> dict[str, float]:
        """What an epoch comes to, by name."""
        values = {
            name: total / weight if how == "mean" else total
            for name, (how, total, weight) in self._sums.items()
        }
        values |= {name: metric.compute() for name, metric in self._metrics.items()}
        return {name: float(value) for name, value in values.items()}

    def _add(self, name: str, value: Any, reduce_fx: Any, batch_size: int | None) -> None:
        how = reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx.__name__
        how = "mean" if how == "avg" else how
        value = torch.as_tensor(value).detach()
        value = value if value.dtype == torch.float64 else value.float()
        weight = 1
        if how == "mean":
            if batch_size is None:
                batch_size = 1 if self._batch is None else extract_batch_size(self._batch)
            weight, value = batch_size, value * batch_size
        if name in self._sums:
            _, total, weights = self._sums[name]
            combine = {"min": torch.minimum, "max": torch.maximum}.get(how, torch.add)
            value, weight = combine(total, value), weights + weight
        self._sums[name] = (how, value, weight)


@contextmanager
def _log_replaced(module: pl.LightningModule, logged: _LoggedValues) -> Iterator[None]:
    wrapper = MethodWrapper(module, "log", logged.log)
    try:
        yield
    finally:
        wrapper.remove()


def _reset_metrics(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, Metric):
            part.reset()
