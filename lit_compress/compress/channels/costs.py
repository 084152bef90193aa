"""The costs of a plan: MACs, parameters or bytes of the model that it leaves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_compress.compress.channels.axis_sizes import AxisSizes, check_axis, check_known
from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.channels.plan import ChannelPlan

__all__ = ["PlanCost"]

# In the zip file of torch.save every record starts at a multiple of 64 bytes. Before it stands the
# end of the last record (16 bytes) and a header (34) with its name, "archive/data/" and a number.
_ALIGNMENT = 64
_HEADER = 16 + 34 + len("archive/data/")


class PlanCost:
    """MACs, parameters or bytes of the model that a plan leaves, without cutting it.

    The cost of a tensor is in proportion to the sizes of its axes, and these are linear in the
    channels that groups keep; so a plan costs a few operations on small tensors, about a tenth of
    a millisecond. :meth:`macs`, :meth:`num_params` and :meth:`size_bytes` make one.

    Args:
        groups: The channels of the model.
        shapes: The shape of each tensor that counts, by name.
        costs: What each of them costs in the dense model.
        fixed: What does not depend on any of them.
        headers: For tensors stored in a file, the bytes that stand before each; together they are
            rounded up to a multiple of 64.

    Attributes:
        groups: The channels of the model.
        dense: The cost of the dense model.

    Raises:
        ValueError: If the groups know one of the tensors by another shape.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        shapes: Mapping[str, torch.Size],
        costs: Mapping[str, float],
        fixed: float = 0.0,
        headers: Mapping[str, int] | None = None,
    ) -> None:
        self.groups = groups
        axes = [axis for axis in groups.axes if axis.tensor in costs]
        axes_of: dict[str, list[int]] = {name: [] for name in costs}
        unit_costs = dict(costs)
        for index, axis in enumerate(axes):
            check_axis(axis, shapes[axis.tensor])
            axes_of[axis.tensor].append(index)
            unit_costs[axis.tensor] /= axis.channels.numel()
        self._sizes = AxisSizes(groups, axes)
        width = max(map(len, axes_of.values()), default=0)
        rows = [row + [len(axes)] * (width - len(row)) for row in axes_of.values()]
        self._axes_of = torch.tensor(rows, dtype=torch.int64).view(len(costs), width)
        self._unit_costs = torch.tensor(list(unit_costs.values()), dtype=torch.float64)
        self._fixed = fixed
        self._headers = None if headers is None else torch.tensor([headers[n] for n in costs])
        self.dense = self(ChannelPlan({}, {}))

    @classmethod
    def macs(
        cls, groups: ChannelGroups, model: nn.Module, layer_macs: Mapping[str, int]
    ) -> PlanCost:
        """MACs for one example.

        The MACs of a layer are taken to be in proportion to the elements of its weights.
        That is exact for convolutions and linear layers. Of attention, the products of queries,
        keys and values shrink with fewer channels less than the projections do; where these are
        cut, measure the slim model.

        Args:
            groups: The channels of the model.
            model: The dense model, for the shapes of its weights.
            layer_macs: MACs of each layer itself in the dense model, by module name.
                Weights of a module that has none count for the nearest module around it that has
                (``out_proj`` for the attention that multiplies with it).

        Raises:
            ValueError: If a layer is not in the model, or the groups are those of another model.
        """
        modules = dict(model.named_modules())
        for layer in layer_macs:
            if layer not in modules:
                raise ValueError(
                    f"layer_macs names {layer!r}, which is no module of the model; give the "
                    "MACs of the model that the groups were found in."
                )
        shapes = {n: p.shape for n, p in model.named_parameters() if p.dim() >= 2}
        weights_of: dict[str, list[str]] = {layer: [] for layer, n in layer_macs.items() if n}
        for name in shapes:
            owner = name.rpartition(".")[0]
            while owner and owner not in weights_of:
                owner = owner.rpartition(".")[0]
            weights_of.get(owner, []).append(name)
        costs = {}
        for layer, weights in weights_of.items():
            num_weights = sum(shapes[name].numel() for name in weights)
            for name in weights:
                costs[name] = layer_macs[layer] * shapes[name].numel() / num_weights
        fixed = sum(layer_macs[layer] for layer, weights in weights_of.items() if not weights)
        return cls(groups, shapes, costs, fixed)

    @classmethod
    def num_params(cls, groups: ChannelGroups, model: nn.Module) -> PlanCost:
        """Elements of all parameters, exactly; shared ones once.

        Args:
            groups: The channels of the model.
            model: The dense model.

        Raises:
            ValueError: If the groups are those of another model.
        """
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        check_known(groups, shapes, dict(model.named_buffers()))
        return cls(groups, shapes, {name: shape.numel() for name, shape in shapes.items()})

    @classmethod
    def size_bytes(
        cls, groups: ChannelGroups, model: nn.Module, dense_size_bytes: int | None = None
    ) -> PlanCost:
        """Bytes of the model's ``state_dict``: parameters and buffers in their dtypes.

        Args:
            groups: The channels of the model.
            model: The dense model.
            dense_size_bytes: Bytes of the file that ``torch.save`` makes of it. With it the cost
                is the size of the slim model's file, with all that stands there beside the
                numbers (some hundred bytes more or less). Without it, of the numbers alone.

        Raises:
            ValueError: If the groups are those of another model.
        """
        state: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                state[name] = tensor
        check_known(groups, state, dict(model.named_buffers()))
        shapes = {name: tensor.shape for name, tensor in state.items()}
        costs = {n: float(tensor.numel() * tensor.element_size()) for n, tensor in state.items()}
        if dense_size_bytes is None:
            return cls(groups, shapes, costs)
        headers = {name: _HEADER + len(str(index + 1)) for index, name in enumerate(state)}
        records = cls(groups, shapes, costs, headers=headers)
        return cls(groups, shapes, costs, dense_size_bytes - records.dense, headers)

    def __call__(self, plan: ChannelPlan) -> float:
        """The cost of the model that a plan leaves, a whole number.

        Raises:
            ValueError: If the plan is for another model.
        """
        kept = list(plan.kept_in(self.groups).values())
        return float(self.of_each(torch.tensor([kept], dtype=torch.int64))[0])

    def of_each(self, kept: Tensor) -> Tensor:
        """The costs of many plans.

        Args:
            kept: Channels kept, int64, shape ``[num_plans, num_groups]``.

        Returns:
            float64 whole numbers, shape ``[num_plans]``.
        """
        costs = self._sizes(kept)[:, self._axes_of].prod(2) * self._unit_costs
        if self._headers is not None:
            costs = ((costs + self._headers) / _ALIGNMENT).ceil() * _ALIGNMENT
        return (costs.sum(1) + self._fixed).round()
