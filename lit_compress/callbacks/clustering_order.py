"""Check that masks are final before the same weights are clustered."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_compress.callbacks.magnitude_sparsity import MagnitudeSparsity
from lit_compress.callbacks.stage_order import StageSpan, span_in_steps
from lit_compress.compress.clustering.clustered_weights import ClusteredWeights

__all__ = ["refuse_moving_masks"]


def refuse_moving_masks(trainer: pl.Trainer, weights: ClusteredWeights, begin: int) -> None:
    """Refuse masks that move after the weights were clustered, or that clustering would fill.

    Args:
        trainer: A Trainer in ``on_train_start``: masks and clusters of a checkpoint are there.
        weights: What is clustered.
        begin: The step at which it is.

    Raises:
        MisconfigurationException: If ``MagnitudeSparsity`` changes masks of these weights later, or
            their zeros are not kept.
    """
    for sparsity in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(sparsity, MagnitudeSparsity) or sparsity.ramp is None:
            continue
        shared = sorted(weights.parameters.keys() & sparsity._active_weights.parameters)
        if not shared:
            continue
        if not weights.keep_zero:
            raise MisconfigurationException(
                f"MagnitudeSparsity masks {shared[0]!r}, and WeightClustering would give its zeros "
                "other values; set preserve_sparsity=True."
            )
        end = _end_of_masks(trainer, sparsity)
        if end is None or (end <= begin and not weights.is_clustered):
            continue
        mend = f"Set begin={end:.0f}" if math.isfinite(end) else "Give both in steps"
        raise MisconfigurationException(
            f"MagnitudeSparsity changes the masks of {shared[0]!r} until {sparsity.schedule.unit} "
            f"{sparsity.ramp.end}, and WeightClustering clusters it at step {begin}; masks must be "
            f"final by then. {mend}, or end the sparsity's schedule earlier."
        )


def _end_of_masks(trainer: pl.Trainer, sparsity: MagnitudeSparsity) -> float | None:
    """The step at which masks become final; ``None`` if they are, infinite if it is not known."""
    assert sparsity.ramp is not None, "its on_fit_start has not run"
    if sparsity._active_weights.is_settled:
        return None
    span = StageSpan(sparsity.ramp.begin, sparsity.ramp.end, sparsity.schedule.unit)
    return span_in_steps(trainer, span).end
