"""Tracing rules for products: matrix products, convolutions, lookups and attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_compress.compress.channels.ties import Array, Labels, broadcast, one_dimension, support
from lit_compress.compress.channels.trace_state import Rule, TraceState, registering

__all__ = ["PRODUCT_RULES"]

PRODUCT_RULES: dict[str, Rule] = {}
rule = registering(PRODUCT_RULES)


def _product(
    state: TraceState, equation: str, left: Tensor, right: Tensor, labels: tuple[Labels, Labels]
) -> Labels:
    """A sum of products in the notation of ``torch.einsum``; dimensions of one name meet."""
    operands, result = equation.split("->")
    first, second = operands.split(",")
    names = list(dict.fromkeys(first + second))  # rows stay before columns
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


@rule("mm")
def _mm(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    return _multiply(state, "nk,km->nm", args[0], args[1])


@rule("mv")
def _mv(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    return _multiply(state, "nk,k->n", args[0], args[1])


@rule("bmm")
def _bmm(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    return _multiply(state, "bnk,bkm->bnm", args[0], args[1])


@rule("linear")
def _linear(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    lead = "abcdefg"[: args[0].dim() - 1]
    labels = _multiply(state, f"{lead}k,mk->{lead}m", args[0], args[1])
    bias = args[2] if len(args) > 2 else None
    return _add_bias(state, labels, out, bias)


@rule("addmm", "baddbmm")
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


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def _convolution(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    tensor, weight, bias = args[:3]
    transposed, num_groups = bool(args[6]), int(args[8])
    state.pin_others(tensor, [1], f"its channels are mixed in {state.operator}")
    out_dim = 1 if transposed else 0
    made, read = state.along(weight, out_dim), state.along(weight, 1 - out_dim)
    given = state.along(tensor, 1)
    num_in = tensor.shape[1]
    depthwise = num_groups > 1 and num_groups == num_in
    if depthwise and transposed:
        return _depthwise_transposed(state, tensor, weight, bias, out)
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
    labels: Labels = (made.reshape(one_dimension(out.dim(), 1)),)
    return _with_bias(state, labels, bias)


def _depthwise_transposed(
    state: TraceState, tensor: Tensor, weight: Tensor, bias: Any, out: Tensor
) -> Labels:
    """Each channel of the input makes some of its own: dimension 1 of the weight, all stay."""
    state.use(weight, 0, "scale")
    extra, given, own = state.along(weight, 1), state.along(tensor, 1), state.along(weight, 0)
    if extra is not None:
        state.ties.pin(extra, "is the number of channels that each channel makes")
    if own is None:
        if given is not None:
            state.ties.pin(given, f"meets a weight of fixed size in {state.operator}")
        return ()
    if given is None:
        state.ties.pin(own, "reads the model's input or a tensor of fixed size")
    else:
        state.ties.tie(given, own)
    made = np.repeat(own, weight.shape[1])
    return _with_bias(state, (made.reshape(one_dimension(out.dim(), 1)),), bias)


def _with_bias(state: TraceState, labels: Labels, bias: Any) -> Labels:
    """What a convolution makes, tied to its bias."""
    if isinstance(bias, Tensor):
        state.use(bias, 0, "out")
        theirs = state.along(bias, 0)
        if theirs is not None:
            state.ties.tie(labels[0].ravel(), theirs)
        else:
            state.ties.pin(labels[0], f"meets a tensor of fixed size in {state.operator}")
    return labels


@rule("embedding")
def _embedding(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    weight = args[0]
    state.use(weight, 1, "out")
    rows, columns = state.along(weight, 0), state.along(weight, 1)
    if rows is not None:
        state.ties.pin(rows, "is looked up by number")
    return () if columns is None else (columns.reshape(one_dimension(out.dim(), out.dim() - 1)),)


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention",
    "scaled_dot_product_attention", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def _attention(state: TraceState, args: Sequence[Any], out: Any) -> Labels:
    query, key, value = args[:3]
    if query.dim() != 4 or query.shape[1] != key.shape[1]:
        for tensor in (query, key, value):
            state.ties.pin_all(state.labels(tensor), f"heads are shared in {state.operator}")
        return ()
    scores = _multiply(state, "bhlk,bhsk->bhls", query, key)
    weights = torch.empty(*query.shape[:-1], key.shape[-2], device="meta")
    return _product(state, "bhls,bhsd->bhld", weights, value, (scores, state.labels(value)))
