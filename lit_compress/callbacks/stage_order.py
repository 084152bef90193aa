"""Check that compression stages follow each other in order, in one Trainer and over several."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_compress.compress.quantization.network import is_quantized
from lit_compress.compress.schedules import Ramp, Schedule

__all__ = [
    "CompressionStage",
    "Stage",
    "StageSpan",
    "check_not_quantized",
    "check_resolved_order",
    "check_stage_order",
    "span_in_steps",
]

Stage: TypeAlias = Literal["prune", "sparsify", "cluster", "quantize"]

# Cuts and masks go together in either order: masks are cut with their weights.
_PLACES: dict[Stage, int] = {"prune": 0, "sparsify": 0, "cluster": 1, "quantize": 2}
# Masks may still move while integers are trained, since zero is zero in integers, too.
_OVER_BEFORE_ROUNDING: dict[Stage, str] = {
    "prune": "channels are cut",
    "cluster": "weights are clustered",
}
_LEGAL = (
    "Order the callbacks as ChannelPruning, MagnitudeSparsity, WeightClustering, then quantization"
)


@dataclass(frozen=True)
class StageSpan:
    """From when to when a stage changes the network.

    Attributes:
        begin: A float is a fraction of the run, an int a number of steps or epochs.
        end: Likewise; not before ``begin``.
        unit: What ints count, ``"step"`` or ``"epoch"``.
    """

    begin: int | float
    end: int | float
    unit: str = "step"

    @classmethod
    def of(cls, schedule: Schedule | Ramp | None) -> StageSpan | None:
        """From the start of a schedule to its end; ``None`` of one that is not known yet."""
        return None if schedule is None else cls(schedule.begin, schedule.end, schedule.unit)


@runtime_checkable
class CompressionStage(Protocol):
    """A callback that has its place in the order."""

    compression_stage: Stage

    def stage_span(self, resolved: bool) -> StageSpan | None:
        """When it changes the network.

        Args:
            resolved: Whether to give the moments of the run that has begun, instead of those that
                were declared.

        Returns:
            ``None`` where that is not known.
        """


def check_stage_order(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse what can be known to be out of order before anything is loaded.

    To be called in the ``setup`` of a fit. Moments in different units are left to
    :func:`check_resolved_order`.

    Args:
        trainer: A Trainer in ``setup``.
        pl_module: The module.

    Raises:
        MisconfigurationException: If callbacks are listed in another order than prune or sparsify,
            cluster, quantize; a cut or the clustering comes after rounding began; or the module is
            quantized already and no callback quantizes it again.
    """
    stages = _stages(trainer)
    for earlier, later in pairwise(stages):
        if _PLACES[later.compression_stage] < _PLACES[earlier.compression_stage]:
            raise MisconfigurationException(
                f"{_name(later)} comes after {_name(earlier)}, which works on what it leaves. "
                f"{_LEGAL}."
            )
    for stage, rounding in _pairs(stages):
        first, second = stage.stage_span(resolved=False), rounding.stage_span(resolved=False)
        if first is not None and second is not None and _is_later(first, second):
            _refuse(stage, first, rounding, second)
    if stages and all(stage.compression_stage != "quantize" for stage in stages):
        check_not_quantized(pl_module, stages[0])


def check_resolved_order(trainer: pl.Trainer) -> None:
    """The same with the moments of this run, once all callbacks have resolved theirs.

    Args:
        trainer: A Trainer in the ``on_fit_start`` of the last stage, or later.

    Raises:
        MisconfigurationException: If a cut or the clustering comes after rounding began.
    """
    for stage, rounding in _pairs(_stages(trainer)):
        first, second = stage.stage_span(resolved=True), rounding.stage_span(resolved=True)
        if first is None or second is None:
            continue
        end, begin = span_in_steps(trainer, first).end, span_in_steps(trainer, second).begin
        if end > begin:
            _refuse(stage, first, rounding, second)


def check_not_quantized(pl_module: pl.LightningModule, stage: CompressionStage) -> None:
    """Refuse to prune or cluster what an earlier stage has quantized.

    Raises:
        MisconfigurationException: If a network in the module is quantized.
    """
    for name, module in pl_module.named_modules():
        if is_quantized(module):
            raise MisconfigurationException(
                f"{name or type(module).__name__!r} was quantized in an earlier stage, and "
                f"{_name(stage)} has to come before quantization: prune, sparsify, cluster, then "
                "quantize. Start from the checkpoint before it was quantized, or take the "
                "quantizers off with lit_compress.compress.quantization.network.without_quantizers."
            )


def span_in_steps(trainer: pl.Trainer, span: StageSpan) -> StageSpan:
    """A resolved span in optimizer steps.

    Args:
        trainer: A Trainer whose ``fit`` has begun.
        span: In whole steps or epochs.

    Returns:
        Moments after the beginning are infinite where the length of an epoch is not known.
    """
    if span.unit == "step":
        return span
    per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches

    def steps(moment: float) -> float:
        if moment == 0:
            return 0
        return moment * math.ceil(per_epoch) if math.isfinite(per_epoch) else math.inf

    return StageSpan(steps(span.begin), steps(span.end))


def _stages(trainer: pl.Trainer) -> list[CompressionStage]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, CompressionStage)]


def _pairs(stages: list[CompressionStage]) -> list[tuple[CompressionStage, CompressionStage]]:
    """What has to be over, and the rounding before which it has to be."""
    rounding = [stage for stage in stages if stage.compression_stage == "quantize"]
    before = [stage for stage in stages if stage.compression_stage in _OVER_BEFORE_ROUNDING]
    return [(stage, last) for stage in before for last in rounding]


def _is_later(first: StageSpan, second: StageSpan) -> bool:
    """Whether the first span is known to end after the second one begins."""
    end, begin = first.end, second.begin
    if isinstance(end, float) != isinstance(begin, float):
        return begin == 0 and end > 0
    same_unit = isinstance(end, float) or first.unit == second.unit or begin == 0
    return same_unit and end > begin


def _refuse(
    stage: CompressionStage, first: StageSpan, rounding: CompressionStage, second: StageSpan
) -> None:
    raise MisconfigurationException(
        f"{_name(rounding)} rounds from {_moment(second.begin, second.unit)} on, and "
        f"{_OVER_BEFORE_ROUNDING[stage.compression_stage]} by {_name(stage)} until "
        f"{_moment(first.end, first.unit)}. The order is prune, sparsify, cluster, quantize: let "
        f"{_name(rounding)} begin later, or {_name(stage)} end earlier."
    )


def _moment(moment: int | float, unit: str) -> str:
    return f"{moment} of the run" if isinstance(moment, float) else f"{unit} {moment}"


def _name(stage: CompressionStage) -> str:
    return type(stage).__name__
