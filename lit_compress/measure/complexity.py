"""Count the MACs, parameters and zeros of a model, in total and layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from lit_compress.measure.formulas import missing_formulas
from lit_compress.measure.inputs import (
    ExampleInputs,
    as_call,
    call_error,
    evaluating,
    infer_batch_size,
    map_tensors,
)
from lit_compress.measure.shadow import Shadow, meta_shadow, real_shadow


@dataclass(frozen=True)
class LayerComplexity:
    """What one module itself holds and does, its children left out.

    A parameter that several modules share belongs to the first; so the columns of all rows add
    up to the figures of the model.

    Attributes:
        name: The module's name in the model, ``""`` for the model itself.
        type: The module's class name.
        macs: MACs for one example in this module's own forward; None if not measured.
            ``nn.MultiheadAttention`` multiplies with its ``out_proj`` itself, so the work stands
            in its row and ``out_proj`` has none.
        num_params: Elements of its parameters.
        num_nonzero_params: Those that are not zero.
        num_weights: Elements of its weights: the parameters with two dimensions or more, so
            neither biases nor the scales of normalisation layers.
        num_nonzero_weights: Those that are not zero.
    """

    name: str
    type: str
    macs: int | None
    num_params: int
    num_nonzero_params: int
    num_weights: int
    num_nonzero_weights: int

    @property
    def sparsity(self) -> float | None:
        """Zeros ÷ weights, in [0, 1]; None for a layer without weights."""
        return 1 - self.num_nonzero_weights / self.num_weights if self.num_weights else None


@dataclass(frozen=True)
class Sparsity:
    """Zeros ÷ weights, where weights are the parameters with two dimensions or more.

    Attributes:
        total: Over all weights together, in [0, 1]; 0.0 for a model without weights.
        layers: The same for each module that has weights, by module name.
    """

    total: float
    layers: Mapping[str, float]


def count_macs(
    model: nn.Module, example_inputs: ExampleInputs, *, batch_size: int | None = None
) -> int:
    """Count the MACs of one forward pass for one example.

    Counted are convolutions, matrix products (linear layers, ``matmul``, ``einsum``), attention
    (Q·Kᵀ and weights·V, causal or not) and recurrent layers. Biases, normalisation, activations,
    pooling and other elementwise work are not, as in the figures that papers give. Zeros in
    weights count like any other number, because dense kernels multiply by them.

    The model runs in evaluation mode on torch's meta device, which computes shapes only; where
    its code needs real values it runs on its own device. Its modes, parameters, buffers and the
    random state are left as they were.

    Args:
        model: Any module.
        example_inputs: One batch; a tensor, a tuple of arguments or a dict of keyword arguments.
        batch_size: Examples in that batch. By default the first dimension of the first tensor;
            give it where the batch is another dimension, or 1 for input without a batch.

    Returns:
        MACs per example: those of the batch divided by its size, rounded. Half of what
        torch's ``FlopCounterMode`` would call FLOPs.

    Raises:
        ValueError: If the inputs hold no example, ``batch_size`` is below 1, the model has
            uninitialised lazy parameters, or it raises on these inputs.

    Example:
        >>> count_macs(nn.Linear(8, 4), torch.zeros(2, 8))
        32
    """
    batch_size = _checked_batch_size(example_inputs, batch_size)
    return round(sum(_macs_by_module(model, example_inputs).values()) / batch_size)


def layer_complexity(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    batch_size: int | None = None,
) -> tuple[LayerComplexity, ...]:
    """Break a model down into the modules that hold parameters or multiply.

    Args:
        model: Any module.
        example_inputs: As in `count_macs`; without it ``macs`` is None in every row.
        batch_size: As in `count_macs`.

    Returns:
        One row for each such module, in the order of ``model.named_modules()``.

    Raises:
        ValueError: As in `count_macs`, or if the parameters hold no values (meta device).
    """
    macs: dict[str, int] | None = None
    if example_inputs is not None:
        size = _checked_batch_size(example_inputs, batch_size)
        total = _macs_by_module(model, example_inputs)
        macs = {name: round(count / size) for name, count in total.items()}
    _refuse_without_values(model)
    rows = []
    seen: set[Tensor] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        if not own and not (macs and macs.get(name)):
            continue
        weights = [p for p in own if p.dim() >= 2]
        rows.append(
            LayerComplexity(
                name=name,
                type=type(module).__name__,
                macs=None if macs is None else macs.get(name, 0),
                num_params=sum(p.numel() for p in own),
                num_nonzero_params=_count_nonzero(own),
                num_weights=sum(p.numel() for p in weights),
                num_nonzero_weights=_count_nonzero(weights),
            )
        )
    return tuple(rows)


def count_params(model: nn.Module) -> int:
    """Count the elements of all parameters, shared ones once.

    Raises:
        ValueError: If lazy parameters are not initialised.
    """
    _refuse_lazy(model)
    return sum(parameter.numel() for parameter in model.parameters())


def count_nonzero_params(model: nn.Module) -> int:
    """Count the elements of all parameters that are not zero, shared ones once.

    Raises:
        ValueError: If parameters hold no values (lazy, or on the meta device).
    """
    _refuse_without_values(model)
    return _count_nonzero(list(model.parameters()))


def sparsity(model: nn.Module) -> Sparsity:
    """Measure zeros ÷ weights, in total and for each layer.

    Raises:
        ValueError: If parameters hold no values (lazy, or on the meta device).
    """
    rows = [row for row in layer_complexity(model) if row.num_weights]
    weights = sum(row.num_weights for row in rows)
    nonzero = sum(row.num_nonzero_weights for row in rows)
    return Sparsity(
        total=1 - nonzero / weights if weights else 0.0,
        layers={row.name: row.sparsity for row in rows if row.sparsity is not None},
    )


def _checked_batch_size(example_inputs: ExampleInputs, batch_size: int | None) -> int:
    inferred = infer_batch_size(example_inputs)
    if batch_size is None:
        return inferred
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1, or None to infer it.")
    return batch_size


def _macs_by_module(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, int]:
    """MACs of the whole batch, by the name of the innermost running module."""
    _refuse_lazy(model)
    try:
        meta_inputs = map_tensors(example_inputs, lambda t: torch.empty_like(t, device="meta"))
        return _run_and_count(meta_shadow(model), meta_inputs)
    except Exception:
        # The forward needs values or makes tensors elsewhere: the run below is for real.
        real_inputs = map_tensors(example_inputs, torch.clone)
    try:
        with evaluating(model):  # reached through what a shadow shares, such as closures
            return _run_and_count(real_shadow(model), real_inputs)
    except Exception as error:
        raise call_error(model, example_inputs, error) from error


def _run_and_count(shadow: Shadow, example_inputs: ExampleInputs) -> dict[str, int]:
    args, kwargs = as_call(example_inputs)
    devices = sorted({p.device.index for p in shadow.model.parameters() if p.is_cuda})
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        _without_fused_transformer(),
        FlopCounterMode(display=False, custom_mapping=missing_formulas()) as counter,
        _attributing(shadow, counter.get_total_flops) as flops,
    ):
        shadow.model(*args, **kwargs)
    return {name: count // 2 for name, count in flops.items()}


@contextmanager
def _attributing(shadow: Shadow, total_flops: Callable[[], int]) -> Iterator[Mapping[str, int]]:
    """Split the growth of ``total_flops`` among the modules, each time to the innermost one."""
    flops: defaultdict[str, int] = defaultdict(int)
    running = [""]
    counted = 0

    def settle() -> None:
        nonlocal counted
        total = total_flops()
        flops[running[-1]] += total - counted
        counted = total

    def enter(module: nn.Module, _inputs: Any) -> None:
        settle()
        name = shadow.name_of(module)
        running.append(running[-1] if name is None else name)

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        settle()
        running.pop()

    hooks = (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield flops
        settle()
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _without_fused_transformer() -> Iterator[None]:
    """Run transformer layers by their submodules: the fused operator hides all the work."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _count_nonzero(parameters: list[nn.Parameter]) -> int:
    return sum(int(torch.count_nonzero(parameter.detach())) for parameter in parameters)


def _refuse_lazy(model: nn.Module) -> None:
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"{type(model).__name__} has lazy parameters without a shape ({', '.join(lazy[:3])}); "
            "expected initialised ones. Run the model once on a batch before measuring it."
        )


def _refuse_without_values(model: nn.Module) -> None:
    _refuse_lazy(model)
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(
            f"{type(model).__name__} has parameters on the meta device ({', '.join(empty[:3])}), "
            "which hold no values; expected real ones. Load its weights first."
        )
