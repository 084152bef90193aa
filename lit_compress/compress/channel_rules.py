"""How each of torch's core operators ties channels together.

One small rule an operator or family of operators. A rule gets the operator's arguments and its
result and says what the result's labels are. An operator without a rule pins every channel that it
touches: what the library does not understand it leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lit_compress.compress.channel_groups import AxisRole
from lit_compress.compress.channel_ties import (
    Array,
    Labels,
    Ties,
    Traced,
    broadcast,
    reshape,
    support,
)

__all__ = ["RULES", "Rule", "TraceState", "elementwise", "rule_for"]


class TraceState:
    """What rules read and write while a model runs.

    Attributes:
        ties: The union-find.
        roles: For an atom that began on an axis of a parameter: how that axis is used.
        contracted: Atoms over which two activations were multiplied and summed (attention).
        operator: The name of the operator at work, for reasons.
    """

    def __init__(self) -> None:
        self.ties = Ties()
        self.roles: dict[int, AxisRole] = {}
        self.contracted: list[Array] = []
        self.operator = ""
        self._traced: dict[int, tuple[Tensor, Traced]] = {}

    def see(self, tensor: Tensor, traced: Traced) -> None:
        """Remember a tensor; it is kept alive, so that its identity is not reused."""
        self._traced[id(tensor)] = (tensor, traced)

    def of(self, tensor: Any) -> Traced:
        """What is known of a tensor, or of anything else: nothing."""
        held = self._traced.get(id(tensor))
        return held[1] if held is not None else Traced(())

    def labels(self, tensor: Any) -> Labels:
        """The labels of a tensor."""
        return self.of(tensor).labels

    def along(self, tensor: Tensor, dim: int) -> Array | None:
        """The atoms along one dimension, shape ``[size]``, where it stands for itself."""
        for array in self.labels(tensor):
            if support(array) == (dim % tensor.dim(),):
                return array.ravel()
        return None

    def use(self, tensor: Any, dim: int, role: AxisRole) -> None:
        """Note the role of a weight's axis; ``"out"`` and ``"in"`` prevail over ``"scale"``."""
        if not isinstance(tensor, Tensor) or not self.of(tensor).is_weight:
            return
        atoms = self.along(tensor, dim)
        if atoms is not None:
            for atom in atoms.tolist():
                if self.roles.get(atom, "scale") == "scale":
                    self.roles[atom] = role

    def pin_others(self, tensor: Tensor, dims: Sequence[int], why: str) -> None:
        """Pin every channel of a tensor that does not lie along one of ``dims`` alone."""
        allowed = {(d % tensor.dim(),) for d in dims}
        for array in self.labels(tensor):
            if support(array) not in allowed:
                self.ties.pin(array, why)


Rule: TypeAlias = Callable[[TraceState, Sequence[Any], Any], Labels]
RULES: dict[str, Rule] = {}


def rule_for(operator: Any) -> Rule | None:
    """The rule of an aten operator, in-place forms included."""
    name = operator._schema.name.split("::")[-1]
    rule = RULES.get(name) or RULES.get(name.rstrip("_"))
    if rule is None and torch.Tag.pointwise in operator.tags:
        return elementwise
    return rule


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


# --- Shapes ---------------------------------------------------------------------------------------


@_rule(
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


@_rule("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided")
def _new(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    """Takes over no value; of the same shape, it is meant to meet the tensor it was made from."""
    return state.labels(args[0]) if out.shape == args[0].shape else ()


@_rule("view", "_unsafe_view", "reshape", "flatten", "unflatten", "_reshape_alias")
def _view(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    return reshape(state.labels(args[0]), args[0].shape, out.shape, state.ties)


@_rule("squeeze", "unsqueeze")
def _squeeze(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    return reshape(state.labels(args[0]), args[0].shape, out.shape, state.ties)


@_rule("permute", "transpose", "t", "movedim")
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


@_rule("expand", "repeat")
def _expand(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    labels = broadcast(state.labels(args[0]), out.dim())
    for array in labels:
        if any(out.shape[d] != array.shape[d] for d in support(array)):
            state.ties.pin(array, "its channels are repeated")
    return tuple(a for a in labels if all(out.shape[d] == a.shape[d] for d in support(a)))


@_rule("select")
def _select(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    return _taken(state, args[0], args[1] if len(args) > 1 else 0, args[2])


@_rule("unbind")
def _unbind(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    dim = args[1] if len(args) > 1 else 0
    for index, part in enumerate(out):
        state.see(part, Traced(_taken(state, args[0], dim, index)))
    return ()


def _taken(state: TraceState, tensor: Tensor, dim: int, index: int) -> Labels:
    """The labels at one index of a dimension, which goes away."""
    dim %= tensor.dim()
    taken = []
    for array in state.labels(tensor):
        if support(array) == (dim,):
            state.ties.pin(array, "single channels of it are taken by number")
        elif array.shape[dim] > 1:
            taken.append(array.take(index, dim))
        else:
            taken.append(array.squeeze(dim))
    return tuple(taken)


@_rule("slice")
def _slice(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    tensor, dim, start, stop, step = (*args, *(0, None, None, 1)[len(args) - 1 :])
    dim %= tensor.dim()
    if out.shape == tensor.shape:
        return state.labels(tensor)
    kept = []
    for array in state.labels(tensor):
        if support(array) == (dim,):
            state.ties.pin(array, "a part of its channels is taken by number")
        part = (slice(None),) * dim + (slice(start, stop, step),)
        kept.append(array[part] if array.shape[dim] > 1 else array)
    return tuple(kept)


@_rule("split", "split_with_sizes", "chunk")
def _split(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    tensor = args[0]
    dim = (args[2] if len(args) > 2 else 0) % tensor.dim()
    sizes = [part.shape[dim] for part in out]
    for array in state.labels(tensor):
        if support(array) == (dim,):
            if len(set(sizes)) == 1:
                state.ties.bond(array.reshape(len(sizes), -1))
            else:
                state.ties.pin(array, "its channels are split at fixed places")
    start = 0
    for part, size in zip(out, sizes, strict=True):
        cut = (slice(None),) * dim + (slice(start, start + size),)
        labels = tuple(a[cut] if a.shape[dim] > 1 else a for a in state.labels(tensor))
        state.see(part, Traced(labels))
        start += size
    return ()


@_rule("cat")
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


@_rule("stack")
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


@_rule("constant_pad_nd")
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
            labels[i] = padded.reshape(_one_dimension(array.ndim, dim))
    return tuple(labels)


def _one_dimension(ndim: int, dim: int) -> list[int]:
    return [-1 if d == dim else 1 for d in range(ndim)]


@_rule("roll", "flip", "sort", "cumprod")
def _moved(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    dims = args[2] if len(args) > 2 else args[1] if len(args) > 1 else ()
    dims = [dims] if isinstance(dims, int) else list(dims)
    moved = {d % args[0].dim() for d in dims} or set(range(args[0].dim()))
    for array in state.labels(args[0]):
        if moved & set(support(array)):
            state.ties.pin(array, f"its channels change places in {state.operator}")
    return tuple(a for a in state.labels(args[0]) if not moved & set(support(a)))


# --- Elementwise ----------------------------------------------------------------------------------


@_rule("copy", "where", "masked_fill", "addcmul", "addcdiv", "lerp", "dropout")
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


@_rule("native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    elementwise(state, [args[0], *[a for a in args[2:4] if isinstance(a, Tensor)]], out[0])
    return state.labels(args[0])


@_rule(
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


@_rule("native_group_norm", "group_norm")
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
    shape = _one_dimension(tensor.dim(), 1)
    theirs = tuple(a.reshape(shape) for a in state.labels(weight))
    theirs_shape = [1 if d != 1 else weight.numel() for d in range(tensor.dim())]
    ours = tuple(a for a in state.labels(tensor) if a.shape[1] > 1)
    state.ties.match(ours, theirs, (tensor.shape, theirs_shape), state.operator)


@_rule(
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


@_rule("mean", "sum", "amax", "amin", "var", "std", "var_mean", "prod", "logsumexp", "norm",
       "linalg_vector_norm", "max", "min", "any", "all", "argmax", "argmin")  # fmt: skip
def _reduce(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    tensor = args[0]
    if state.operator.startswith("linalg_vector_norm"):
        args = [tensor, *args[2:]]
    if len(args) > 1 and isinstance(args[1], Tensor):
        return elementwise(state, args, out)  # max and min of two tensors
    dims: Any = args[1] if len(args) > 1 and args[1] is not None else ()
    dims = [dims] if isinstance(dims, int) else list(dims)
    gone = {d % tensor.dim() for d in dims} or set(range(tensor.dim()))
    result = out[0] if isinstance(out, (tuple, list)) else out
    keepdim = result.dim() == tensor.dim()
    stay = [a for a in state.labels(tensor) if not gone & set(support(a))]
    labels = tuple(a if keepdim else a.squeeze(tuple(gone)) for a in stay)
    for part in out if isinstance(out, (tuple, list)) else ():
        state.see(part, Traced(labels))
    return labels


# --- Products -------------------------------------------------------------------------------------


def _product(
    state: TraceState, equation: str, left: Tensor, right: Tensor, labels: tuple[Labels, Labels]
) -> Labels:
    """A sum of products in the notation of ``torch.einsum``; dimensions of one name meet."""
    operands, result = equation.split("->")
    first, second = operands.split(",")
    names = sorted(set(first + second))
    sides, shapes = [], []
    for own, tensor, ours in ((first, left, labels[0]), (second, right, labels[1])):
        order = [own.index(n) for n in names if n in own]
        shape = [tensor.shape[own.index(n)] if n in own else 1 for n in names]
        sides.append(
            tuple(
                a.transpose(order).reshape(
                    [a.shape[own.index(n)] if n in own else 1 for n in names]
                )
                for a in ours
            )
        )
        shapes.append(shape)
        for dim, name in enumerate(own):
            state.use(tensor, dim, "in" if name not in result else "out")
    state.ties.match(sides[0], sides[1], shapes, state.operator)
    summed = [d for d, name in enumerate(names) if name not in result]
    order = [names.index(n) for n in result]
    kept: list[Array] = []
    for array in (*sides[0], *sides[1]):
        dims = set(support(array))
        if dims & set(summed):
            state.contracted.append(array.ravel())
        if dims & set(summed) or any(dims & set(support(other)) for other in kept):
            continue
        kept.append(array)
    return tuple(a.squeeze(tuple(summed)).transpose(_ranks(order, summed)) for a in kept)


def _ranks(order: list[int], removed: list[int]) -> list[int]:
    """Positions among the dimensions that are left once some are removed."""
    return [d - sum(r < d for r in removed) for d in order]


def _multiply(state: TraceState, equation: str, left: Tensor, right: Tensor) -> Labels:
    return _product(state, equation, left, right, (state.labels(left), state.labels(right)))


@_rule("mm")
def _mm(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    return _multiply(state, "nk,km->nm", args[0], args[1])


@_rule("mv")
def _mv(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    return _multiply(state, "nk,k->n", args[0], args[1])


@_rule("bmm")
def _bmm(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    return _multiply(state, "bnk,bkm->bnm", args[0], args[1])


@_rule("linear")
def _linear(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    lead = "abcdefg"[: args[0].dim() - 1]
    labels = _multiply(state, f"{lead}k,mk->{lead}m", args[0], args[1])
    bias = args[2] if len(args) > 2 else None
    return _add_bias(state, labels, out, bias)


@_rule("addmm", "baddbmm")
def _addmm(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    labels = (_bmm if out.dim() == 3 else _mm)(state, args[1:3], out)
    return _add_bias(state, labels, out, args[0])


def _add_bias(state: TraceState, labels: Labels, out: Tensor, bias: Any) -> Labels:
    if isinstance(bias, Tensor):
        for dim in range(bias.dim()):
            state.use(bias, dim, "out")
        shape = (1,) * (out.dim() - bias.dim()) + tuple(bias.shape)
        theirs = broadcast(state.labels(bias), out.dim())
        state.ties.match(labels, theirs, (out.shape, shape), state.operator)
    return labels


@_rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def _convolution(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    tensor, weight, bias = args[:3]
    transposed, num_groups = bool(args[6]), int(args[8])
    state.pin_others(tensor, [1], f"its channels are mixed in {state.operator}")
    out_dim = 1 if transposed else 0
    made, read = state.along(weight, out_dim), state.along(weight, 1 - out_dim)
    given = state.along(tensor, 1)
    num_in = tensor.shape[1]
    depthwise = num_groups > 1 and num_groups == num_in and not transposed
    if depthwise:
        state.use(weight, 0, "scale")
        if made is not None and given is not None:
            state.ties.tie(np.repeat(given, made.size // given.size), made)
    else:
        state.use(weight, out_dim, "out")
        state.use(weight, 1 - out_dim, "in")
        if read is not None and given is not None:
            if not transposed:
                read = np.tile(read, num_groups)
            state.ties.tie(given, read)
    if given is None and num_in > 1:
        for atoms in (made if depthwise else read,):
            if atoms is not None:
                state.ties.pin(atoms, "reads the model's input or a tensor of fixed size")
    if given is not None and (made if depthwise else read) is None:
        state.ties.pin(given, f"meets a weight of fixed size in {state.operator}")
    if made is None:
        return ()
    if num_groups > 1 and not depthwise:
        if transposed:
            made = np.tile(made, num_groups)
            if given is not None:
                state.ties.bond(given.reshape(num_groups, -1))
        else:
            state.ties.bond(made.reshape(num_groups, -1))
    labels: Labels = (made.reshape(_one_dimension(out.dim(), 1)),)
    if isinstance(bias, Tensor):
        state.use(bias, 0, "out")
        theirs = state.along(bias, 0)
        if theirs is not None:
            state.ties.tie(made, theirs)
    return labels


@_rule("embedding")
def _embedding(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    weight = args[0]
    state.use(weight, 1, "out")
    rows, columns = state.along(weight, 0), state.along(weight, 1)
    if rows is not None:
        state.ties.pin(rows, "is looked up by number")
    return () if columns is None else (columns.reshape(_one_dimension(out.dim(), out.dim() - 1)),)


@_rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention",
    "scaled_dot_product_attention", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def _attention(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    query, key, value = args[:3]
    scores = _multiply(state, "bhlk,bhsk->bhls", query, key)
    weights = torch.empty(*query.shape[:-1], key.shape[-2], device="meta")
    return _product(state, "bhls,bhsd->bhld", weights, value, (scores, state.labels(value)))
