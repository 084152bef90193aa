"""Tie the channels of attention whose code takes the width of its heads from its input.

Code such as ``x.view(batch, length, heads, width // heads)`` holds a tie that no operator shows:
queries, keys and values have to be as wide as what they are made of. There the residual width, the
queries, the keys and the values lose the same channels, as many in each head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from torch import nn

from lit_compress.compress.channels.grouping import AxisKey, Evidence
from lit_compress.compress.channels.groups import ChannelWidth

__all__ = ["tie_heads"]

_NUM_HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads")
_WIDTHS = ("hidden_dim", "hidden_size", "embed_dim", "dim", "d_model", "all_head_size")
_HEAD_WIDTHS = ("head_dim", "head_size", "attention_head_size")


def tie_heads(evidence: Evidence) -> Evidence | None:
    """Tie what attention modules make to what they read, channel by channel.

    Attention modules are the innermost ones that have a number of heads. Attributes of them and of
    the modules around them that hold the width or a head's width under a usual name are to follow.

    Args:
        evidence: What a trace found out. Its ties are added to.

    Returns:
        The evidence with those attributes; ``None`` if there was nothing to tie.
    """
    widths: dict[tuple[str, str], ChannelWidth] = {}
    tied = False
    for name, module in evidence.model.named_modules():
        heads = _num_heads(module)
        inner = (m for m in module.modules() if m is not module)
        if heads is None or any(_num_heads(m) is not None for m in inner):
            continue
        for tensor, size in _tie_weights(evidence, name, heads):
            tied = True
            for width in _follow(evidence.model, name, heads, tensor, size):
                widths.setdefault((width.module, width.attribute), width)
    return replace(evidence, widths=tuple(widths.values())) if tied else None


def _num_heads(module: nn.Module) -> int | None:
    values = [vars(module).get(attribute) for attribute in _NUM_HEADS]
    return next((value for value in values if type(value) is int and value > 0), None)


def _tie_weights(evidence: Evidence, name: str, heads: int) -> Iterator[tuple[str, int]]:
    """Tie each projection's outputs to its inputs; yields the weights and the width."""
    ties = evidence.state.ties
    prefix = f"{name}." if name else ""
    projections = {
        tensor: (made, evidence.axes[tensor, 1])
        for (tensor, dim), made in evidence.axes.items()
        if dim == 0
        and tensor.startswith(prefix)
        and (evidence.role((tensor, 0)) == "out" and _is_read(evidence, (tensor, 1)))
    }
    # Keys and values may be made of something else, of another width.
    width = min((made.size for made, _ in projections.values()), default=0)
    for tensor, (made, read) in projections.items():
        if read.size == width and width % heads == 0 and made.size % width == 0:
            ties.tie(np.tile(read, made.size // width), made)
            ties.bond(read.reshape(heads, -1))
            yield tensor, width


def _is_read(evidence: Evidence, key: AxisKey) -> bool:
    return key in evidence.axes and evidence.role(key) == "in"


def _follow(
    model: nn.Module, name: str, heads: int, tensor: str, size: int
) -> Iterator[ChannelWidth]:
    parts = name.split(".") if name else []
    for depth in range(len(parts), -1, -1):
        place = ".".join(parts[:depth])
        module = model.get_submodule(place)
        if isinstance(module, nn.MultiheadAttention):
            continue  # follows by itself
        for attribute in _WIDTHS:
            if vars(module).get(attribute) == size:
                yield ChannelWidth(place, attribute, tensor, 1)
        for attribute in _HEAD_WIDTHS:
            if vars(module).get(attribute) == size // heads:
                yield ChannelWidth(place, attribute, tensor, 1, heads)
