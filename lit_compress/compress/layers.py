"""Select weights by layer type and name pattern, with the reason for each that is skipped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

import torch
from torch import nn
from torch.nn.utils import parametrize

from lit_compress.compress.sparsity.patterns import SparsityPattern

__all__ = ["LayerType", "Selection", "SkippedWeight", "refuse_bare_string", "select_weights"]

LayerType = Literal["conv", "depthwise", "linear", "attention", "recurrent", "embedding"]
LAYER_TYPES: tuple[str, ...] = get_args(LayerType)

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def refuse_bare_string(name: str, value: object) -> None:
    """A string where a list of them belongs would be taken for a list of its letters.

    Raises:
        ValueError: If ``value`` is a string.
    """
    if isinstance(value, str):
        raise ValueError(f"{name} is the string {value!r}; give a list, as in [{value!r}].")


@dataclass(frozen=True)
class SkippedWeight:
    """A weight that is left dense.

    Attributes:
        name: The parameter's qualified name.
        reason: Why, in words.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """The weights that were chosen and those that were not.

    Attributes:
        names: Qualified names of the parameters to be made sparse, in the module's order.
        skipped: The other parameters with two or more dimensions, each with the reason.
        num_other: Parameters with fewer dimensions (norms, biases), which are never chosen.
    """

    names: tuple[str, ...]
    skipped: tuple[SkippedWeight, ...]
    num_other: int

    def __str__(self) -> str:
        lines = [f"{len(self.names)} weights are made sparse."]
        if self.skipped:
            lines.append("Left dense:")
            lines += [f"  {s.name}: {s.reason}" for s in self.skipped]
        if self.num_other:
            lines.append(f"  {self.num_other} biases and norm parameters: never pruned")
        return "\n".join(lines)


def plain_name(name: str) -> str:
    """A qualified name as it was before ``torch.compile`` or DDP wrapped a part of the module."""
    return name.replace("_orig_mod.", "")


def layer_type(module: nn.Module, parameter: str) -> str | None:
    """The kind of layer that ``module.<parameter>`` is the weight of; ``None`` for none of them."""
    if isinstance(module, (*_CONV, *_CONV_TRANSPOSE)) and parameter == "weight":
        depthwise = module.groups > 1 and module.groups == module.in_channels
        return "depthwise" if depthwise else "conv"
    if isinstance(module, (nn.Linear, nn.Bilinear)) and parameter == "weight":
        return "linear"
    if isinstance(module, nn.MultiheadAttention) and parameter.endswith("proj_weight"):
        return "attention"
    if isinstance(module, nn.RNNBase) and parameter.startswith("weight_"):
        return "recurrent"
    if isinstance(module, nn.RNNCellBase) and parameter.startswith("weight_"):
        return "recurrent"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and parameter == "weight":
        return "embedding"
    return None


def select_weights(
    module: nn.Module,
    *,
    layers: Sequence[str] | None = None,
    ignored_layers: Sequence[str] | None = None,
    layer_types: Sequence[str] = ("conv", "linear", "attention", "recurrent"),
    pattern: SparsityPattern | None = None,
) -> Selection:
    """Choose the weights to be made sparse by name and by type.

    Args:
        module: The module to look into.
        layers: Name patterns (``*`` and ``?``) of the layers to take, matched against the
            qualified names of modules, as in ``"model.layer3.*"``; all by default.
        ignored_layers: Name patterns of the layers to leave alone.
        layer_types: The kinds of layers to take: ``"conv"``, ``"depthwise"``, ``"linear"``,
            ``"attention"`` (the packed projections of ``nn.MultiheadAttention``), ``"recurrent"``
            and ``"embedding"``.
        pattern: A sparsity pattern; weights that it does not fit are skipped.

    Returns:
        What was chosen and what was not, with the reasons.

    Raises:
        ValueError: If a type is unknown, a name pattern matches no layer, or nothing is left.
    """
    unknown = [t for t in layer_types if t not in LAYER_TYPES]
    if unknown:
        raise ValueError(
            f"layer_types holds {unknown[0]!r}, expected some of {', '.join(LAYER_TYPES)}."
        )
    names: list[str] = []
    skipped: list[SkippedWeight] = []
    num_other = 0
    owners: dict[str, str] = {}  # qualified names of the layers that have a weight
    seen: dict[int, str] = {}  # parameters that are shared between layers count once
    for owner_name, owner in module.named_modules():
        if isinstance(owner, parametrize.ParametrizationList):
            continue
        for short, parameter in _named_weights(owner):
            name = plain_name(f"{owner_name}.{short}" if owner_name else short)
            kind = layer_type(owner, short)
            lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
            if not lazy and parameter.dim() < 2:
                num_other += 1
                continue
            layer = name.rpartition(".")[0]
            owners.setdefault(layer, name)
            reason = _reason_to_skip(
                layer, kind, owner, short, parameter, layers, ignored_layers, layer_types, pattern
            )
            if reason is None and id(parameter) in seen:
                reason = f"is the same tensor as {seen[id(parameter)]}"
            if reason is None:
                seen[id(parameter)] = name
                names.append(name)
            else:
                skipped.append(SkippedWeight(name, reason))
    for what, globs in (("layers", layers), ("ignored_layers", ignored_layers)):
        for glob in globs or ():
            if not any(fnmatchcase(layer, glob) for layer in owners):
                raise _unmatched_pattern(what, glob, owners)
    selection = Selection(tuple(names), tuple(skipped), num_other)
    if not names:
        raise ValueError(
            "no layer is left to be made sparse; name other layers or layer_types.\n"
            + "\n".join(f"  {s.name}: {s.reason}" for s in skipped)
        )
    return selection


def _unmatched_pattern(what: str, glob: str, names: Iterable[str]) -> ValueError:
    """The error for a name pattern that matches no layer, with the nearest names there are."""
    names = list(names)
    nearest = difflib.get_close_matches(glob.replace("*", ""), names, n=3, cutoff=0.3) or names[:3]
    return ValueError(
        f"{what} holds the pattern {glob!r}, which matches none of the module's {len(names)} "
        f"layers; the nearest names are {', '.join(map(repr, nearest))}."
    )


def _named_weights(owner: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The module's own parameters, under the names by which the module itself uses them."""
    named: list[tuple[str, torch.Tensor]] = []
    for short, parameter in owner.named_parameters(recurse=False):
        original = short.removesuffix("_orig")  # torch.nn.utils.prune renames the parameter
        named.append((original if hasattr(owner, original) else short, parameter))
    if parametrize.is_parametrized(owner):
        parametrized = cast(nn.ModuleDict, owner.parametrizations)
        named += [(short, getattr(owner, short)) for short in parametrized]
    return named


def _reason_to_skip(
    layer: str,
    kind: str | None,
    owner: nn.Module,
    short: str,
    parameter: torch.Tensor,
    layers: Sequence[str] | None,
    ignored_layers: Sequence[str] | None,
    layer_types: Sequence[str],
    pattern: SparsityPattern | None,
) -> str | None:
    if kind is None:
        return f"{type(owner).__name__} is no layer type that can be made sparse"
    if kind not in layer_types:
        return f"its type, {kind}, is not among layer_types"
    if any(fnmatchcase(layer, glob) for glob in ignored_layers or ()):
        return "matches ignored_layers"
    if layers is not None and not any(fnmatchcase(layer, glob) for glob in layers):
        return "matches none of layers"
    if owner._parameters.get(short) is not parameter:
        return "is computed by a parametrization, which would undo a mask"
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "is not initialised yet (a lazy module): run one batch through it first"
    if not parameter.requires_grad:
        return "is frozen"
    if pattern is not None:
        if isinstance(owner, _CONV_TRANSPOSE) and str(pattern) != "unstructured":
            return f"pattern {pattern} is not defined for transposed convolutions"
        return pattern.misfit(parameter.shape)
    return None
