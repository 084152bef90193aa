"""Select weights by layer type and name pattern, with the reason for each that is skipped."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

import torch
from torch import nn
from torch.nn.utils import parametrize

from lit_compress.compress.sparsity.patterns import SparsityPattern

__all__ = [
    "LayerType",
    "Selection",
    "SkippedWeight",
    "check_is_list",
    "first_match",
    "match_layers",
    "plain_name",
    "select_weights",
]

LayerType = Literal["conv", "depthwise", "linear", "attention", "recurrent", "embedding"]
LAYER_TYPES: tuple[str, ...] = get_args(LayerType)

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def check_is_list(name: str, value: object) -> None:
    """A string where a list of them belongs would be taken for a list of its letters.

    Raises:
        ValueError: If ``value`` is a string.
    """
    if isinstance(value, str):
        raise ValueError(f"{name} is the string {value!r}; give a list, as in [{value!r}].")


def plain_name(name: str) -> str:
    """A qualified name as it was before ``torch.compile`` wrapped a part of the module."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def match_layers(
    argument: str, patterns: Iterable[str], names: Iterable[str], prefix: str = ""
) -> dict[str, str]:
    """Find the layers that name patterns take; every callback and command chooses layers by it.

    Patterns match names in the LightningModule and in its network: ``"model.layer1.*"`` or
    ``"layer1.*"``. A pattern that is itself a name in the network takes that layer alone. Names are
    those before ``torch.compile``.

    Args:
        argument: The argument that holds the patterns, for the message.
        patterns: ``*`` stands for any characters, ``?`` for one, ``[ab]`` for one of these.
        names: Names of layers in the network.
        prefix: The network's dotted name in the LightningModule; empty where that is the network.

    Returns:
        The names that are matched, in the order given, each with the first pattern that matches it.

    Raises:
        ValueError: If a pattern matches no layer; the nearest names are given.

    Examples:
        >>> match_layers("ignored_layers", ["model.a.*", "?"], ["a.conv", "a.fc", "b"], "model")
        {'a.conv': 'model.a.*', 'a.fc': 'model.a.*', 'b': '?'}
    """
    plain = {name: plain_name(name) for name in names}
    full = {name: f"{prefix}.{short}".strip(".") for name, short in plain.items()}
    first: dict[str, str] = {}
    for pattern in patterns:
        taken = [n for n in plain if pattern in (plain[n], glob.escape(plain[n]))] or [
            n for n in plain if fnmatchcase(plain[n], pattern) or fnmatchcase(full[n], pattern)
        ]
        if not taken:
            spelled = full if prefix and pattern.startswith(f"{prefix}.") else plain
            raise _unmatched_pattern(argument, pattern, list(spelled.values()))
        for name in taken:
            first.setdefault(name, pattern)
    return {name: first[name] for name in plain if name in first}


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first of some patterns that matches one name, or ``None``; for patterns that are stored.

    What users write goes through :func:`match_layers`, which knows both of a layer's names.
    """
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def _unmatched_pattern(argument: str, pattern: str, names: list[str]) -> ValueError:
    """The error for a name pattern that matches no layer, with the nearest names there are."""
    alike = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.3)
    return ValueError(
        f"{argument} holds the pattern {pattern!r}, which matches none of the {len(names)} layers "
        f"there are to choose from; the nearest names are "
        f"{', '.join(map(repr, alike or names[:3])) or 'none'}."
    )


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
        taken_by: For each name the first pattern of ``layers`` that matches its layer; empty where
            there are no such patterns.
    """

    names: tuple[str, ...]
    skipped: tuple[SkippedWeight, ...]
    num_other: int
    taken_by: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.names)} weights are made sparse."]
        if self.skipped:
            lines.append("Left dense:")
            lines += [f"  {s.name}: {s.reason}" for s in self.skipped]
        if self.num_other:
            lines.append(f"  {self.num_other} biases and norm parameters: never pruned")
        return "\n".join(lines)


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
    network: str = "",
    prefix: str = "",
) -> Selection:
    """Choose the weights to be made sparse by name and by type.

    Args:
        module: The module to look into.
        layers: Name patterns of the layers to take; all by default. See :func:`match_layers`.
        ignored_layers: Name patterns of the layers to skip.
        layer_types: The kinds of layers to take: ``"conv"``, ``"depthwise"``, ``"linear"``,
            ``"attention"`` (the packed projections of ``nn.MultiheadAttention``), ``"recurrent"``
            and ``"embedding"``.
        pattern: A sparsity pattern; weights that it does not fit are skipped.
        network: Dotted name of the network in the module, where the module is a LightningModule.
        prefix: Dotted name of the module in a LightningModule, where the module is a network.

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
    found: list[tuple[str, str, nn.Module, torch.Tensor]] = []
    num_other = 0
    for owner_name, owner in module.named_modules():
        if isinstance(owner, parametrize.ParametrizationList):
            continue
        for short, parameter in _named_weights(owner):
            lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
            if lazy or parameter.dim() >= 2:
                found.append((plain_name(owner_name), short, owner, parameter))
            else:
                num_other += 1
    inside = {layer: f"{layer}.".removeprefix(f"{network}.").rstrip(".") for layer, *_ in found}
    taken, ignored = (
        match_layers(argument, patterns or (), inside.values(), prefix or network)
        for argument, patterns in (("layers", layers), ("ignored_layers", ignored_layers))
    )
    names: list[str] = []
    skipped: list[SkippedWeight] = []
    seen: dict[int, str] = {}  # parameters that are shared between layers count once
    for layer, short, owner, parameter in found:
        name = f"{layer}.{short}".lstrip(".")
        kind = layer_type(owner, short)
        if kind in layer_types and inside[layer] in ignored:
            reason: str | None = "matches ignored_layers"
        elif kind in layer_types and layers is not None and inside[layer] not in taken:
            reason = "matches none of layers"
        else:
            reason = _reason_to_skip(kind, owner, short, parameter, layer_types, pattern)
        if reason is None and id(parameter) in seen:
            reason = f"is the same tensor as {seen[id(parameter)]}"
        if reason is None:
            seen[id(parameter)] = name
            names.append(name)
        else:
            skipped.append(SkippedWeight(name, reason))
    if not names:
        raise ValueError(
            "no layer is left to be made sparse; name other layers or layer_types.\n"
            + "\n".join(f"  {s.name}: {s.reason}" for s in skipped)
        )
    taken_by = {name: taken[inside[name.rpartition(".")[0]]] for name in names if taken}
    return Selection(tuple(names), tuple(skipped), num_other, taken_by)


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
    kind: str | None,
    owner: nn.Module,
    short: str,
    parameter: torch.Tensor,
    layer_types: Sequence[str],
    pattern: SparsityPattern | None,
) -> str | None:
    if kind is None:
        return f"{type(owner).__name__} is no layer type that can be made sparse"
    if kind not in layer_types:
        return f"its type, {kind}, is not among layer_types"
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
