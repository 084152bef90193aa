"""Put linear layers on torchao's integer kernels: int8 dynamic, int8 and int4 weights only.

The layers stay ``nn.Linear`` under their names; each weight becomes one of torchao's tensors, which
brings its own matrix product. This is the only file that knows torchao.

On a CPU (one thread, VNNI, an MLP of a small ViT on 197 tokens): ``"int8_dynamic"`` is 2.5 to 3
times as fast as float32 and a quarter of the size, but slower on a single row, where finding its
scale takes longer than the product; ``"int8_weight_only"`` is a quarter of the size and no faster;
``"int4_weight_only"`` is a sixth of the size and computes in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from lit_compress.compress.layers import match_layers

__all__ = [
    "LinearKernels",
    "LinearKind",
    "apply_linear_kernels",
    "quantize_linears",
    "remove_linear_kernels",
    "torchao_weights_readable",
]

LinearKind = Literal["int8_dynamic", "int8_weight_only", "int4_weight_only"]

GROUP_SIZES = (32, 64, 128)  # of input features, as torch's int4 kernel for the CPU has them
_OUT_FEATURES_INT4 = 16  # the int4 kernel takes weights in blocks of so many output features


@dataclass(frozen=True)
class LinearKernels:
    """Which layers run on torchao's kernels; plain data apart from its type.

    Attributes:
        kind: What was done to the layers.
        group_size: Input features that share a scale in ``"int4_weight_only"``; ``None`` for the
            others, which have one scale for each output feature.
        quantized: Qualified names of the layers, in the network's order.
        skipped: The other linear layers by name, each with the reason in words.
    """

    kind: LinearKind
    group_size: int | None
    quantized: tuple[str, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.quantized)} linear layers are {self.kind}."]
        if self.skipped:
            lines.append("Left as they were:")
            lines += [
                f"  {name or '(the network itself)'}: {r}" for name, r in self.skipped.items()
            ]
        return "\n".join(lines)

    def to_plain(self) -> dict[str, Any]:
        """Dictionaries, lists, numbers and strings, for JSON or a checkpoint."""
        return {
            "kind": self.kind,
            "group_size": self.group_size,
            "quantized": list(self.quantized),
            "skipped": dict(self.skipped),
        }

    @classmethod
    def from_plain(cls, plain: Any) -> LinearKernels:
        """What :meth:`to_plain` gave, also after a turn through JSON.

        Raises:
            ValueError: If it is anything else.
        """
        try:
            kernels = cls(
                plain["kind"],
                plain["group_size"],
                tuple(str(name) for name in plain["quantized"]),
                {str(name): str(reason) for name, reason in plain["skipped"].items()},
            )
            _check_kind(kernels.kind, kernels.group_size)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{str(plain)[:200]!r} is no record of linear kernels ({error}); expected "
                "{'kind': ..., 'group_size': ..., 'quantized': [...], 'skipped': {...}} as "
                "LinearKernels.to_plain has it."
            ) from error
        return kernels


def quantize_linears(
    network: nn.Module,
    kind: LinearKind = "int8_dynamic",
    *,
    ignored_layers: Sequence[str] = (),
    prefix: str = "",
    group_size: int = 32,
) -> LinearKernels:
    """Put the weights of linear layers on integer kernels, in place.

    The network is for inference then: the float weights are gone, and torchao's int8 dynamic
    product passes no gradient to its input, without a word. The state dict loads into a network
    that went through :func:`apply_linear_kernels`, and its file opens inside of
    :func:`torchao_weights_readable`.

    Args:
        network: Floating-point ``nn.Linear`` layers in it are taken, but those named, those whose
            weight another layer shares, and the output projection of ``nn.MultiheadAttention``,
            whose weight is read without a call of the layer.
        kind: ``"int8_dynamic"``: weights symmetric int8, one scale for each output feature;
            inputs int8, one scale a row, found at each call; integer products.
            ``"int8_weight_only"``: the same weights, float products. ``"int4_weight_only"``:
            unsigned 4-bit weights with a float offset for each group, products in bfloat16 (inputs
            and outputs keep their type), on the CPU only; zeros of a sparse weight do not stay
            zero. A layer whose weight the network reads without a call of the layer, as
            torchvision's Swin does in its attention, then fails: name it in ``ignored_layers``.
        ignored_layers: Name patterns of layers to skip; see
            :func:`~lit_compress.compress.layers.match_layers`.
        prefix: Dotted name of the network in a LightningModule, which patterns may begin with.
        group_size: 32, 64 or 128 input features that share a scale; only for int4.

    Returns:
        The layers that were taken, and the others with the reasons.

    Raises:
        ValueError: If the kind or the group size is unknown, a pattern matches no linear layer, a
            weight holds NaN or infinite values, or no layer is left.
        ModuleNotFoundError: If torchao is missing or has no kernels of this kind.
    """
    size = group_size if kind == "int4_weight_only" else None
    _check_kind(kind, size)
    taken, skipped = _chosen(network, size, ignored_layers, prefix)
    for name, layer in taken.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise ValueError(
                f"{name + '.weight'!r} holds NaN or infinite values; load the weights of a run "
                "that did not diverge."
            )
    _put_on_kernels(taken, kind, size)
    return LinearKernels(kind, size, tuple(taken), skipped)


def apply_linear_kernels(network: nn.Module, kernels: LinearKernels) -> None:
    """Give a float network the kernels of another one, so that it takes that one's state dict.

    Args:
        network: A network of the same structure, in place; the values of its weights do not matter.
        kernels: What :func:`quantize_linears` returned for the other.

    Raises:
        ValueError: If a layer is missing, or is no linear layer with a float weight; nothing was
            changed then.
        ModuleNotFoundError: If torchao is missing or has no kernels of this kind.
    """
    modules = dict(network.named_modules())
    layers: dict[str, nn.Linear] = {}
    for name in kernels.quantized:
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear) or not _has_plain_weight(layer):
            kind = "missing" if layer is None else f"a {type(layer).__name__} without float weight"
            raise ValueError(
                f"the record puts {name!r} on {kernels.kind} kernels, but in this "
                f"{type(network).__name__} it is {kind}. Apply the record to a float network built "
                "as the quantized one was."
            )
        layers[name] = layer
    _put_on_kernels(layers, kernels.kind, kernels.group_size)


def remove_linear_kernels(network: nn.Module, kernels: LinearKernels) -> None:
    """Give layers on torchao's kernels empty float32 weights, for a state dict to fill.

    Args:
        network: From :func:`quantize_linears` or :func:`apply_linear_kernels`, in place.
        kernels: The record of that.
    """
    for name in kernels.quantized:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [k for k, h in hooks.items() if isinstance(h, _InputsTo | _OutputTo)]:
                del hooks[key]
        empty = torch.zeros(layer.out_features, layer.in_features, device=layer.weight.device)
        layer.weight = nn.Parameter(empty)
        layer.float()


@contextmanager
def torchao_weights_readable() -> Iterator[None]:
    """Inside, ``torch.load(..., weights_only=True)`` opens state dicts of quantized layers.

    They hold torchao's tensor classes, which torch loads only where they were declared safe.

    Raises:
        ModuleNotFoundError: If torchao is missing.
    """
    quantization = _torchao("quantization")
    int8 = _torchao("quantization.quantize_.workflows.int8.int8_tensor")
    classes = [
        quantization.Int8Tensor,
        int8.QuantizeTensorToInt8Kwargs,
        quantization.PerRow,
        quantization.MappingType,
        _torchao("prototype.quantization.int4.int4_opaque_tensor").Int4OpaqueTensor,
    ]
    with torch.serialization.safe_globals(classes):
        yield


def _check_kind(kind: str, group_size: int | None) -> None:
    if kind not in get_args(LinearKind):
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(get_args(LinearKind))}.")
    if kind == "int4_weight_only" and group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size!r}, expected one of {GROUP_SIZES}.")


def _chosen(
    network: nn.Module, group_size: int | None, ignored_layers: Sequence[str], prefix: str
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The layers to quantize, and the reasons why others are not; at least one is left."""
    linears = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    ignored = match_layers("ignored_layers", ignored_layers, linears, prefix)
    users = _users_of_weights(network)
    reasons = {
        name: "matches ignored_layers"
        if name in ignored
        else _reason_to_skip(name, layer, group_size, users)
        for name, layer in linears.items()
    }
    taken = {name: layer for name, layer in linears.items() if reasons[name] is None}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    if not taken:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"no linear layer is left to quantize ({len(linears)} in the network). Convolutions "
            f"are quantized by the other methods, static or by training.{listed}"
        )
    return taken, skipped


def _users_of_weights(network: nn.Module) -> dict[int, list[str]]:
    """For each parameter, by its id, the names under which modules hold it."""
    users: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    return users


def _has_plain_weight(layer: nn.Linear) -> bool:
    weight = layer._parameters.get("weight")
    plain = type(weight) is nn.Parameter and type(weight.data) is Tensor
    return plain and layer.weight.is_floating_point()


def _reason_to_skip(
    name: str,
    layer: nn.Linear,
    group_size: int | None,
    users: Mapping[int, list[str]],
) -> str | None:
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "its weight is read by nn.MultiheadAttention, which does not call the layer"
    if parametrize.is_parametrized(layer, "weight"):
        return "its weight is computed by a parametrization; remove it first"
    if isinstance(layer.weight, nn.parameter.UninitializedParameter):
        return "is not initialised yet (a lazy module): run one batch through it first"
    if not _has_plain_weight(layer):
        return f"its weight is a {type(layer.weight.data).__name__} and no float parameter"
    shared = [user for user in users[id(layer.weight)] if user != f"{name}.weight".lstrip(".")]
    if shared:
        return f"its weight is the same tensor as {shared[0]}"
    if layer.weight.numel() == 0:
        return "its weight is empty"
    if group_size is None:
        return None
    if layer.weight.device.type != "cpu":
        return f"the int4 kernel runs on the CPU, and the weight is on {layer.weight.device}"
    if layer.in_features % group_size:
        return f"its {layer.in_features} input features are no multiple of group_size {group_size}"
    if layer.out_features % _OUT_FEATURES_INT4:
        return (
            f"its {layer.out_features} output features are no multiple of {_OUT_FEATURES_INT4}, "
            "as the int4 kernel needs them"
        )
    return None


def _put_on_kernels(
    layers: Mapping[str, nn.Linear], kind: LinearKind, group_size: int | None
) -> None:
    quantization = _torchao("quantization")
    # torchao would also set options of inductor for the whole process.
    if kind == "int8_dynamic":
        config = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    elif kind == "int8_weight_only":
        config = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    else:
        int4 = _torchao("prototype.quantization.int4.inference_workflow")
        config = int4.PrototypeInt4WeightOnlyConfig(
            group_size=group_size, set_inductor_config=False
        )
    for layer in layers.values():
        if kind == "int4_weight_only":
            _compute_in_bfloat16(layer)
        quantization.quantize_(layer, config, filter_fn=lambda module, name: name == "")
        # torchao's own description of the layer; a copy of the layer would keep this one alive.
        layer.__dict__.pop("extra_repr", None)


def _compute_in_bfloat16(layer: nn.Linear) -> None:
    """Around the call of a layer, cast to bfloat16 and back, its weight too.

    torch 2.13 has a fast int4 product on the CPU in bfloat16 only; in float32 it is a hundred times
    slower than the float product that it replaces.
    """
    dtype = layer.weight.dtype
    if dtype != torch.bfloat16:
        layer.to(torch.bfloat16)
        layer.register_forward_pre_hook(_InputsTo(torch.bfloat16))
        layer.register_forward_hook(_OutputTo(dtype))


@dataclass(frozen=True)
class _InputsTo:
    """A hook before the call; a class, not a closure, so that copies and pickles of it work."""

    dtype: torch.dtype

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.to(self.dtype) for x in args)


@dataclass(frozen=True)
class _OutputTo:
    dtype: torch.dtype

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.to(self.dtype)


def _torchao(module: str) -> ModuleType:
    """A module of torchao, imported when it is needed."""
    try:
        return import_module(f"torchao.{module}")
    except ModuleNotFoundError as error:
        if error.name == "torchao":
            raise ModuleNotFoundError(
                "kernels for linear layers come from torchao, which is not installed: "
                'pip install "lit-compress[torchao]"',
                name="torchao",
            ) from error
        raise ModuleNotFoundError(
            f"the installed torchao has no {error.name}; this was written for torchao 0.18: "
            'pip install "lit-compress[torchao]" "torchao>=0.18"',
            name=error.name,
        ) from error
