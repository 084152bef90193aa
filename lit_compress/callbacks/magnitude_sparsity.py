"""MagnitudeSparsity, the callback that zeroes weights by magnitude while the model trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lit_compress.callbacks.lightning import tracking
from lit_compress.callbacks.lightning.weight_averages import averaged_modules
from lit_compress.callbacks.search.searched import check_no_layers, found_sparsities
from lit_compress.callbacks.selected_weights import LAYER_TYPES, SelectedWeightsCallback
from lit_compress.callbacks.stage_order import Stage
from lit_compress.compress.layers import (
    LayerType,
)
from lit_compress.compress.schedules import Schedule
from lit_compress.compress.sparsity.masked_weights import MaskedWeights
from lit_compress.compress.sparsity.patterns import parse_pattern
from lit_compress.compress.sparsity.target import Allocation, FinalSparsity, SparsityTarget
from lit_compress.search.search_result import SearchResult, Space
from lit_compress.search.settings import CandidateSettings

__all__ = ["MagnitudeSparsity"]


class MagnitudeSparsity(SelectedWeightsCallback[MaskedWeights]):
    """Sets the smallest weights to zero, more and more of them, during ``Trainer.fit``.

    Gradual magnitude pruning (Zhu & Gupta 2017, section 3): at each update of the schedule the
    masks are chosen again by magnitude, on the weights that are there and on the last values of
    those that were removed, so that a weight can come back until the schedule ends. At the end
    exactly ``round(final_sparsity * N)`` of the N selected weights are zero, whatever the update
    frequency, and they stay zero.

    The LightningModule is not changed: masks lie in this callback, weights in the checkpoint have
    their usual names, and a checkpoint opens without this library. Interrupted runs resume exactly.
    Gradients of removed weights are zeroed before clipping, so that they do not count in the norm.
    Under manual optimization a step is a training batch.

    Logged to every logger at each update: ``sparsity/total``, ``sparsity/scheduled`` and
    ``sparsity/layer/<name>``. ``sparsity`` is also in ``trainer.callback_metrics`` at the end of
    each epoch, for ``ModelCheckpoint`` and the progress bar.

    Args:
        final_sparsity: Zeros / weights at the end of the schedule, in [0, 1). Or a mapping from
            name patterns of layers to the sparsity of each; the first pattern that matches a layer
            counts, and layers that none matches stay dense. Or ``"searched"``: what the
            ``RatioSearch`` listed before it finds.
        initial_sparsity: Zeros / weights at the start of the schedule, in [0, final_sparsity].
        schedule: When the sparsity moves from initial to final.
        allocation: How a single ``final_sparsity`` is shared among layers: ``"uniform"`` (the
            same for each), ``"global"`` (magnitudes are compared across layers) or
            ``"heuristic"`` (larger layers sparser; PocketFlow's rule, clipped and re-normalised).
        pattern: ``"unstructured"``; ``"2:4"`` and the like (2 of 4 consecutive input channels are
            kept; quote it in YAML); or blocks such as ``"4x1"`` (4 output channels, 1 input).
        layers: Name patterns of the layers to make sparse; all of ``layer_types`` by default.
        ignored_layers: Name patterns of the layers to leave dense. Patterns match names in
            the LightningModule and in its network: ``"model.layer1.*"`` or ``"layer1.*"``.
        layer_types: Kinds of layers to make sparse, of ``"conv"``, ``"depthwise"``, ``"linear"``,
            ``"attention"``, ``"recurrent"``, ``"embedding"``. Norms and biases never are.

    Raises:
        ValueError: At construction, if an argument is out of range or two of them disagree. When
            the fit begins, if a name pattern matches no layer, no layer is left, or the
            checkpoint that is resumed holds masks of another model. During the fit, if the loss
            or a weight is NaN.
        MisconfigurationException: When the fit begins, if the strategy shards parameters, the
            schedule needs a run length that the Trainer does not know, or two callbacks mask the
            same weight. In ``setup``, if callbacks are listed in an order that cannot work.

    Example::

        trainer = Trainer(max_epochs=10, callbacks=[MagnitudeSparsity(0.9)])
        trainer.fit(model, datamodule)
    """

    verb = "mask"
    compression_stage: Stage = "sparsify"
    searched_space: Space = "sparsity"

    def __init__(
        self,
        final_sparsity: FinalSparsity,
        initial_sparsity: float = 0.0,
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        allocation: Allocation = "uniform",
        pattern: str = "unstructured",
        layers: Sequence[str] | None = None,
        ignored_layers: Sequence[str] | None = None,
        layer_types: Sequence[LayerType] = LAYER_TYPES,
    ) -> None:
        target = SparsityTarget(
            final_sparsity, initial_sparsity, allocation, parse_pattern(pattern)
        )
        super().__init__(
            schedule, "final_sparsity", target.final, layers, ignored_layers, layer_types
        )
        self.target = target
        self._is_searched = self.target.waits_for_search
        if self._is_searched:
            other_types = None if tuple(layer_types) == LAYER_TYPES else layer_types
            check_no_layers(layers, ignored_layers, other_types)
        self._found: SearchResult | None = None

    # --- The run ----------------------------------------------------------------------------------

    def start_or_resume(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: dict[str, Any] | None
    ) -> None:
        """Choose the weights, fix the schedule, take over a checkpoint's masks, bind the hooks."""
        if self._is_searched:
            known = (state or {}).get("searched")
            final = known or found_sparsities(self._found, pl_module)
            self.target = replace(self.target, final=final)
        layers = self.layers if self.target.layers is None else self.target.layers
        chosen = self._choose(pl_module, layers, self.target.pattern)
        rank_zero_info(f"{type(self).__name__}: {self.selection}")
        self._weights = weights = MaskedWeights(chosen, self.target.pattern)
        if state is None:
            self._clock.start(trainer, "final sparsity")
        else:
            weights.load_state_dict(state["weights"])
            if self.is_same_run(state, "its masks stay and the new schedule begins."):
                self._clock.resume(state)
            else:
                weights.reopen()
                self._clock.start(trainer, "final sparsity")
        self._hold(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Keep removed weights out of the gradient norm.

        Only clipping compares gradients across weights; elsewhere the pass is not worth its time.
        """
        if trainer.gradient_clip_val is not None or not pl_module.automatic_optimization:
            self._active_weights.apply_to_gradients()

    def follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Update the masks where the schedule says so."""
        weights, point = self._active_weights, self._clock.due(trainer, pl_module)
        if point is None or weights.is_settled:
            return
        ramp = self._clock.active_ramp
        taken_by = self.selection.taken_by if self.selection else {}
        scheduled = self.target.scheduled(ramp, point, weights.sizes, taken_by)
        alone = trainer.world_size == 1
        agree = None if alone else lambda masks: trainer.strategy.broadcast(masks, src=0)
        weights.update(scheduled.num_zeros, agree)
        for average in averaged_modules(trainer):
            self._keep_average(average)
        self._clock.last_point = point
        if point == ramp.end:
            weights.settle()
        self._log(trainer, scheduled.sparsity)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the sparsity known to ``ModelCheckpoint`` and the progress bar."""
        pl_module.log("sparsity", self.sparsity, prog_bar=True, logger=False, sync_dist=True)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same, for checkpoints that are written when validation ends."""
        if trainer.state.fn == TrainerFn.FITTING:
            pl_module.log("sparsity", self.sparsity, logger=False, sync_dist=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave exact zeros, and say so if the run ended before the schedule did."""
        weights, ramp = self._active_weights, self._clock.active_ramp
        weights.clear()
        if not self._clock.is_done:
            rank_zero_warn(
                f"{type(self).__name__}: training ended before {ramp.unit} {ramp.end}, "
                f"where the schedule ends; the sparsity is {weights.sparsity():.4f} and not "
                f"{self.target.final}. Train longer, or end the schedule earlier."
            )

    # --- Checkpoints ------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store +0 for every removed weight: files with one kind of zero compress better."""
        if self._weights is not None and self._holds:
            self._weights.clear()

    @property
    def declared(self) -> dict[str, Any]:
        """What the run is to reach and when."""
        return {
            "target": replace(self.target, final="searched") if self._is_searched else self.target,
            "schedule": self.schedule,
        }

    def fit_state(self) -> dict[str, Any] | None:
        """Masks, removed values and the schedule."""
        if self._weights is None:
            return None
        return {
            "weights": self._weights.state_dict(),
            **self._clock.state_dict(),
            # A run that is resumed may have cut the channels that these were made exact for.
            "searched": self.target.final if self._is_searched else None,
        }

    # --- A search before it -----------------------------------------------------------------------

    @property
    def waits_for_search(self) -> bool:
        """Whether ``final_sparsity="searched"``."""
        return self._is_searched

    def take_searched(self, result: SearchResult, candidates: CandidateSettings) -> None:
        """Work with the sparsities that were found from now on."""
        self._found = result

    # --- Details ----------------------------------------------------------------------------------

    @property
    def sparsities(self) -> dict[str, float]:
        """The sparsity of each selected weight, by parameter name; empty before the first fit."""
        return {} if self._weights is None else self._weights.sparsities()

    @property
    def sparsity(self) -> float:
        """Zeros / weights over all selected weights; 0 before the first fit."""
        return 0.0 if self._weights is None else self._weights.sparsity()

    @property
    def masked_names(self) -> frozenset[str]:
        """Names, in the LightningModule, of the parameters that have masks."""
        return frozenset() if self._weights is None else frozenset(self._weights.parameters)

    @property
    def has_final_masks(self) -> bool:
        """Whether the masks do not change any more."""
        return self._weights is not None and self._weights.is_settled

    def _log(self, trainer: pl.Trainer, scheduled: float | dict[str, float]) -> None:
        if not trainer.loggers:
            return
        metrics = {"sparsity/total": self.sparsity}
        if isinstance(scheduled, float):
            metrics["sparsity/scheduled"] = scheduled
        metrics |= {f"sparsity/layer/{name}": value for name, value in self.sparsities.items()}
        tracking.log_metrics(trainer, metrics)
