"""Cut channels during a fit: optimizers, averages and all else that knows the shapes follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_compress.callbacks.lightning.weight_averages import averaged_modules
from lit_compress.compress.channels.cut import (
    KeptIndices,
    begin_autograd_anew,
    cut_channels,
    cut_optimizer_state,
)
from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.layers import plain_name
from lit_compress.compress.structure import describe, note_change

__all__ = ["FollowsChannelCuts", "cut_in_fit", "rewrap"]


@runtime_checkable
class FollowsChannelCuts(Protocol):
    """A callback that keeps something for each weight and cuts it when the weights are cut."""

    def on_channels_cut(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, kept: KeptIndices
    ) -> None:
        """Follow a cut that was just made.

        Args:
            trainer: The Trainer.
            pl_module: The module, cut already.
            kept: By name of the parameter or buffer in the module (without the wrappers of
                ``torch.compile``), and by dimension: the indices that stayed.
        """


def cut_in_fit(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    network: nn.Module,
    groups: ChannelGroups,
    keep: Tensor,
    after_cut: Callable[[], None] | None = None,
) -> ChannelGroups:
    """Cut the network of a module that is being trained, between two batches.

    Optimizer state and gradients are cut to the channels that stay; parameters are the same objects
    as before, so that parameter groups, learning rates and their schedulers go on. The averages
    that callbacks keep, callbacks with ``on_channels_cut``, DDP and compiled code follow. The
    module remembers the change of its structure for checkpoints.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        network: The network inside of it (or itself) in which the groups were found.
        groups: Its channels.
        keep: bool, shape ``[groups.num_channels]``; true where the channel stays.
        after_cut: Gives the network that was cut new values; where processes train together, all
            get those of the first.

    Returns:
        The groups of the network as it is now.

    Raises:
        ValueError: As :func:`~lit_compress.compress.channels.cut.cut_channels`.
    """
    network_name = next(name for name, m in pl_module.named_modules() if m is network)
    prefix = plain_name(f"{network_name}." if network_name else "")
    kept = {prefix + plain_name(n): by_dim for n, by_dim in groups.kept_indices(keep).items()}
    # Under all of its names, since the network may have another one for it than the module.
    every = pl_module.named_parameters(remove_duplicate=False)
    parameters = {plain_name(name): p for name, p in every}
    shapes = {name: p.shape for name, p in parameters.items()}
    before = describe(pl_module)
    left = cut_channels(network, groups, keep)
    note_change(pl_module, before)
    begin_autograd_anew(parameters[name] for name in kept if name in parameters)
    for optimizer in trainer.optimizers:
        cut_optimizer_state(optimizer, parameters, kept, shapes)
    for average in averaged_modules(trainer):
        _cut_average(average, network_name, groups, keep)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, FollowsChannelCuts):
            callback.on_channels_cut(trainer, pl_module, kept)
    if after_cut is not None:
        after_cut()
    rewrap(trainer, pl_module)
    # Compiled code is bound to the old shapes; without this it would run out of recompilations.
    torch._dynamo.reset()
    return left


def _cut_average(
    average: nn.Module, network_name: str, groups: ChannelGroups, keep: Tensor
) -> None:
    before = describe(average)
    cut_channels(average.get_submodule(network_name), groups, keep)
    note_change(average, before)


def rewrap(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Have DDP reduce gradients of new shapes or parameters; all processes get those of rank 0."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = None  # the old reducer's hooks go with it
        strategy.model = strategy._setup_model(pl_module)
        strategy._register_ddp_hooks()
