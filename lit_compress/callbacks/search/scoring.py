"""Score networks by the user's validation metric, batch by batch on examples in memory."""

from __future__ import annotations

import difflib
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lit_compress.callbacks.lightning.loader_states import fresh_loaders
from lit_compress.callbacks.lightning.processes import agreed, summed
from lit_compress.callbacks.lightning.resident_validation import ResidentValidation, ValidationBatch
from lit_compress.callbacks.lightning.training_sample import beside, on_device
from lit_compress.search.evaluation import GiveUp, Mode, Scored
from lit_compress.search.precision import lower_precision_pays
from lit_compress.search.settings import ScoringSettings

__all__ = ["ResidentScore", "chosen_metric", "scoring_batches"]

_LESS_IS_BETTER = ("loss", "error", "perplexity", "mae", "mse")
_SEED = 0
_BATCH_SIZE = 125
_MOST_BATCHES = 64


class ResidentScore:
    """Scores a network by the user's ``validation_step``.

    In several processes each one looks at its share of the examples, and all come to the same
    score: sums are added up after each batch. Where one of them fails, all do.

    Args:
        trainer: The Trainer.
        validation: The user's validation on resident batches.
        metric: The name of the metric, as it is in ``trainer.callback_metrics``.
        num_batches: Batches there are; the same in all processes.
        in_bf16: Whether to run in bfloat16, whatever the Trainer's precision.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        validation: ResidentValidation,
        metric: str,
        num_batches: int,
        in_bf16: bool = False,
    ) -> None:
        self._trainer = trainer
        self._validation = validation
        self._metric = metric
        self._num_batches = num_batches
        self.in_bf16 = in_bf16

    def __call__(self, network: nn.Module, give_up: GiveUp | None = None) -> Scored:
        """Score a network; where ``give_up`` says so, by the batches so far."""
        running: list[float] = []
        seen: list[int] = []
        examples, given_up = 0, False

        def after(metrics: Mapping[str, float], batch: ValidationBatch) -> bool:
            nonlocal examples, given_up
            if self._metric not in metrics:  # it is logged when the epoch ends
                return False
            examples += extract_batch_size(batch.content)
            value, count = self._of_all_processes(metrics[self._metric], examples)
            running.append(value)
            seen.append(count)
            is_last = len(running) >= self._num_batches
            given_up = give_up is not None and not is_last and give_up(running, seen)
            return given_up

        device = self._trainer.strategy.root_device.type
        bf16 = torch.autocast(device, torch.bfloat16) if self.in_bf16 else nullcontext()
        try:
            with bf16:
                values = self._validation(_channels_last(network), after)
            if self._metric not in values:
                raise MisconfigurationException(
                    f"the validation of a candidate did not log {self._metric!r}; it logged "
                    f"{', '.join(map(repr, values)) or 'nothing'}."
                )
        except _FailedElsewhere:
            raise
        except Exception:
            self._of_all_processes(math.nan, 0, failed=True)
            raise
        value, _ = self._of_all_processes(values[self._metric], 1)
        if running:
            return Scored(running[-1], tuple(running), tuple(seen), complete=not given_up)
        return Scored(value)

    def agrees_in_bf16(self, networks: Sequence[nn.Module]) -> bool:
        """Whether bfloat16 is faster here and ranks a few networks as the Trainer's precision does.

        Args:
            networks: Networks of different worth; nearly equal ones may change places.
        """
        seconds = {False: 0.0, True: 0.0}
        scores: dict[bool, list[float]] = {False: [], True: []}
        for network, in_bf16 in itertools.product(networks, (False, True)):
            self.in_bf16, began = in_bf16, time.perf_counter()
            scores[in_bf16].append(self(network, _after_some_batches).value)
            seconds[in_bf16] += time.perf_counter() - began
        self.in_bf16 = False
        pays = lower_precision_pays(scores[False], scores[True], seconds[False], seconds[True])
        return agreed(self._trainer, pays)

    def _of_all_processes(
        self, value: float, examples: int, failed: bool = False
    ) -> tuple[float, int]:
        """The mean over processes by examples, and the examples of all.

        Raises:
            _FailedElsewhere: If another process failed and this one did not.
        """
        if self._trainer.world_size == 1:
            return value, examples
        sums = torch.tensor([value * examples, examples, failed], dtype=torch.float64)
        total = summed(self._trainer, sums)
        if total[2] and not failed:
            raise _FailedElsewhere("the validation failed in another process")
        return float(total[0] / total[1]), int(total[1])


class _FailedElsewhere(RuntimeError):
    """What a process raises that waited for one whose validation failed."""


def _after_some_batches(running: Sequence[float], num_examples: Sequence[int]) -> bool:
    return num_examples[-1] >= 1000


def _channels_last(network: nn.Module) -> nn.Module:
    """In the memory format that convolutions are fastest in; values stay as they are."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


# --- The metric -----------------------------------------------------------------------------------


def chosen_metric(
    metric: str | None, mode: Mode | None, names: Sequence[str], option: str = "metric"
) -> tuple[str, Mode]:
    """The metric to go by, and whether more of it is better.

    Args:
        metric: Its name, or ``None`` for a likely one: top-1 or accuracy, or the only one.
        mode: ``None``: told by the name.
        names: What the validation logs.
        option: What the user calls the argument, for messages.

    Raises:
        ValueError: If nothing is logged, the metric is not among what is, or it is not clear which.
    """
    if not names:
        raise ValueError(
            "validation_step logs nothing; have it log the metric that is to be gone by, as in "
            "self.log('val_acc', accuracy)."
        )
    listed = ", ".join(map(repr, names))
    if metric is None:
        likely = [n for key in ("top1", "acc") for n in names if key in n.lower()]
        if not likely and len(names) > 1:
            raise ValueError(f"{option} is needed: it is one of the metrics logged, {listed}.")
        metric = (likely or list(names))[0]
    if metric not in names:
        near = difflib.get_close_matches(metric, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{option} {metric!r} is not logged by the validation; what is: {listed}.{hint}"
        )
    if mode is None:
        mode = "min" if any(word in metric.lower() for word in _LESS_IS_BETTER) else "max"
    return metric, mode


# --- The examples ---------------------------------------------------------------------------------


def scoring_batches(
    trainer: pl.Trainer, settings: ScoringSettings, num_skipped: int
) -> list[ValidationBatch]:
    """The examples that candidates are scored on, on their device.

    Where batches are trees of tensors with one row an example, examples are mixed and packed into
    batches of equal size, so that each of these is a fair sample of all; else batches stay as the
    loader gives them, in random order.

    Args:
        trainer: A Trainer in ``on_fit_start``.
        settings: Which examples, and how many.
        num_skipped: Training batches that calibration has taken.

    Raises:
        MisconfigurationException: If there is no ``validation_step``, or no such data.
    """
    module = trainer.lightning_module
    if not is_overridden("validation_step", module):
        raise MisconfigurationException(
            f"{type(module).__name__} has no validation_step, and its metric is what candidates "
            "are scored by; add one that logs it."
        )
    with isolate_rng():
        torch.manual_seed(_SEED)
        found = _validation_data(trainer) if settings.split == "val" else None
        if found is None:
            found = _training_data(trainer, settings.num_examples, num_skipped)
    if not found:
        what = "validation" if settings.split == "val" else "training"
        raise MisconfigurationException(
            f"the {what} data have no batch to score candidates on"
            + (f" beside the {num_skipped} for calibration" if what == "training" else "")
            + "; give a loader with examples, or fewer calibration batches."
        )
    own_share = -(-settings.num_examples // trainer.world_size)
    batches = _mixed(found, own_share) or _shuffled(found, own_share)
    if trainer.world_size > 1:
        count = torch.tensor([len(batches)], device=trainer.strategy.root_device)
        least = trainer.strategy.reduce(-count, reduce_op="max")
        batches = batches[: -int(torch.as_tensor(least).item())]
    return batches


def _validation_data(trainer: pl.Trainer) -> list[ValidationBatch]:
    loop = trainer.fit_loop.epoch_loop.val_loop
    if not loop._data_source.is_defined():
        return []
    loop.setup_data()
    if loop._combined_loader is None or loop.skip:
        return []
    combined = CombinedLoader(
        tree_map(beside, loop._combined_loader.iterables), loop._combined_loader._mode
    )
    combined.limits = loop.max_batches
    iter(combined)
    return [
        ValidationBatch(on_device(trainer, batch, loader), index, loader)
        for batch, index, loader in combined
    ]


def _training_data(
    trainer: pl.Trainer, num_examples: int, num_skipped: int
) -> list[ValidationBatch]:
    combined, loaders = fresh_loaders(trainer)
    if combined is None:
        return []
    stream = CombinedLoader(tree_map(beside, loaders), combined._mode)
    batches: list[ValidationBatch] = []
    seen = 0
    for item in itertools.islice(iter(stream), num_skipped, None):
        batches.append(ValidationBatch(on_device(trainer, item[0]), len(batches)))
        seen += extract_batch_size(item[0])
        if seen * trainer.world_size >= num_examples or trainer.fast_dev_run:  # type: ignore[attr-defined]
            break
    return batches


def _mixed(found: Sequence[ValidationBatch], num_examples: int) -> list[ValidationBatch]:
    """Examples of all batches shuffled and packed again; empty where they are of another kind."""
    if len({batch.loader for batch in found}) > 1:
        return []
    flat = [tree_flatten(batch.content) for batch in found]
    leaves, spec = flat[0]
    for other, other_spec in flat:
        if other_spec != spec or not all(isinstance(x, Tensor) and x.dim() for x in other):
            return []
        if len({len(x) for x in other}) != 1 or not all(
            a.shape[1:] == b.shape[1:] for a, b in zip(leaves, other, strict=True)
        ):
            return []
    if not leaves:
        return []
    columns = [torch.cat([other[i] for other, _ in flat]) for i in range(len(leaves))]
    order = torch.randperm(len(columns[0]), generator=torch.Generator().manual_seed(_SEED))
    order = order[:num_examples].to(columns[0].device)
    size = max(_BATCH_SIZE, -(-len(order) // _MOST_BATCHES))
    batches = []
    for index, rows in enumerate(torch.split(order, size)):
        parts = [_fast_format(column[rows]) for column in columns]
        batches.append(ValidationBatch(tree_unflatten(parts, spec), index, found[0].loader))
    return batches


def _shuffled(found: Sequence[ValidationBatch], num_examples: int) -> list[ValidationBatch]:
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(_SEED)).tolist()
    batches, seen = [], 0
    for index in order:
        batches.append(found[index])
        seen += extract_batch_size(found[index].content)
        if seen >= num_examples:
            break
    return sorted(batches, key=lambda batch: batch.loader)


def _fast_format(tensor: Tensor) -> Tensor:
    if tensor.dim() == 4 and tensor.is_floating_point():
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor
