"""Time a network, its layers alone at other sizes, and the rest of the network."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lit_compress.compress.channels.axis_sizes import check_axis, check_known
from lit_compress.compress.channels.cut import cut_channels
from lit_compress.compress.channels.groups import ChannelAxis, ChannelGroups
from lit_compress.compress.channels.order import uniform_plan
from lit_compress.compress.channels.plan import choose_channels
from lit_compress.measure.inputs import Measurable, prepared
from lit_compress.measure.latency import measure_latency
from lit_compress.search.latency_cache import LatencyCache
from lit_compress.search.latency_grids import LayerGrids, LayerLatency, RestLatency
from lit_compress.search.timed_layers import LayerCall, layer_calls, sizes_between

__all__ = ["Stopwatch", "TimeCall", "median_ms", "time_layers", "time_rest"]

TimeCall: TypeAlias = Callable[[Measurable, Tensor], float]
"""Calls a module or a function on an input again and again; milliseconds of one call."""


def median_ms(call: Measurable, x: Tensor) -> float:
    """The median over 30 calls, in milliseconds, after a warm-up.

    As :func:`~lit_compress.measure.latency.measure_latency`.
    """
    return measure_latency(call, x)[0].median_ms


class Stopwatch:
    """Times what is asked for, unless it is known.

    Args:
        network: The dense network.
        run: Calls it on one batch.
        times: What is known.
        time_call: Times one call.

    Attributes:
        calls: How often each layer of the network is called in each way.

    Raises:
        ValueError: If the network raises.
    """

    def __init__(
        self,
        network: nn.Module,
        run: Callable[[nn.Module], object],
        times: LatencyCache,
        time_call: TimeCall,
    ) -> None:
        self.calls = layer_calls(network, run)
        self._run = run
        self._times = times
        self._time_call = time_call
        seen = [f"{name} x {n}: {call}" for (name, call), n in self.calls.items()]
        digest = hashlib.sha256("\n".join([repr(network), *seen]).encode()).hexdigest()[:16]
        self._network_key = f"{type(network).__name__} {digest}"

    def layer_ms(self, call: LayerCall, first: int, second: int) -> float:
        """The time of a layer at one size of its weight."""
        key = call.key(first, second)
        return self._ms(key, lambda: self._time_call(*call.at(first, second)))

    def network_ms(self, network: nn.Module, kept: Sequence[int], device: torch.device) -> float:
        """The time of the whole, dense or cut.

        Args:
            network: The network, or a cut copy.
            kept: Channels that it has in each group.
            device: Where it is.
        """

        def measure() -> float:
            with prepared(network):
                return self._time_call(lambda _: self._run(network), torch.zeros(1, device=device))

        return self._ms(f"{self._network_key} with {list(kept)} channels", measure)

    def save(self) -> None:
        """Have the times written, where they are kept in a file."""
        self._times.save()

    def _ms(self, key: str, measure: Callable[[], float]) -> float:
        ms = self._times.get(key)
        if ms is None:
            ms = measure()
            self._times.note(key, ms)
        return ms


def time_layers(
    groups: ChannelGroups, network: nn.Module, num_points: int, ask: Stopwatch
) -> list[LayerLatency]:
    """Time each layer at a grid of sizes.

    Args:
        groups: The channels of the network.
        network: The dense network.
        num_points: Sizes for each dimension of a weight that can be cut, at least 2; one that
            cannot be cut has its only size.
        ask: Times them.

    Raises:
        ValueError: If the groups are those of another model.
    """
    axes_of = _axes_of_weights(groups, network)
    layers = []
    for (name, call), num_calls in ask.calls.items():
        axes = axes_of[name]
        rows, columns = (
            sizes_between(axis.channels.numel(), unit, num_points)
            if bool((axis.channels >= 0).any())
            else (axis.channels.numel(),)
            for axis, unit in zip(axes, (call.unit, 1), strict=True)
        )
        ms = [[ask.layer_ms(call, first, second) for second in columns] for first in rows]
        ask.save()
        # By noise, or by kernels that like some widths better, a smaller layer may take longer. It
        # counts no less than it took, and a larger one no less than that: the running maximum.
        grid = torch.tensor(ms, dtype=torch.float64).cummax(0).values.cummax(1).values
        output_size = call.num_outputs / axes[call.output_dim].channels.numel()
        layers.append(
            LayerLatency(name, num_calls, axes, (rows, columns), grid, call.output_dim, output_size)
        )
    return layers


def time_rest(
    groups: ChannelGroups,
    network: nn.Module,
    layers: Sequence[LayerLatency],
    num_points: int,
    ask: Stopwatch,
) -> tuple[RestLatency, float]:
    """Time the dense network and uniformly cut copies, and see what their layers leave.

    Args:
        groups: The channels of the network.
        network: The dense network.
        layers: Its layers, at least one.
        num_points: Networks, at least 2; the slimmest keeps ``1 / num_points`` of the channels.
        ask: Times them.

    Returns:
        The rest, and what to multiply the layers' times by. That is 1, or less where the layers
        take longer alone than the whole: a GPU is given the next one while it works, and alone each
        is waited for.
    """
    plans = [uniform_plan(groups, 1 - k / num_points) for k in range(num_points, 0, -1)]
    counts = [tuple(plan.kept_in(groups).values()) for plan in plans]
    layer_ms, outputs = LayerGrids(groups, layers)(
        torch.tensor(counts, dtype=torch.int64).view(num_points, len(groups.groups))
    )
    device = next(network.parameters()).device
    scale = 1.0
    rest: dict[float, float] = {}
    for plan, kept, alone, made in zip(
        plans, counts, layer_ms.sum(1).tolist(), outputs.tolist(), strict=True
    ):
        if made in rest:
            continue
        slim = network
        if rest:
            slim = copy.deepcopy(network)
            cut_channels(
                slim, groups, choose_channels(groups, plan, torch.zeros(groups.num_channels))
            )
        whole = ask.network_ms(slim, kept, device)
        if not rest and alone:
            scale = min(1.0, whole / alone)
        below = min(rest.values(), default=whole)
        rest[made] = max(0.0, min(whole - scale * alone, below))
    ask.save()
    return RestLatency(tuple(reversed(rest)), tuple(reversed(rest.values()))), scale


def _axes_of_weights(
    groups: ChannelGroups, network: nn.Module
) -> Mapping[str, tuple[ChannelAxis, ChannelAxis]]:
    """The first two dimensions of the weight of each layer that has one as a parameter."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    check_known(groups, dict.fromkeys(names.values()), dict(network.named_buffers()))
    known = {(axis.tensor, axis.dim): axis for axis in groups.axes}
    axes = {}
    for layer, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() >= 2:
            name = names[id(weight)]
            first, second = (
                known.get((name, dim), ChannelAxis(name, dim, torch.full([size], -1), "in"))
                for dim, size in enumerate(weight.shape[:2])
            )
            check_axis(first, weight.shape)
            check_axis(second, weight.shape)
            axes[layer] = first, second
    return axes
