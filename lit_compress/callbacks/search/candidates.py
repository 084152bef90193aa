"""Build the search space of a fit, and the networks of its choices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_compress.callbacks.distillation.teacher import copy_uncompiled
from lit_compress.callbacks.lightning.network_calls import name_of_network
from lit_compress.callbacks.lightning.processes import in_first_process, summed
from lit_compress.callbacks.lightning.training_sample import TrainingSample
from lit_compress.callbacks.pruning.channel_scores import channel_scores, run_network
from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.channels.normal_equations import NormalEquations
from lit_compress.compress.channels.slim_copies import SlimCopies
from lit_compress.compress.channels.tracing import find_channel_groups
from lit_compress.compress.sparsity.copies import SparseCopies
from lit_compress.measure import layer_complexity, measure_latency
from lit_compress.search.bit_space import BitSpace, quantizable_layers
from lit_compress.search.channel_space import ChannelSpace
from lit_compress.search.latency_table import LatencyTable
from lit_compress.search.problem import Budget, Choice, Cost, RatioProblem
from lit_compress.search.search_result import Space
from lit_compress.search.settings import CandidateSettings, SearchTarget
from lit_compress.search.sparsity_space import SparsitySpace, sparse_layers

__all__ = ["CandidateSpace", "candidate_space", "latency_file", "measured_latency_ms"]

_BATCH_NORM_BATCHES = 1
"""Of sparse candidates: with few weights left, old statistics leave nothing to choose from."""


class CandidateSpace(Protocol):
    """Makes a problem, and the networks of its choices."""

    worth: tuple[Tensor, ...] | None
    """For each decision what every part of it is worth, if that is known."""

    @property
    def costs(self) -> Mapping[str, Cost]:
        """By name."""

    def problem(self, budget: Budget | None) -> RatioProblem:
        """The problem under a budget."""

    def network(self, choice: Choice) -> nn.Module:
        """The network of a choice."""


def candidate_space(
    trainer: pl.Trainer,
    network: nn.Module,
    space: Space,
    target: SearchTarget,
    settings: CandidateSettings,
    sample: TrainingSample,
    latency_cache: Path | None = None,
) -> CandidateSpace:
    """Make the space of a network.

    What is gathered from training batches is added up over processes, so that all of them make the
    same candidates.

    Args:
        trainer: The Trainer.
        network: The network; it is copied.
        space: What is searched.
        target: What is to be met.
        settings: How candidates are made.
        sample: Training batches for scores of channels and for least squares.
        latency_cache: The file that keeps measured latencies.

    Raises:
        ValueError: If nothing can be searched, or a name pattern matches nothing.
    """
    dense = copy_uncompiled(network).eval()
    example = sample.inputs[0].as_example()
    rows = () if example is None else layer_complexity(dense, example)
    layer_macs = {row.name: row.macs or 0 for row in rows}
    prefix = name_of_network(trainer.lightning_module, network)
    if space == "channels":
        return _channels(
            trainer, dense, prefix, layer_macs, target, settings, sample, latency_cache
        )
    if space == "bits":
        layers = quantizable_layers(dense, settings.ignored_layers, prefix)
        called = [name for name in layers if layer_macs.get(name)]
        return BitSpace(dense, called or layers, layer_macs)
    layers = sparse_layers(dense, settings.ignored_layers, prefix)
    sparse = SparseCopies(dense, layers)
    if settings.num_calibration_batches:
        sparse.gather(
            sample.inputs[: settings.num_calibration_batches],
            run_network,
            num_batch_norm_batches=_BATCH_NORM_BATCHES,
        )
        _add_up(trainer, sparse.equations)
    assert target.final_sparsity is not None, "SearchTarget.check has seen to it"
    return SparsitySpace(dense, layers, sparse, layer_macs, target_sparsity=target.final_sparsity)


def latency_file(folder: Path) -> Path:
    """Where latencies measured on this and other machines are kept."""
    return folder / "latency.json"


def measured_latency_ms(network: nn.Module, sample: TrainingSample) -> float:
    """Milliseconds of one example, measured on the whole network: a table of layers only tells.

    Args:
        network: The network of a choice.
        sample: Says what it is called with.

    Returns:
        The median; NaN where it is called with positional and with keyword arguments.
    """
    example = sample.inputs[0].as_example()
    return math.nan if example is None else measure_latency(network, example)[0].median_ms


def _channels(
    trainer: pl.Trainer,
    dense: nn.Module,
    prefix: str,
    layer_macs: Mapping[str, int],
    target: SearchTarget,
    settings: CandidateSettings,
    sample: TrainingSample,
    latency_cache: Path | None,
) -> ChannelSpace:
    with torch.compiler.set_stance("force_eager"):
        two = sample.inputs[0].cut_to(2)
        groups = find_channel_groups(dense, two.run, settings.ignored_layers, prefix)
    if not groups.groups:
        raise ValueError(
            f"{type(dense).__name__} has no channels that can be cut, so there is nothing to "
            f"search: {groups}."
        )
    importance: str = settings.importance
    scores = channel_scores(trainer, dense, groups, importance, sample)  # type: ignore[arg-type]
    copies = SlimCopies(dense, groups, scores)
    if settings.num_calibration_batches:
        copies.gather(sample.inputs[: settings.num_calibration_batches], run_network)
        _add_up(trainer, copies.equations)
    latency = None
    if target.target_latency_ms is not None:
        latency = _latency_table(trainer, dense, groups, sample, latency_cache)
    return ChannelSpace(
        dense,
        groups,
        copies,
        layer_macs,
        round_to=settings.round_to,
        min_preserve_ratio=settings.min_preserve_ratio,
        latency_ms=latency,
    )


def _latency_table(
    trainer: pl.Trainer,
    dense: nn.Module,
    groups: ChannelGroups,
    sample: TrainingSample,
    cache: Path | None,
) -> LatencyTable:
    one = sample.inputs[0].cut_to(1)
    measure = partial(LatencyTable.measure, groups, dense, one.run, cache=cache)
    return in_first_process(trainer, measure)


def _add_up(trainer: pl.Trainer, equations: Mapping[str, NormalEquations]) -> None:
    """Let every process have the sums of all of them."""
    for name in sorted(equations):
        equations[name].map_sums(partial(summed, trainer))
