"""SelectedWeightsCallback: what callbacks share that keep chosen weights masked or clustered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_compress.callbacks.base import CompressionCallback
from lit_compress.callbacks.lightning.network_calls import name_of_network
from lit_compress.callbacks.lightning.run_clock import ScheduleClock
from lit_compress.callbacks.lightning.weight_averages import AverageWatch
from lit_compress.callbacks.stage_order import StageSpan
from lit_compress.compress.layers import (
    LayerType,
    Selection,
    check_is_list,
    plain_name,
    select_weights,
)
from lit_compress.compress.schedules import Ramp, Schedule
from lit_compress.compress.sparsity.patterns import SparsityPattern

__all__ = ["LAYER_TYPES", "SelectedWeightsCallback"]

LAYER_TYPES: tuple[LayerType, ...] = ("conv", "linear", "attention", "recurrent")
"""The kinds of layers that are chosen by default."""


class KeptWeights(Protocol):
    """The stateful twin: parameters that are brought back into their form after each step."""

    parameters: dict[str, nn.Parameter]

    def apply(self, names: Iterable[str] | None = None) -> None:
        """Bring parameters into their form."""

    def apply_to_copy(self, parameters: Mapping[str, Tensor]) -> None:
        """Bring a copy of the parameters into their form."""

    def cut(self, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Follow a cut of the parameters."""


KeptT = TypeVar("KeptT", bound=KeptWeights)


class SelectedWeightsCallback(CompressionCallback, Generic[KeptT]):
    """Chooses weights by layer, and keeps them in a form through optimizers, averages and cuts.

    Args:
        schedule: When they take their form.
        argument: The argument that may be a mapping from name patterns of layers.
        mapping: What was given for it.
        layers: Name patterns of the layers; the keys of ``mapping`` where it is one.
        ignored_layers: Name patterns of the layers to skip.
        layer_types: Kinds of layers.

    Raises:
        ValueError: If ``layers`` and a mapping are given, or a string in the place of a list.
    """

    verb: ClassVar[str]
    """What it does to a weight, for messages."""

    def __init__(
        self,
        schedule: Schedule,
        argument: str,
        mapping: Mapping[str, Any] | object,
        layers: Sequence[str] | None,
        ignored_layers: Sequence[str] | None,
        layer_types: Sequence[LayerType],
    ) -> None:
        super().__init__()
        for name, value in (("layers", layers), ("ignored_layers", ignored_layers)):
            check_is_list(name, value)
        if isinstance(mapping, Mapping):
            if layers is not None:
                raise ValueError(
                    f"{argument} is a mapping and layers is given too; the mapping's keys already "
                    "name the layers. Leave layers out."
                )
            layers = list(mapping)
        self.schedule = schedule
        self.layers = layers
        self.ignored_layers = ignored_layers
        self.layer_types = layer_types

        self.selection: Selection | None = None
        self._weights: KeptT | None = None
        self._clock = ScheduleClock(schedule, type(self).__name__)
        self._holds = False

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks in one Trainer apart."""
        return self._generate_state_key(
            layers=None if self.layers is None else list(self.layers),
            ignored_layers=None if self.ignored_layers is None else list(self.ignored_layers),
            layer_types=list(self.layer_types),
        )

    @property
    def ramp(self) -> Ramp | None:
        """The schedule in the moments of this run; ``None`` before the first fit."""
        return self._clock.ramp

    def stage_span(self, resolved: bool) -> StageSpan | None:
        """From the first change to the last."""
        return StageSpan.of(self._clock.ramp if resolved else self.schedule)

    def release(self) -> None:
        """Release the optimizers and averages; weights are not kept in form any more."""
        super().release()
        self._holds = False

    def on_channels_cut(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        kept: Mapping[str, Mapping[int, Tensor]],
    ) -> None:
        """Follow ``ChannelPruning`` where it cut the weights."""
        if self._weights is not None and self._holds:
            self._weights.cut(kept)

    @property
    def _active_weights(self) -> KeptT:
        assert self._weights is not None, "on_fit_start has not run"
        return self._weights

    def _choose(
        self,
        pl_module: pl.LightningModule,
        layers: Sequence[str] | None,
        pattern: SparsityPattern | None = None,
    ) -> dict[str, nn.Parameter]:
        """The chosen weights by their names in the LightningModule; :attr:`selection` says why."""
        self.selection = select_weights(
            pl_module,
            layers=layers,
            ignored_layers=self.ignored_layers,
            layer_types=self.layer_types,
            pattern=pattern,
            network=name_of_network(pl_module),
        )
        # Under all of its names: a tied weight may be chosen by another one than its first.
        every = pl_module.named_parameters(remove_duplicate=False)
        named = {plain_name(name): p for name, p in every}
        return {name: named[name] for name in self.selection.names}

    def _hold(self, trainer: pl.Trainer) -> None:
        """Keep the weights in form from now on, after each step and in averages."""
        weights, name = self._active_weights, type(self).__name__
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, type(self)) and other is not self and other._holds:
                shared = weights.parameters.keys() & other._active_weights.parameters
                if shared:
                    raise MisconfigurationException(
                        f"two {name} callbacks {self.verb} {min(shared)!r}; give them disjoint "
                        "layers."
                    )
        for optimizer in trainer.optimizers:
            names = self._names_in(optimizer)
            self.bindings.add(
                optimizer.register_step_post_hook(lambda *_, names=names: weights.apply(names))
            )
        self.bindings.add(AverageWatch(trainer, self._keep_average))
        self._holds = True

    def _names_in(self, optimizer: Optimizer) -> list[str]:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [n for n, p in self._active_weights.parameters.items() if id(p) in own]

    def _keep_average(self, average: nn.Module) -> None:
        every = average.named_parameters(remove_duplicate=False)
        named = {plain_name(name): p for name, p in every}
        self._active_weights.apply_to_copy(named)
