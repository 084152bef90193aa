"""LatencyTable: the latency of any plan, from times of its layers at a grid of sizes.

A latency that is measured again for every candidate would be slow and noisy, and could not say in
advance what is within a budget. So each layer is timed alone at a grid of sizes, and the time of a
network is read off (Yang et al. 2018, "NetAdapt", section 3.3). Unlike there, the layers are timed
as this network calls them, and what norms, activations and all the rest take is added: the
difference to a few networks that are timed whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.channels.plan import ChannelPlan
from lit_compress.measure.table import aligned
from lit_compress.search.latency_cache import LatencyCache, device_name
from lit_compress.search.latency_grids import LayerGrids, LayerLatency, RestLatency
from lit_compress.search.latency_timing import (
    Stopwatch,
    TimeCall,
    median_ms,
    time_layers,
    time_rest,
)

__all__ = ["LatencyTable"]


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Milliseconds of the network that a plan leaves, without cutting it.

    The sum over the calls of convolutions and linear layers, each interpolated bilinearly between
    the sizes at which it was timed, and of the rest. A size below the smallest one timed counts as
    that. Keeping more channels never costs less; the dense network costs what it was measured to
    take. ``print(table)`` shows the layers with everything kept and with half of each group.

    Attributes:
        groups: The channels of the model.
        layers: Its convolutions and linear layers.
        rest: What the network takes beside them.
        device: What the times were measured on.

    Raises:
        ValueError: If there are no layers, or one was timed for another size than the groups know.
    """

    groups: ChannelGroups
    layers: tuple[LayerLatency, ...]
    rest: RestLatency
    device: str
    _grids: LayerGrids = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError(
                "the latency table has no layers; expected at least one convolution or linear "
                "layer of the network."
            )
        object.__setattr__(self, "_grids", LayerGrids(self.groups, self.layers))

    @classmethod
    def measure(
        cls,
        groups: ChannelGroups,
        network: nn.Module,
        run: Callable[[nn.Module], object],
        *,
        num_points: int = 5,
        cache: str | Path | None = None,
        time_call: TimeCall = median_ms,
    ) -> LatencyTable:
        """Time a network and each of its layers, on its device with its threads as they are set.

        In evaluation mode without gradients. Layers of the same shape are timed once, and what the
        cache knows of this device is not timed again. The network, its modes and the random state
        are left as they were.

        Args:
            groups: The channels of the network.
            network: The dense network.
            run: Calls it on one batch, of the size whose latency matters: ``lambda n: n(images)``.
            num_points: Sizes timed along each dimension of a weight that can be cut, and networks
                timed whole, at least 2.
            cache: A JSON file that keeps the times, side by side with those of other devices.
            time_call: Says how many milliseconds a call takes. It is given each layer and an input,
                and for a network a function of an input that does not matter. By default the median
                of :func:`~lit_compress.measure.latency.measure_latency`.

        Raises:
            ValueError: If ``num_points`` is below 2, the network raises or calls no convolution and
                no linear layer, the groups are those of another model, or the cache is damaged.
        """
        if num_points < 2:
            raise ValueError(
                f"num_points is {num_points}, expected at least 2 sizes to interpolate between."
            )
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        times = LatencyCache(None if cache is None else Path(cache), device_name(device))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            ask = Stopwatch(network, run, times, time_call)
            if not ask.calls:
                raise ValueError(
                    f"{type(network).__name__} calls no convolution and no linear layer whose "
                    "weight is a parameter, so no latency can be told from their sizes; search "
                    "under a budget on another cost."
                )
            layers = time_layers(groups, network, num_points, ask)
            rest, scale = time_rest(groups, network, layers, num_points, ask)
        scaled = tuple(replace(layer, ms=layer.ms * scale) for layer in layers)
        return cls(groups, scaled, rest, times.device)

    @property
    def dense_ms(self) -> float:
        """What the dense network takes."""
        return float(self(self._kept(1))[0])

    def __call__(self, kept: Tensor) -> Tensor:
        """The latencies of many plans.

        Args:
            kept: Channels kept, whole numbers of any dtype, shape ``[num_plans, num_groups]``.

        Returns:
            float64 milliseconds, shape ``[num_plans]``; never lower where more is kept.

        Raises:
            ValueError: If ``kept`` has another shape.
        """
        if kept.dim() != 2 or kept.shape[1] != len(self.groups.groups):
            raise ValueError(
                f"kept has the shape {tuple(kept.shape)}, expected [num_plans, "
                f"{len(self.groups.groups)}], one number for each group."
            )
        layers, outputs = self._grids(kept.to("cpu", torch.int64))
        return layers.sum(1) + self.rest(outputs)

    def of_plan(self, plan: ChannelPlan) -> float:
        """The latency of the network that a plan leaves, in milliseconds.

        Raises:
            ValueError: If the plan is for another model.
        """
        kept = list(plan.kept_in(self.groups).values())
        return float(self(torch.tensor([kept], dtype=torch.int64))[0])

    def __str__(self) -> str:
        kept = torch.cat([self._kept(1), self._kept(2)])
        layers, outputs = self._grids(kept)
        names = [*((layer.name, str(layer.calls)) for layer in self.layers)]
        names += [("rest", ""), ("total", "")]
        columns = torch.cat([layers, self.rest(outputs)[:, None], self(kept)[:, None]], 1)
        rows = [
            (*name, *(f"{ms:.4f}" for ms in pair))
            for name, pair in zip(names, columns.T.tolist(), strict=True)
        ]
        header = ("layer", "calls", "ms at full", "ms at half")
        return "\n".join([f"Latency on {self.device}", *aligned(header, rows)])

    def _kept(self, divisor: int) -> Tensor:
        """A part of every group, int64 ``[1, num_groups]``."""
        kept = [
            max(1, group.num_channels // group.num_blocks // divisor) * group.num_blocks
            for group in self.groups.groups
        ]
        return torch.tensor([kept], dtype=torch.int64)
