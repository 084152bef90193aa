"""Channels removed for real while the model trains, on an unmodified LightningModule."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_compress.callbacks import tracking
from lit_compress.callbacks._cut_in_fit import cut_in_fit
from lit_compress.callbacks._network_calls import find_network
from lit_compress.callbacks._requirements import (
    explain_unreadable_checkpoints,
    refuse_sharded_strategy,
    refuse_spawned_processes,
)
from lit_compress.callbacks._run_clock import current_moment, run_length
from lit_compress.callbacks._structure_in_checkpoints import carry_structure
from lit_compress.callbacks._training_sample import NetworkInput, TrainingSample
from lit_compress.compress.batch_norm import recalibrate_batch_norm
from lit_compress.compress.channel_cut import cut_channels
from lit_compress.compress.channel_goal import ChannelAllocation, ChannelGoal, PruningRatio
from lit_compress.compress.channel_groups import ChannelGroups
from lit_compress.compress.channel_importance import (
    ACTIVATION_STATISTICS,
    Importance,
    channel_importance,
)
from lit_compress.compress.channel_penalty import ChannelPenalty, add_penalty
from lit_compress.compress.channel_plan import ChannelPlan, choose_channels
from lit_compress.compress.channel_statistics import measure_activations, measure_taylor
from lit_compress.compress.channel_tracing import find_channel_groups
from lit_compress.compress.reconstruction import reconstruct
from lit_compress.compress.schedules import Ramp, Schedule, absolute_moment
from lit_compress.measure import count_macs, count_params, layer_complexity, measure_latency

__all__ = ["ChannelPruning"]


class ChannelPruning(pl.Callback):
    """Removes channels for good, all coupled layers at once, during ``Trainer.fit``.

    Tensors get smaller, and with them multiply-adds, latency and files; nothing is masked. Which
    channels belong together is found by running the network once. The fit goes on over each cut:
    optimizer state, gradients, weight averages and the masks of ``MagnitudeSparsity`` are cut to
    the channels that stay; parameters stay the same objects in the same parameter groups; DDP
    reduces the new shapes, and every process cuts the same channels.

    The LightningModule is not changed in any other way. Checkpoints hold a record of its structure,
    so that ``Trainer.fit/validate/test(ckpt_path=...)`` with this callback, and
    :func:`lit_compress.load_compressed` without it, bring the slim module back. Interrupted runs
    resume exactly.

    When it cuts is said by ``schedule``: ``Schedule(kind="constant", begin=...)`` is one cut at that
    moment (the default: before the first step), ``"linear"`` with ``update_every`` equal rounds
    with fine-tuning between them, ``"cubic"`` a progressive schedule. With ``spread="layers"`` it
    is group fine-tuning: the groups go through their whole cut one after another.

    Logged to every logger at each cut: ``channels/total``, ``channels/group/<name>``,
    ``channels/macs`` and ``channels/num_params``.

    Args:
        pruning_ratio: Channels removed / original, in [0, 1): one for every group, a list with one
            for each, or a mapping from name patterns of groups; groups that none matches stay.
        plan: Channels kept in each group: a :class:`ChannelPlan` or the path of its JSON file.
        target_macs_ratio: Multiply-adds kept / dense, in (0, 1]; met within 1 %, never exceeded.
        target_params_ratio: Parameters kept / dense; likewise.
        target_size_bytes: Bytes of the weights; likewise.
        target_latency_ms: Milliseconds of one forward pass with one example on this machine; met
            within 5 %.
        allocation: How a ratio or target is shared: ``"uniform"`` (the same ratio everywhere) or
            ``"global"`` (the channels of least importance in the whole model).
        importance: What the channels that stay have most of; the table in
            :func:`~lit_compress.compress.channel_importance.channel_importance`, or a function
            ``(network, groups) -> scores``.
        schedule: When channels go.
        spread: ``"channels"``: each moment of the schedule takes some channels of every group;
            ``"layers"``: all that are to go of some groups, from the first to the last.
        penalty: A growing pull towards zero on the channels that are about to go.
        reconstruct: Whether to give the layers that lost inputs new weights by least squares (He et
            al. 2017, section 3.2), at each cut.
        recalibrate_batch_norm: Whether to take new running statistics at each cut.
        num_calibration_batches: Training batches for whatever needs any of the above.
        round_to: Channels kept are multiples of it where a group has more, unless a target could
            not be met so.
        ignored_layers: Name patterns (within the network) of layers that keep their output
            channels. The first layer's inputs and the last one's outputs always stay.

    Raises:
        ValueError: At construction, if an argument is out of range or two of them disagree. When
            the fit begins, if nothing can be cut, a plan is for another model, a name pattern
            matches nothing, or a target cannot be reached; when a checkpoint is loaded whose
            structure does not fit the module.
        MisconfigurationException: When the fit begins, if the strategy shards parameters or spawns
            processes, the network cannot be run on a training batch, or the schedule needs a run
            length that the Trainer does not know.

    Example::

        trainer = Trainer(max_epochs=10, callbacks=[ChannelPruning(target_macs_ratio=0.5)])
        trainer.fit(model, datamodule)
    """

    changes_weights = True

    def __init__(
        self,
        pruning_ratio: PruningRatio | None = None,
        plan: ChannelPlan | str | Path | None = None,
        target_macs_ratio: float | None = None,
        target_params_ratio: float | None = None,
        target_size_bytes: int | None = None,
        target_latency_ms: float | None = None,
        allocation: ChannelAllocation = "uniform",
        importance: Importance = "l2",
        schedule: Schedule = Schedule("constant", begin=0, end=0, update_every=1),  # noqa: B008
        spread: Literal["channels", "layers"] = "channels",
        penalty: ChannelPenalty | None = None,
        reconstruct: bool = False,
        recalibrate_batch_norm: bool = False,
        num_calibration_batches: int = 8,
        round_to: int = 8,
        ignored_layers: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.goal = ChannelGoal(
            pruning_ratio, plan, target_macs_ratio, target_params_ratio, target_size_bytes,
            target_latency_ms, allocation, round_to,
        )  # fmt: skip
        if not callable(importance):
            check_importance(importance)
        if spread not in ("channels", "layers"):
            raise ValueError(f"spread is {spread!r}, expected 'channels' or 'layers'.")
        if isinstance(num_calibration_batches, bool) or num_calibration_batches < 1:
            raise ValueError(
                f"num_calibration_batches is {num_calibration_batches}, expected at least 1."
            )
        if isinstance(ignored_layers, str):
            raise ValueError(
                f"ignored_layers is the string {ignored_layers!r}; give a list, as in "
                f"[{ignored_layers!r}]."
            )
        self.importance = importance
        self.schedule = schedule
        self.spread = spread
        self.penalty = penalty
        self.reconstruct = reconstruct
        self.recalibrate_batch_norm = recalibrate_batch_norm
        self.num_calibration_batches = num_calibration_batches
        self.ignored_layers = list(ignored_layers or ())

        self.ramp: Ramp | None = None
        self.groups: ChannelGroups | None = None
        self.plan: ChannelPlan | None = None
        self._dense_groups: ChannelGroups | None = None
        self._last_point: int | None = None
        self._next_keep: Tensor | None = None
        self._restored: dict[str, Any] | None = None
        self._sample: TrainingSample | None = None
        self._explaining: Any = None

    # --- The run ----------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Carry the structure in checkpoints; refuse what cannot work before anything is loaded."""
        carry_structure(pl_module)
        if stage == "fit":
            refuse_sharded_strategy(trainer, type(self).__name__)
            refuse_spawned_processes(trainer, type(self).__name__)
            self._explaining = explain_unreadable_checkpoints(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the channels, make the plan and fix the schedule, or take them from a checkpoint."""
        self._let_go()
        network = self._network(pl_module)
        self._sample = TrainingSample(trainer, pl_module, network, self.num_calibration_batches)
        state, self._restored = self._restored, None
        if state is not None and state["declared"] == self._declared:
            self._take_over(state)
        else:
            self._begin(trainer, network)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The cut that is due before the first step, if there is one."""
        self._cut_if_due(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Pull the channels that go next towards zero."""
        if self.penalty is None or self._is_done:
            return
        strength = self._penalty_strength(trainer, pl_module)
        if strength == 0:
            return
        if self._next_keep is None:
            self._next_keep = self._choice(trainer, pl_module, self._next_point(trainer, pl_module))
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = self._network(pl_module).named_parameters()
        parameters = {name: p for name, p in named if id(p) in own}
        add_penalty(parameters, self._now, self._next_keep, strength, self.penalty.kind)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Cut where the schedule says so, before validation and checkpoints."""
        self._cut_if_due(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the run ended before the schedule did."""
        if not self._is_done:
            rank_zero_warn(
                f"{type(self).__name__}: training ended before {self.schedule.unit} "
                f"{self._clock.end}, where the schedule ends; not all channels of the plan are "
                "gone. Train longer, or end the schedule earlier."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the training sample."""
        self._let_go()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let go of the training sample."""
        self._let_go()

    # --- Checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Groups, plan and schedule, as tensors and plain data."""
        if self.groups is None or self.plan is None or self._dense_groups is None:
            return self._restored or {}
        return {
            "declared": self._declared,
            "groups": self.groups.state_dict(),
            "dense_groups": self._dense_groups.state_dict(),
            "plan": self.plan.to_json(),
            "ramp": self._clock.to_dict(),
            "last_point": self._last_point,
            "next_keep": self._next_keep,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the fit begins."""
        self._restored = state_dict or None

    # --- What is known ----------------------------------------------------------------------------

    @property
    def kept(self) -> dict[str, int]:
        """Channels that each group has now, by name; empty before the first fit."""
        return {} if self.groups is None else {g.name: g.num_channels for g in self.groups.groups}

    @property
    def _now(self) -> ChannelGroups:
        assert self.groups is not None, "on_fit_start has not run"
        return self.groups

    @property
    def _clock(self) -> Ramp:
        assert self.ramp is not None, "on_fit_start has not run"
        return self.ramp

    @property
    def _is_done(self) -> bool:
        return self._last_point is not None and self._last_point >= self._clock.end

    @property
    def _declared(self) -> str:
        """What the run is to reach and when, to recognise a checkpoint of the same run."""
        importance = self.importance if isinstance(self.importance, str) else "a function"
        return f"{self.goal}, {self.schedule}, {self.spread}, {self.penalty}, {importance}"

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        network = find_network(pl_module, None)
        original: nn.Module = getattr(network, "_orig_mod", network)
        return original

    # --- The plan ---------------------------------------------------------------------------------

    def _begin(self, trainer: pl.Trainer, network: nn.Module) -> None:
        example = self._inputs[0].cut_to(2)
        with torch.compiler.set_stance("force_eager"):
            groups = find_channel_groups(network, example.run, self.ignored_layers)
        if not groups.groups:
            raise ValueError(f"{type(network).__name__} has no channels that can be cut: {groups}.")
        rank_zero_info(f"{type(self).__name__}: {groups}")
        self.groups = self._dense_groups = groups
        self._last_point, self._next_keep = None, None
        self.ramp = self._resolve_schedule(trainer)
        self.plan = self._make_plan(trainer, network)

    def _take_over(self, state: dict[str, Any]) -> None:
        self.groups = ChannelGroups.from_state_dict(state["groups"])
        self._dense_groups = ChannelGroups.from_state_dict(state["dense_groups"])
        self.plan = ChannelPlan.from_json(state["plan"])
        # The run keeps the moments it was started with, also when max_epochs has grown.
        self.ramp, self._last_point = Ramp(**state["ramp"]), state["last_point"]
        self._next_keep = state["next_keep"]

    def _make_plan(self, trainer: pl.Trainer, network: nn.Module) -> ChannelPlan:
        scores = self._scores(trainer)
        layer_macs = {}
        example = self._inputs[0].as_example()
        if example is not None:
            rows = layer_complexity(network, example)
            layer_macs = {row.name: row.macs or 0 for row in rows}

        def latency_ms(plan: ChannelPlan) -> float:
            slim = copy.deepcopy(network)
            cut_channels(slim, self._now, choose_channels(self._now, plan, scores))
            assert example is not None
            return measure_latency(slim, example).median_ms

        plan = None
        if trainer.is_global_zero or not self.goal.needs_latency:
            plan = self.goal.resolve(self._now, network, scores, layer_macs, latency_ms)
        agreed: ChannelPlan = trainer.strategy.broadcast(plan, src=0)
        return agreed

    def _scores(self, trainer: pl.Trainer) -> Tensor:
        """Scores of the network's channels, the same in every process."""
        assert self._sample is not None
        network, measured = self._network(trainer.lightning_module), None
        with torch.compiler.set_stance("force_eager"):
            if self.importance == "taylor":
                copied, loss_of = self._sample.losses()
                measured = measure_taylor(copied, self._now, self._sample.batches, loss_of)
            elif isinstance(self.importance, str) and self.importance in ACTIVATION_STATISTICS:
                statistic = ACTIVATION_STATISTICS[self.importance]
                measured = measure_activations(
                    network, self._now, self._inputs, _run, statistic
                )
        if measured is not None and trainer.world_size > 1:
            on_device = measured.to(trainer.strategy.root_device)
            measured = trainer.strategy.reduce(on_device, reduce_op="mean").cpu()
        return channel_importance(network, self._now, self.importance, measured=measured)

    # --- The cuts ---------------------------------------------------------------------------------

    def _cut_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        moment = current_moment(trainer, pl_module, self.schedule.unit)
        point = self._clock.update_point(moment)
        if point is None or (self._last_point is not None and point <= self._last_point):
            return
        if self._last_point is None and self.goal.allocation == "global":
            # The weights may have been trained since the plan was made.
            self.plan = self._make_plan(trainer, self._network(pl_module))
        keep = self._next_keep
        if keep is None:
            keep = self._choice(trainer, pl_module, point)
        self._last_point, self._next_keep = point, None
        if not bool(keep.all()):
            self._cut(trainer, pl_module, keep)
            self._log(trainer, pl_module)

    def _choice(self, trainer: pl.Trainer, pl_module: pl.LightningModule, point: int) -> Tensor:
        """What stays once the schedule has reached ``point``; rank 0 decides."""
        assert self.plan is not None and self._dense_groups is not None
        fraction = self._clock.value(point, 0.0, 1.0)
        if self.spread == "layers":
            names = [group.name for group in self._dense_groups.groups]
            names = [name for name in names if name in self.plan.kept]
            done = names[: round(fraction * len(names))]
            kept = {name: self.plan.kept[name] for name in done}
            due = ChannelPlan(kept, {name: self.plan.channels[name] for name in done})
        else:
            due = self.plan.part_way(self._dense_groups, fraction, round_to=self.goal.round_to)
        still = due.for_cut_model(self._now)
        keep = choose_channels(self._now, still, self._scores(trainer))
        agreed: Tensor = trainer.strategy.broadcast(keep, src=0)
        return agreed

    def _cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, keep: Tensor) -> None:
        network, groups = self._network(pl_module), self._now
        before = copy.deepcopy(network) if self.reconstruct else None
        self.groups = cut_in_fit(trainer, pl_module, network, groups, keep)
        with torch.compiler.set_stance("force_eager"):
            if before is not None:
                done = reconstruct(network, before, groups, keep, self._inputs, _run)
                rank_zero_info(f"{type(self).__name__}: reconstructed\n{done}")
            if self.recalibrate_batch_norm:
                recalibrate_batch_norm(network, self._inputs, _run)

    # --- Details ----------------------------------------------------------------------------------

    @property
    def _inputs(self) -> list[NetworkInput]:
        assert self._sample is not None
        return self._sample.inputs

    def _resolve_schedule(self, trainer: pl.Trainer) -> Ramp:
        length = run_length(trainer, self.schedule.unit)
        try:
            ramp = self.schedule.resolve(length)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        if ramp.end > length:
            rank_zero_warn(
                f"{type(self).__name__}: the schedule ends at {self.schedule.unit} {ramp.end}, the "
                f"run at {length}: it will not reach its plan."
            )
        return ramp

    def _next_point(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        ramp, now = self._clock, current_moment(trainer, pl_module, self.schedule.unit)
        if now < ramp.begin:
            return ramp.begin
        return min(ramp.end, ramp.begin + ((now - ramp.begin) // ramp.every + 1) * ramp.every)

    def _penalty_strength(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        """Grows from 0, at the begin or the last cut, to the full strength at the next cut."""
        assert self.penalty is not None
        now = current_moment(trainer, pl_module, self.schedule.unit)
        begin = absolute_moment(self.penalty.begin, run_length(trainer, self.schedule.unit))
        if self._last_point is not None:
            begin = max(begin, self._last_point)
        end = self._next_point(trainer, pl_module)
        return self.penalty.strength * min(1.0, max(0, now - begin) / max(1, end - begin))

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network = self._network(pl_module)
        metrics: dict[str, float] = {
            "channels/total": self._now.num_channels,
            "channels/num_params": count_params(network),
        }
        example = self._inputs[0].as_example()
        if example is not None:
            metrics["channels/macs"] = count_macs(network, example)
        metrics |= {f"channels/group/{name}": number for name, number in self.kept.items()}
        rank_zero_info(
            f"{type(self).__name__}: {self.schedule.unit} {self._last_point}: "
            + ", ".join(f"{n.removeprefix('channels/')} {v:,}" for n, v in list(metrics.items())[:3])
        )
        if trainer.loggers:
            tracking.log_metrics(trainer, metrics)

    def _let_go(self) -> None:
        self._sample = None
        if self._explaining is not None:
            self._explaining.remove()
            self._explaining = None


def check_importance(kind: str) -> None:
    """Refuse what is no kind of importance.

    Raises:
        ValueError: If there is none of that name.
    """
    from lit_compress.compress.channel_importance import IMPORTANCES

    if kind not in IMPORTANCES:
        raise ValueError(
            f"importance is {kind!r}, expected a function or one of {', '.join(IMPORTANCES)}."
        )


def _run(network: nn.Module, inputs: NetworkInput) -> Any:
    return inputs.run(network)
