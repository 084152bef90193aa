"""Tracing rules: how each of torch's core operators ties channels together.

One small rule an operator or family of operators. A rule gets the operator's arguments and its
result and says what the result's labels are. An operator without a rule pins every channel that it
touches: what the library does not understand it leaves alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_compress.compress.channels.product_rules import PRODUCT_RULES
from lit_compress.compress.channels.ties import (
    Array,
    Labels,
    Traced,
    broadcast,
    one_dimension,
    reshape,
    support,
)
from lit_compress.compress.channels.trace_state import Rule, TraceState, registering

__all__ = ["RULES", "elementwise", "keeps_weights", "rule_for"]

RULES: dict[str, Rule] = dict(PRODUCT_RULES)
rule = registering(RULES)


def rule_for(operator: Any) -> Rule | None:
    """The rule of an aten operator, in-place forms included."""
    name = operator._schema.name.split("::")[-1]
    rule = RULES.get(name) or RULES.get(name.rstrip("_"))
    if rule is None and torch.Tag.pointwise in operator.tags:
        return elementwise
    return rule


def keeps_weights(operator: Any) -> bool:
    """Whether an operator makes of weights alone what may stand in for a weight.

    So scaled, normalised and masked weights are weights themselves.
    """
    return rule_for(operator) in (
        elementwise, _same, _view, _squeeze, _permute, _expand, _select, _slice, _cat, _pad, _reduce
    )  # fmt: skip


# --- Shapes ---------------------------------------------------------------------------------------


@rule(
    "clone", "alias", "detach", "_to_copy", "lift_fresh", "lift", "softmax", "_softmax",
    "_log_softmax", "bernoulli", "hardswish", "empty_like", "zeros_like", "ones_like", "full_like",
    "rand_like", "randn_like", "fill", "zero", "native_dropout", "cumsum", "as_strided",
)  # fmt: skip
def _same(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    """The result is as its first argument."""
    first = out[0] if isinstance(out, (tuple, list)) else out
    if first.shape == args[0].shape:
        return state.labels(args[0])
    state.ties.pin_all(state.labels(args[0]), f"changes its shape in {state.operator}")
    return ()


@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided")
def _new(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    """Takes over no value; where it is as large, it is meant to meet what it was made from."""
    if out.dim() != args[0].dim():
        return ()
    labels = state.labels(args[0])
    return tuple(a for a in labels if all(out.shape[d] == a.shape[d] for d in support(a)))


@rule("view", "_unsafe_view", "reshape", "flatten", "unflatten", "_reshape_alias")
def _view(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    return reshape(state.labels(args[0]), args[0].shape, out.shape, state.ties)


@rule("squeeze", "unsqueeze")
def _squeeze(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    return reshape(state.labels(args[0]), args[0].shape, out.shape, state.ties)


@rule("permute", "transpose", "t", "movedim")
def _permute(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    ndim = args[0].dim()
    order = list(range(ndim))
    if len(args) == 1:
        order.reverse()
    elif len(args) == 2:
        order = [d % ndim for d in args[1]]
    else:
        a, b = args[1] % ndim, args[2] % ndim
        order[a], order[b] = b, a
    moved: list[Array] = []
    for array in state.labels(args[0]):
        dims = support(array)
        if [d for d in order if d in dims] != list(dims):
            # Rows and columns of channels change places, as in a channel shuffle: the order of
            # what is left is only the same everywhere if all rows keep the same columns.
            rows = np.moveaxis(array, dims[-1], -1).reshape(-1, array.shape[dims[-1]])
            state.ties.tie(np.broadcast_to(rows[:1], rows.shape), rows)
        moved.append(array.transpose(order))
    return tuple(moved)


@rule("repeat")
def _repeat(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    """Each index stands there several times."""
    labels = broadcast(state.labels(args[0]), out.dim())
    return tuple(
        np.tile(a, [n if d in support(a) else 1 for d, n in enumerate(args[1])]) for a in labels
    )


@rule("expand")
def _expand(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    return broadcast(state.labels(args[0]), out.dim())


@rule("select")
def _select(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    return _taken(state, args[0], args[1] if len(args) > 1 else 0, args[2])


@rule("unbind")
def _unbind(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    dim = args[1] if len(args) > 1 else 0
    for index, part in enumerate(out):
        labels = _taken(state, args[0], dim, index)
        state.see(part, Traced(labels, state.of(args[0]).is_weight))
    return ()


def _taken(state: TraceState, tensor: Tensor, dim: int, index: int) -> Labels:
    """The labels at one index of a dimension, which goes away."""
    dim %= tensor.dim()
    taken: list[Array] = []
    for array in state.labels(tensor):
        if _columns(array) == dim:
            state.ties.pin(array, "single channels of it are taken by number")
        elif array.shape[dim] > 1:
            taken.append(array[(slice(None),) * dim + (index,)])
        else:
            taken.append(array.squeeze(dim))
    return tuple(taken)


def _columns(array: Array) -> int:
    """The dimension along which channels go away; those before it are rows, which all stay."""
    dims = support(array)
    return dims[-1] if dims else -1


@rule("slice")
def _slice(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    given = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
    tensor, (dim, start, stop, step) = args[0], given
    dim %= tensor.dim()
    if out.shape == tensor.shape:
        return state.labels(tensor)
    kept = []
    for array in state.labels(tensor):
        if _columns(array) == dim:
            state.ties.pin(array, "a part of its channels is taken by number")
        part = (slice(None),) * dim + (slice(start, stop, step),)
        kept.append(array[part] if array.shape[dim] > 1 else array)
    return tuple(kept)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def _split(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    tensor = args[0]
    dim = (args[2] if len(args) > 2 else 0) % tensor.dim()
    sizes = [part.shape[dim] for part in out]
    for array in state.labels(tensor):
        if _columns(array) == dim:
            if len(set(sizes)) == 1:
                state.ties.bond(np.moveaxis(array, dim, -1).reshape(-1, sizes[0]))
            else:
                state.ties.pin(array, "its channels are split at fixed places")
    start = 0
    for part, size in zip(out, sizes, strict=True):
        cut = (slice(None),) * dim + (slice(start, start + size),)
        labels = tuple(a[cut] if a.shape[dim] > 1 else a for a in state.labels(tensor))
        state.see(part, Traced(labels, state.of(tensor).is_weight))
        start += size
    return ()


@rule("glu")
def _glu(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    """One half of the channels gates the other."""
    tensor = args[0]
    dim = (args[1] if len(args) > 1 else -1) % tensor.dim()
    halves: list[Array] = []
    for array in state.labels(tensor):
        if array.shape[dim] == 1:
            halves.append(array)
            continue
        if _columns(array) == dim:
            state.ties.bond(np.moveaxis(array, dim, -1).reshape(-1, tensor.shape[dim] // 2))
        middle = array.shape[dim] // 2
        first = array.take(range(middle), dim)
        state.ties.tie(first, array.take(range(middle, 2 * middle), dim))
        halves.append(first)
    return tuple(halves)


@rule("cat")
def _cat(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    dim = (args[1] if len(args) > 1 else 0) % out.dim()
    tensors = [t for t in args[0] if t.dim() == out.dim()]
    joined, across = [], []
    for tensor in tensors:
        own = [a for a in state.labels(tensor) if a.shape[dim] > 1]
        for array in own:
            if support(array) != (dim,):
                state.ties.pin(array, "its channels are mixed with others in a concatenation")
        plain = [a.ravel() for a in own if support(a) == (dim,)]
        joined.append(plain[0] if plain else None)
        across.append(tuple(a for a in state.labels(tensor) if a.shape[dim] == 1))
    others = _tied_together(state, across, [_without(t.shape, dim) for t in tensors])
    if all(part is None for part in joined):
        return others
    parts = []
    for tensor, part in zip(tensors, joined, strict=True):
        if part is None:
            part = state.ties.new(tensor.shape[dim])
            state.ties.pin(part, "belongs to a tensor of fixed size in a concatenation")
        parts.append(part)
    shape = [1] * out.dim()
    shape[dim] = -1
    return (*others, np.concatenate(parts).reshape(shape))


@rule("stack")
def _stack(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    dim = (args[1] if len(args) > 1 else 0) % out.dim()
    labels = [tuple(np.expand_dims(a, dim) for a in state.labels(t)) for t in args[0]]
    return _tied_together(state, labels, [_without(out.shape, dim)] * len(labels))


def _without(shape: Sequence[int], dim: int) -> list[int]:
    return [1 if d == dim else size for d, size in enumerate(shape)]


def _tied_together(state: TraceState, labels: list[Labels], shapes: list[list[int]]) -> Labels:
    for i in range(1, len(labels)):
        state.ties.match(labels[0], labels[i], (shapes[0], shapes[i]), state.operator)
    return next((part for part in labels if part), ())


@rule("constant_pad_nd")
def _pad(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    tensor, widths = args[0], args[1]
    labels = list(state.labels(tensor))
    for k in range(len(widths) // 2):
        dim = tensor.dim() - 1 - k
        before, after = widths[2 * k], widths[2 * k + 1]
        if not before and not after:
            continue
        for i, array in enumerate(labels):
            if array.shape[dim] == 1:
                continue
            if support(array) != (dim,) or before < 0 or after < 0:
                state.ties.pin(array, "its channels are padded")
                del labels[i]
                break
            edge = state.ties.new(before + after)
            state.ties.pin(edge, "is added to a fixed number of zeros (a padded shortcut)")
            padded = np.concatenate([edge[:before], array.ravel(), edge[before:]])
            labels[i] = padded.reshape(one_dimension(array.ndim, dim))
    return tuple(labels)


@rule("roll", "flip", "sort", "cumprod")
def _moved(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    dims = args[2] if len(args) > 2 else args[1] if len(args) > 1 else ()
    dims = [dims] if isinstance(dims, int) else list(dims)
    moved = {d % args[0].dim() for d in dims} or set(range(args[0].dim()))
    for array in state.labels(args[0]):
        if moved & set(support(array)):
            state.ties.pin(array, f"its channels change places in {state.operator}")
    return tuple(a for a in state.labels(args[0]) if not moved & set(support(a)))


# --- Elementwise ----------------------------------------------------------------------------------


@rule("copy", "where", "masked_fill", "addcmul", "addcdiv", "lerp", "_prelu_kernel",
       "_weight_norm_interface")  # fmt: skip
def elementwise(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    """Operands meet index by index; weights among them scale each channel on its own."""
    result = out[0] if isinstance(out, (tuple, list)) else out
    tensors = [a for a in args if isinstance(a, Tensor)]
    spread = [broadcast(state.labels(t), result.dim()) for t in tensors]
    shapes = [(1,) * (result.dim() - t.dim()) + tuple(t.shape) for t in tensors]
    for i, tensor in enumerate(tensors):
        for dim in range(tensor.dim()):
            state.use(tensor, dim, "scale")
        for j in range(i):
            state.ties.match(spread[j], spread[i], (shapes[j], shapes[i]), state.operator)
    labels: list[Array] = []
    for array in (array for operand in spread for array in operand if support(array)):
        if not any(set(support(array)) & set(support(other)) for other in labels):
            labels.append(array)
    return tuple(labels)


@rule("native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    elementwise(state, [args[0], *[a for a in args[2:4] if isinstance(a, Tensor)]], out[0])
    return state.labels(args[0])


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "batch_norm",
    "_native_batch_norm_legit_functional", "_batch_norm_no_update",
)  # fmt: skip
def _batch_norm(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    tensor = args[0]
    for weight in args[1:5]:
        if isinstance(weight, Tensor):
            _scale_by(state, tensor, weight)
    return state.labels(tensor)


@rule("native_group_norm")
def _group_norm(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    tensor, num_groups = args[0], args[6]
    for weight in args[1:3]:
        if isinstance(weight, Tensor):
            _scale_by(state, tensor, weight)
    atoms = state.along(tensor, 1)
    if atoms is not None:
        state.ties.bond(atoms.reshape(num_groups, -1))
    return state.labels(tensor)


def _scale_by(state: TraceState, tensor: Tensor, weight: Tensor) -> None:
    """A vector that holds one number for each channel, the tensor's dimension 1."""
    state.use(weight, 0, "scale")
    shape = one_dimension(tensor.dim(), 1)
    theirs = tuple(a.reshape(shape) for a in state.labels(weight))
    theirs_shape = [1 if d != 1 else weight.numel() for d in range(tensor.dim())]
    ours = tuple(a for a in state.labels(tensor) if a.shape[1] > 1)
    state.ties.match(ours, theirs, (tensor.shape, theirs_shape), state.operator)


@rule(
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "reflection_pad2d", "replication_pad2d", "_upsample_bilinear2d_aa", "mkldnn_max_pool2d",
)  # fmt: skip
def _pool(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    """Works on the dimensions from 2 on; the channels are dimension 1."""
    state.pin_others(args[0], [0, 1], f"its channels are mixed in {state.operator}")
    return tuple(a for a in state.labels(args[0]) if support(a) in ((0,), (1,)))


@rule("mean", "sum", "amax", "amin", "var", "std", "var_mean", "prod", "logsumexp", "norm",
       "linalg_vector_norm", "max", "min", "any", "all", "argmax", "argmin")  # fmt: skip
def _reduce(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    tensor = args[0]
    if state.operator in ("linalg_vector_norm", "norm"):
        args = [tensor, *args[2:]]  # before the dimensions comes the order of the norm
    if len(args) > 1 and isinstance(args[1], Tensor):
        return elementwise(state, args, out)  # max and min of two tensors
    dims: Any = args[1] if len(args) > 1 and args[1] is not None else ()
    dims = [dims] if isinstance(dims, int) else list(dims)
    gone = {d % tensor.dim() for d in dims} or set(range(tensor.dim()))
    result = out[0] if isinstance(out, (tuple, list)) else out
    keepdim = result.dim() == tensor.dim()
    for array in state.labels(tensor):
        dims_of = set(support(array))
        if gone & dims_of and (dims_of - gone or state.operator.startswith("arg")):
            state.ties.pin(array, f"its channels are mixed in {state.operator}")
        for dim in dims_of:
            state.use(tensor, dim, "scale")
    stay = [a for a in state.labels(tensor) if not gone & set(support(a))]
    labels = tuple(a if keepdim else a.squeeze(tuple(gone)) for a in stay)
    for part in out if isinstance(out, (tuple, list)) else ():
        state.see(part, Traced(labels))
    return labels
