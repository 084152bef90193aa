"""ChannelPruning, the callback that removes channels while the model trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_compress.callbacks.base import CompressionCallback
from lit_compress.callbacks.lightning import tracking
from lit_compress.callbacks.lightning.network_calls import find_uncompiled_network
from lit_compress.callbacks.lightning.run_clock import ScheduleClock
from lit_compress.callbacks.lightning.training_sample import TrainingSample
from lit_compress.callbacks.pruning.channel_scores import (
    channel_scores,
    check_importance,
    measured_after_cut,
)
from lit_compress.callbacks.pruning.channel_way import (
    ChannelWay,
    apply_penalty,
    prune_and_reconstruct,
)
from lit_compress.callbacks.search.searched import WayToCut
from lit_compress.callbacks.stage_order import Stage, StageSpan, check_not_quantized
from lit_compress.compress.channels.cut import misfit
from lit_compress.compress.channels.goal import (
    ChannelAllocation,
    ChannelGoal,
    PruningRatio,
    check_count,
)
from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.channels.importance import Importance
from lit_compress.compress.channels.penalty import ChannelPenalty
from lit_compress.compress.channels.plan import ChannelPlan
from lit_compress.compress.channels.progress import ChannelProgress, Spread, check_spread
from lit_compress.compress.layers import check_is_list
from lit_compress.compress.schedules import Ramp, Schedule
from lit_compress.search.search_result import SearchResult, Space
from lit_compress.search.settings import CandidateSettings

__all__ = ["ChannelPruning"]


class ChannelPruning(CompressionCallback):
    """Removes channels for good, all coupled layers at once, during ``Trainer.fit``.

    Tensors get smaller, and with them MACs, latency and files; nothing is masked. Which
    channels belong together is found by running the network once. The fit goes on over each cut:
    optimizer state, gradients, weight averages and the masks of ``MagnitudeSparsity`` are cut to
    the channels that stay; parameters stay the same objects in the same parameter groups; DDP
    reduces the new shapes, and every process cuts the same channels.

    The LightningModule is not changed in any other way. Checkpoints hold a record of its structure,
    so that ``Trainer.fit/validate/test(ckpt_path=...)`` with this callback, and
    :func:`lit_compress.load_compressed` without it, bring the slim module back. Interrupted runs
    resume exactly. Ratios and targets are relative to the dense model, also where a module was cut
    before: a second fit does not cut it again, and a checkpoint that is resumed under other
    arguments goes on to their plan.

    When it cuts is said by ``schedule``: ``Schedule(kind="constant", begin=...)`` is one cut at
    that moment (the default: before the first step), ``"linear"`` with ``update_every`` equal
    rounds with fine-tuning between them, ``"cubic"`` a progressive schedule. With
    ``spread="layers"`` it is group fine-tuning: the groups have their whole cut one after another.

    Logged to every logger at each cut: ``channels/total``, ``channels/group/<name>``,
    ``channels/macs`` and ``channels/num_params``.

    Args:
        pruning_ratio: Channels removed / original, in [0, 1): one for every group, a list with one
            for each, or a mapping from name patterns of groups; groups that none matches stay.
        plan: Channels kept in each group: a :class:`ChannelPlan`, the path of its JSON file, or
            ``"searched"``: what the ``RatioSearch`` listed before it finds.
        target_macs_ratio: MACs kept / dense, in (0, 1]; met within 1 %, never exceeded.
        target_params_ratio: Parameters kept / dense; likewise.
        target_size_bytes: Bytes of the weights; likewise.
        target_latency_ms: Milliseconds of one forward pass with one example on this machine; met
            within 5 %.
        allocation: How a ratio or target is shared: ``"uniform"`` (the same ratio everywhere) or
            ``"global"`` (the channels of least importance in the whole model).
        importance: What the channels that stay have most of, by default ``"l2"``; the table in
            :func:`~lit_compress.compress.channels.importance.channel_importance`, or a function
            ``(network, groups) -> scores``.
        schedule: When channels go.
        spread: ``"channels"``: each moment of the schedule takes some channels of every group;
            ``"layers"``: all that are to go of some groups, from the first to the last.
        penalty: A growing pull towards zero on the channels that are about to go.
        reconstruct: Whether to give the layers that lost inputs new weights by least squares (He et
            al. 2017, section 3.2), at each cut.
        recalibrate_batch_norm: Whether to take new running statistics at each cut.
        num_calibration_batches: Training batches for whatever needs any of the above, by default 8.
            With ``plan="searched"``, the defaults of this, ``importance`` and ``reconstruct`` are
            what the candidates of the search were cut with.
        round_to: Channels kept are multiples of it where a group has more, unless a target could
            not be met so.
        ignored_layers: Name patterns of layers that keep their output channels, as the last one
            always does. Patterns match names in the LightningModule and in its network:
            ``"model.layer1.*"`` or ``"layer1.*"``.

    Raises:
        ValueError: At construction, if an argument is out of range or two of them disagree. When
            the fit begins, if nothing can be cut, a plan is for another model, a name pattern
            matches nothing, or a target cannot be reached; when a checkpoint is loaded whose
            structure does not fit the module.
        MisconfigurationException: When the fit begins, if the strategy shards parameters or spawns
            processes, the network cannot be run on a training batch or is quantized already, or
            the schedule needs a run length that the Trainer does not know. In ``setup``, if
            callbacks are listed in an order that cannot work.

    Example::

        trainer = Trainer(max_epochs=10, callbacks=[ChannelPruning(target_macs_ratio=0.5)])
        trainer.fit(model, datamodule)
    """

    changes_structure = True
    compression_stage: Stage = "prune"
    searched_space: Space = "channels"

    def __init__(
        self,
        pruning_ratio: PruningRatio | None = None,
        plan: ChannelPlan | str | Path | None = None,
        target_macs_ratio: float | None = None,
        target_params_ratio: float | None = None,
        target_size_bytes: int | None = None,
        target_latency_ms: float | None = None,
        allocation: ChannelAllocation = "uniform",
        importance: Importance | None = None,
        schedule: Schedule = Schedule("constant", begin=0, end=0, update_every=1),  # noqa: B008
        spread: Spread = "channels",
        penalty: ChannelPenalty | None = None,
        reconstruct: bool | None = None,
        recalibrate_batch_norm: bool = False,
        num_calibration_batches: int | None = None,
        round_to: int = 8,
        ignored_layers: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.goal = ChannelGoal(
            pruning_ratio, plan, target_macs_ratio, target_params_ratio, target_size_bytes,
            target_latency_ms, allocation, round_to,
        )  # fmt: skip
        self._way_told = WayToCut(importance, reconstruct, num_calibration_batches)
        self._take_way()
        check_importance(self.importance)
        check_spread(spread)
        check_count("num_calibration_batches", self.num_calibration_batches)
        check_is_list("ignored_layers", ignored_layers)
        self._is_searched = self.goal.waits_for_search
        self.schedule = schedule
        self.spread = spread
        self.penalty = penalty
        self.recalibrate_batch_norm = recalibrate_batch_norm
        self.ignored_layers = list(ignored_layers or ())

        self._clock = ScheduleClock(schedule, type(self).__name__)
        self._progress: ChannelProgress | None = None
        self._penalty_begin = 0
        self._next_keep: Tensor | None = None  # chosen ahead, where a penalty works on it
        self._sample: TrainingSample | None = None

    # --- The run ----------------------------------------------------------------------------------

    def start_or_resume(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: dict[str, Any] | None
    ) -> None:
        """Find the channels, make the plan and fix the schedule, or take them from a checkpoint."""
        if state is None:  # else the run that is resumed may quantize by now
            check_not_quantized(pl_module, self)
        network = find_uncompiled_network(pl_module)
        self._sample = TrainingSample(trainer, pl_module, network, self.num_calibration_batches)
        if state is not None and self._resume(state, network):
            return
        moments = {} if self.penalty is None else {"penalty.begin": self.penalty.begin}
        others = self._clock.start(trainer, "plan", moments)
        self._penalty_begin = others.get("penalty.begin", 0)
        self._next_keep = None
        way = ChannelWay(trainer, network, self._training, self.goal, self.importance)
        self._progress = way.begin(self.spread, self.ignored_layers)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Pull the channels that go next towards zero."""
        if self.penalty is None or self._clock.is_done:
            return
        now = self._clock.now(trainer, pl_module)
        cut = self._clock.active_ramp.next_point(now)
        begin = max(self._penalty_begin, self._clock.last_point or 0)
        strength = self.penalty.strength_at(now, begin, cut)
        if strength == 0:
            return
        if self._next_keep is None:
            self._next_keep = self._choose(trainer, pl_module, cut)
        groups, kind, network = self._way.now, self.penalty.kind, find_uncompiled_network(pl_module)
        apply_penalty(trainer, optimizer, network, groups, self._next_keep, strength, kind)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the run ended before the schedule did."""
        if not self._clock.is_done:
            ramp = self._clock.active_ramp
            rank_zero_warn(
                f"{type(self).__name__}: training ended before {ramp.unit} {ramp.end}, where the "
                "schedule ends; not all channels of the plan are gone. Train longer, or end the "
                "schedule earlier."
            )

    def release(self) -> None:
        """Release the run and the training sample."""
        super().release()
        self._sample = None

    # --- Checkpoints ------------------------------------------------------------------------------

    @property
    def declared(self) -> dict[str, Any]:
        """What the run is to reach and when."""
        return {
            "goal": replace(self.goal, plan="searched") if self._is_searched else self.goal,
            "schedule": self.schedule,
            "spread": self.spread,
            "penalty": self.penalty,
            "importance": self._way_told.importance if self._is_searched else self.importance,
            "ignored_layers": self.ignored_layers,
        }

    def fit_state(self) -> dict[str, Any] | None:
        """Groups, plan and schedule."""
        if self._progress is None:
            return None
        return {
            "progress": self._progress.state_dict(),
            **self._clock.state_dict(),
            "penalty_begin": self._penalty_begin,
            "next_keep": self._next_keep,
        }

    # --- A search before it -----------------------------------------------------------------------

    @property
    def waits_for_search(self) -> bool:
        """Whether ``plan="searched"``."""
        return self._is_searched

    def take_searched(self, result: SearchResult, candidates: CandidateSettings) -> None:
        """Work with the plan that was found from now on, cut as the candidates were."""
        self.goal = replace(self.goal, plan=result.plan)
        self._take_way(candidates)

    def _take_way(self, candidates: CandidateSettings | None = None) -> None:
        way = self._way_told.filled(candidates)
        self.importance, self.reconstruct, self.num_calibration_batches = way

    # --- What is known ----------------------------------------------------------------------------

    @property
    def groups(self) -> ChannelGroups | None:
        """The channels that the network has now; ``None`` before the first fit."""
        return None if self._progress is None else self._progress.now

    @property
    def plan(self) -> ChannelPlan | None:
        """What is to be left in the end; ``None`` before the first fit."""
        return None if self._progress is None else self._progress.plan

    @property
    def kept(self) -> dict[str, int]:
        """Channels that each group has now, by name; empty before the first fit."""
        return {} if self._progress is None else self._progress.kept

    @property
    def ramp(self) -> Ramp | None:
        """The schedule in the moments of this run; ``None`` before the first fit."""
        return self._clock.ramp

    def stage_span(self, resolved: bool) -> StageSpan | None:
        """From the first cut to the last."""
        return StageSpan.of(self._clock.ramp if resolved else self.schedule)

    @property
    def _way(self) -> ChannelProgress:
        assert self._progress is not None, "on_fit_start has not run"
        return self._progress

    @property
    def _training(self) -> TrainingSample:
        assert self._sample is not None, "on_fit_start has not run"
        return self._sample

    def _resume(self, state: dict[str, Any], network: nn.Module) -> bool:
        """Go on where a checkpoint of the same run left off; false if it is of another run."""
        then = "from its structure the new schedule leads to the new plan."
        if not self.is_same_run(state, then):
            return False
        progress = ChannelProgress.from_state_dict(state["progress"])
        if misfit(network, progress.now) is not None:
            return False  # the weights of another time were loaded before it was saved
        self._progress = progress
        self._clock.resume(state)
        self._penalty_begin, self._next_keep = state["penalty_begin"], state["next_keep"]
        return True

    # --- The cuts ---------------------------------------------------------------------------------

    def follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut where the schedule says so."""
        point = self._clock.due(trainer, pl_module)
        if point is None:
            return
        network = find_uncompiled_network(pl_module)
        ahead = self._next_keep
        keep = self._choose(trainer, pl_module, point) if ahead is None else ahead
        self._clock.last_point, self._next_keep = point, None
        if not bool(keep.all()):
            self._way.now = prune_and_reconstruct(
                trainer, pl_module, network, self._way.now, keep, self._training.inputs,
                self.reconstruct, self.recalibrate_batch_norm,
            )  # fmt: skip
            self._log(trainer, network)

    def _choose(self, trainer: pl.Trainer, pl_module: pl.LightningModule, point: int) -> Tensor:
        """The channels that stay once the schedule has reached ``point``; rank 0 decides."""
        way, network = self._way, find_uncompiled_network(pl_module)
        if self._clock.last_point is None and self.goal.allocation == "global":
            ChannelWay(trainer, network, self._training, self.goal, self.importance).plan_again(way)
        scores = channel_scores(trainer, network, way.now, self.importance, self._training)
        keep = way.choose(self._clock.active_ramp.value(point, 0.0, 1.0), scores)
        agreed: Tensor = trainer.strategy.broadcast(keep, src=0)
        return agreed

    def _log(self, trainer: pl.Trainer, network: nn.Module) -> None:
        metrics = measured_after_cut(network, self._way.now, self._training)
        shown = ", ".join(f"{n.removeprefix('channels/')} {v:,}" for n, v in metrics.items())
        moment = f"{self._clock.active_ramp.unit} {self._clock.last_point}"
        rank_zero_info(f"{type(self).__name__}: {moment}: {shown}")
        if trainer.loggers:
            metrics |= {f"channels/group/{name}": number for name, number in self.kept.items()}
            tracking.log_metrics(trainer, metrics)
