"""Score the importance of channels during a fit, the same in every process."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_compress.callbacks.lightning.training_sample import NetworkInput, TrainingSample
from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.channels.importance import (
    ACTIVATION_STATISTICS,
    IMPORTANCES,
    Importance,
    channel_importance,
)
from lit_compress.compress.channels.statistics import measure_activations, measure_taylor
from lit_compress.measure import count_macs, count_params

__all__ = ["channel_scores", "check_importance", "measured_after_cut", "run_network"]


def channel_scores(
    trainer: pl.Trainer,
    network: nn.Module,
    groups: ChannelGroups,
    importance: Importance,
    sample: TrainingSample,
) -> Tensor:
    """How much each channel of a network matters.

    Args:
        trainer: The Trainer; what its processes measure on their own batches is averaged.
        network: The network.
        groups: Its channels.
        importance: The kind, or a function of network and groups.
        sample: Training batches, for the kinds that need them.

    Returns:
        Shape ``[groups.num_channels]``, on the CPU.
    """
    measured = None
    with torch.compiler.set_stance("force_eager"):
        if importance == "taylor":
            copied, loss_of = sample.losses()
            measured = measure_taylor(copied, groups, sample.batches, loss_of)
        elif isinstance(importance, str) and importance in ACTIVATION_STATISTICS:
            statistic = ACTIVATION_STATISTICS[importance]
            measured = measure_activations(network, groups, sample.inputs, run_network, statistic)
        if measured is not None and trainer.world_size > 1:
            on_device = measured.to(trainer.strategy.root_device)
            measured = trainer.strategy.reduce(on_device, reduce_op="mean").cpu()
        return channel_importance(network, groups, importance, measured=measured)


def check_importance(importance: Importance) -> None:
    """Refuse what is no kind of importance.

    Raises:
        ValueError: If it is neither a function nor the name of a kind.
    """
    if not callable(importance) and importance not in IMPORTANCES:
        raise ValueError(
            f"importance is {importance!r}, expected a function or one of {', '.join(IMPORTANCES)}."
        )


def run_network(network: nn.Module, inputs: NetworkInput) -> Any:
    """Call a network with one input of a sample."""
    return inputs.run(network)


def measured_after_cut(
    network: nn.Module, groups: ChannelGroups, sample: TrainingSample
) -> dict[str, float]:
    """What is logged of a network that was cut: channels, parameters and MACs.

    Args:
        network: The network.
        groups: The channels that it has now.
        sample: Says what its input looks like.
    """
    metrics: dict[str, float] = {
        "channels/total": groups.num_channels,
        "channels/num_params": count_params(network),
    }
    example = sample.inputs[0].as_example()
    if example is not None:
        metrics["channels/macs"] = count_macs(network, example)
    return metrics
