"""Find the channels of a network and make its pruning plan during a fit."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_compress.callbacks.distillation.teacher import copy_network
from lit_compress.callbacks.lightning.network_calls import name_of_network
from lit_compress.callbacks.lightning.training_sample import NetworkInput, TrainingSample
from lit_compress.callbacks.pruning.channel_scores import channel_scores, run_network
from lit_compress.callbacks.pruning.cut_in_fit import cut_in_fit
from lit_compress.compress.batch_norm import recalibrate_batch_norm
from lit_compress.compress.channels.cut import cut_channels
from lit_compress.compress.channels.goal import ChannelGoal
from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.channels.importance import Importance
from lit_compress.compress.channels.penalty import PenaltyKind, add_penalty
from lit_compress.compress.channels.plan import ChannelPlan, choose_channels
from lit_compress.compress.channels.progress import ChannelProgress, Spread
from lit_compress.compress.channels.reconstruction import reconstruct
from lit_compress.compress.channels.tracing import find_channel_groups
from lit_compress.compress.structure import record_of, replay
from lit_compress.compress.structure_record import StructureRecord
from lit_compress.measure import layer_complexity, measure_latency

__all__ = ["ChannelWay", "apply_penalty", "prune_and_reconstruct"]


class ChannelWay:
    """Finds the channels of a network and makes the plan for them.

    The plan is always one for the dense network: ratios and targets are what is removed or kept in
    relation to it, also where the network was cut before, in an earlier fit or by a run whose
    checkpoint is resumed under other arguments. Such a network is part of the way there already.

    Args:
        trainer: The Trainer.
        network: The network that is trained.
        sample: Training batches.
        goal: What is to be left in the end.
        importance: What the channels that stay have most of.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        network: nn.Module,
        sample: TrainingSample,
        goal: ChannelGoal,
        importance: Importance,
    ) -> None:
        self._trainer = trainer
        self._network = network
        self._prefix = name_of_network(trainer.lightning_module, network)
        self._sample = sample
        self._goal = goal
        self._importance = importance

    def begin(self, spread: Spread, ignored_layers: Sequence[str]) -> ChannelProgress:
        """Find the channels, make the plan, and see how far the network is.

        Args:
            spread: As :class:`ChannelProgress` has it.
            ignored_layers: Name patterns of layers that keep their output channels.

        Raises:
            ValueError: If nothing can be cut, a pattern matches no layer, the goal cannot be
                reached or is for another model, or the network has fewer channels already than
                the plan keeps.
        """
        now = self._find(self._network, ignored_layers)
        dense = self._dense()
        groups = now if dense is self._network else self._find(dense, ignored_layers)
        if not groups.groups:
            name = type(self._network).__name__
            raise ValueError(f"{name} has no channels that can be cut: {groups}.")
        rank_zero_info(f"ChannelPruning: {groups}")
        plan = self._plan(dense, groups, now)
        return ChannelProgress(groups, plan, spread, self._goal.round_to, now)

    def plan_again(self, progress: ChannelProgress) -> None:
        """Make the plan again, for weights that were trained since the first one was made.

        Where the new order of channels does not meet the target, the first plan stays: it is no
        reason to end a run.
        """
        try:
            progress.plan = self._plan(self._dense(), progress.dense, progress.now)
        except ValueError as error:
            rank_zero_warn(f"ChannelPruning: the plan of the start of the fit stays: {error}")

    def _dense(self) -> nn.Module:
        """The network as it was before any cut, whatever its weights."""
        if not record_of(self._network):
            return self._network
        dense = copy_network(self._network)
        replay(dense, StructureRecord())
        return dense

    def _find(self, network: nn.Module, ignored_layers: Sequence[str]) -> ChannelGroups:
        example = self._sample.inputs[0].cut_to(2)
        with torch.compiler.set_stance("force_eager"):
            return find_channel_groups(network, example.run, ignored_layers, self._prefix)

    def _plan(self, dense: nn.Module, groups: ChannelGroups, now: ChannelGroups) -> ChannelPlan:
        trainer = self._trainer
        found = channel_scores(trainer, self._network, now, self._importance, self._sample)
        scores = _scores_of_dense(groups, now, found)
        example = self._sample.inputs[0].as_example()
        rows = () if example is None else layer_complexity(dense, example)

        def latency_ms(plan: ChannelPlan) -> float:
            if example is None:
                raise ValueError(
                    "target_latency_ms needs a network that is called with positional or with "
                    "keyword arguments, not with both."
                )
            slim = copy.deepcopy(dense)
            cut_channels(slim, groups, choose_channels(groups, plan, scores))
            return measure_latency(slim, example)[0].median_ms

        plan = None
        if trainer.is_global_zero or not self._goal.needs_latency:
            layer_macs: Mapping[str, int] = {row.name: row.macs or 0 for row in rows}
            plan = self._goal.resolve(groups, dense, scores, layer_macs, latency_ms, self._prefix)
        if self._goal.needs_latency:
            plan = trainer.strategy.broadcast(plan, src=0)
        assert plan is not None
        return plan


def _scores_of_dense(groups: ChannelGroups, now: ChannelGroups, scores: Tensor) -> Tensor:
    """Scores by the dense model's channels, where those that are gone matter least.

    Which channels they were does not matter to a plan, only how many.
    """
    if now is groups:
        return scores
    padded = torch.full((groups.num_channels,), float(scores.min()) - 1 if len(scores) else 0.0)
    padded = padded.to(scores.dtype)
    left = {group.name: now.span(group.name) for group in now.groups}
    for group in groups.groups:
        if group.name in left:
            blocks = scores[left[group.name]].view(group.num_blocks, -1)
            dense = padded[groups.span(group.name)].view(group.num_blocks, -1)
            dense[:, : blocks.shape[1]] = blocks
    return padded


def prune_and_reconstruct(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    network: nn.Module,
    groups: ChannelGroups,
    keep: Tensor,
    inputs: Sequence[NetworkInput],
    by_least_squares: bool,
    new_statistics: bool,
) -> ChannelGroups:
    """Cut a network that is being trained, and make up for what went.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        network: The network in it.
        groups: Its channels.
        keep: bool, shape ``[groups.num_channels]``; true where the channel stays.
        inputs: Of training batches.
        by_least_squares: Whether layers that lost inputs get new weights.
        new_statistics: Whether batch norms do.

    Returns:
        The groups of the network as it is now.
    """
    before = copy_network(network) if by_least_squares else None

    def after_cut() -> None:
        with torch.compiler.set_stance("force_eager"):
            if before is not None:
                done = reconstruct(network, before, groups, keep, inputs, run_network)
                rank_zero_info(f"ChannelPruning: new weights by least squares\n{done}")
            if new_statistics:
                recalibrate_batch_norm(network, inputs, run_network)

    return cut_in_fit(trainer, pl_module, network, groups, keep, after_cut)


def apply_penalty(
    trainer: pl.Trainer,
    optimizer: Optimizer,
    network: nn.Module,
    groups: ChannelGroups,
    keep: Tensor,
    strength: float,
    kind: PenaltyKind,
) -> None:
    """Add the gradient of a penalty to what one optimizer is about to step.

    Args:
        trainer: The Trainer; its loss may be scaled.
        optimizer: The optimizer.
        network: The network, some of whose parameters it trains.
        groups: The network's channels.
        keep: False for those that are pulled towards zero.
        strength: The penalty's factor.
        kind: Its norm.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        strength *= scaler.get_scale()  # fused optimizers unscale gradients in their step
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in network.named_parameters() if id(p) in own}
    add_penalty(parameters, groups, keep, strength, kind)
