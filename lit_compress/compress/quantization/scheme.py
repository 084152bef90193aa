"""QuantizationScheme: the bits, ranges and layers that a user declares."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

from lit_compress.compress.layers import check_is_list, first_match, match_layers
from lit_compress.compress.quantization.affine import Grid
from lit_compress.compress.quantization.saturation import may_saturate

__all__ = ["ActivationRanges", "QuantizationScheme", "WeightRanges"]

WeightRanges: TypeAlias = Literal["minmax", "mse", "learned"]
"""How the range of a weight's channel is found.

``"minmax"`` follows the largest magnitude; ``"mse"`` is what least squares says once, at
calibration; ``"learned"`` starts from that and is trained (LSQ).
"""
ActivationRanges: TypeAlias = Literal["observed", "learned", "dynamic"]
"""How the range of an activation is found.

``"observed"``: by calibration, and by a moving average during training. ``"learned"``: trained from
there on (LSQ). ``"dynamic"``: of each batch again, for the inputs of layers only.
"""


@dataclass(frozen=True)
class QuantizationScheme:
    """Bits, ranges and layers.

    Attributes:
        weight_bits: Bits of weights, 2 to 8; a layer has one scale for each output channel.
        activation_bits: Bits of activations, 2 to 8, or ``None`` for weights only.
        layer_bits: Bits of weights by name pattern of the layer, for mixed precision; the first
            pattern that matches counts, the others get ``weight_bits``. See
            :func:`~lit_compress.compress.layers.match_layers`.
        weight_ranges: See :data:`WeightRanges`.
        activation_ranges: See :data:`ActivationRanges`.
        ignored_layers: Name patterns of layers that stay in floating point.
        quantize_first_layer: Whether the first layer is quantized.
        quantize_last_layer: Whether the last layer is quantized.
        per_tensor_weights: Names of weights with one scale for all channels, so that equal values
            stay equal across channels; those of clustered layers.
        avoid_saturation: Whether scales of 8-bit weights are large enough that the products of two
            weights never exceed 16 bits, which x86 processors without VNNI add them in. Integer
            files are then right, and as fast as they can be, on every processor; see
            :mod:`~lit_compress.compress.quantization.saturation`. Nothing changes below 8 bits.

    Raises:
        ValueError: If a value is out of range or of the wrong kind.
    """

    weight_bits: int = 8
    activation_bits: int | None = 8
    layer_bits: Mapping[str, int] = field(default_factory=dict)
    weight_ranges: WeightRanges = "minmax"
    activation_ranges: ActivationRanges = "observed"
    ignored_layers: Sequence[str] = ()
    quantize_first_layer: bool = True
    quantize_last_layer: bool = True
    per_tensor_weights: Sequence[str] = ()
    avoid_saturation: bool = True

    def __post_init__(self) -> None:
        _check_bits("weight_bits", self.weight_bits)
        if self.activation_bits is not None:
            _check_bits("activation_bits", self.activation_bits)
        if not isinstance(self.layer_bits, Mapping):
            raise ValueError(
                f"layer_bits is {self.layer_bits!r}; give a mapping from name patterns to bits, as "
                "in {'layer4.*': 4}."
            )
        for pattern, bits in self.layer_bits.items():
            if not isinstance(pattern, str):
                raise ValueError(f"layer_bits has the key {pattern!r}; give a name pattern.")
            _check_bits(f"layer_bits[{pattern!r}]", bits)
        _check_choice("weight_ranges", self.weight_ranges, WeightRanges)
        _check_choice("activation_ranges", self.activation_ranges, ActivationRanges)
        for name in ("ignored_layers", "per_tensor_weights"):
            value = getattr(self, name)
            check_is_list(name, value)
            if not isinstance(value, Iterable) or not all(isinstance(v, str) for v in (*value,)):
                raise ValueError(
                    f"{name} is {value!r}; give a list of names, as in ['features.0']."
                )
            object.__setattr__(self, name, tuple(value))
        for name in ("quantize_first_layer", "quantize_last_layer", "avoid_saturation"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give true or false.")
        object.__setattr__(self, "layer_bits", dict(self.layer_bits))

    def with_per_tensor(self, names: Sequence[str]) -> QuantizationScheme:
        """The same with more weights that have one scale for all channels."""
        return replace(self, per_tensor_weights=(*self.per_tensor_weights, *names))

    def for_layers(self, names: Iterable[str], prefix: str = "") -> QuantizationScheme:
        """The same with the names of a network's layers in the place of the patterns.

        Args:
            names: Of all layers that can be quantized.
            prefix: Dotted name of the network in a LightningModule, which patterns may begin with.

        Raises:
            ValueError: If a pattern of ``ignored_layers`` or ``layer_bits`` matches no layer.
        """
        names = list(names)
        ignored = match_layers("ignored_layers", self.ignored_layers, names, prefix)
        matched = match_layers("layer_bits", self.layer_bits, names, prefix)
        bits = {glob.escape(name): self.layer_bits[key] for name, key in matched.items()}
        return replace(self, ignored_layers=[*map(glob.escape, ignored)], layer_bits=bits)

    def ignores(self, layer: str) -> bool:
        """Whether a layer stays in floating point because a user says so.

        Args:
            layer: The layer's name in the network.
        """
        return first_match(self.ignored_layers, layer) is not None

    def weight_grid(self, layer: str) -> Grid:
        """The integers for the weight of a layer.

        Args:
            layer: The layer's name in the network.
        """
        pattern = first_match(self.layer_bits, layer)
        bits = self.weight_bits if pattern is None else self.layer_bits[pattern]
        return Grid(bits, signed=True)

    @property
    def activation_grid(self) -> Grid | None:
        """The integers for activations; ``None`` where they stay in floating point."""
        return None if self.activation_bits is None else Grid(self.activation_bits, signed=False)

    def limits_pairs(self, layer: str) -> bool:
        """Whether the scales of a layer's weight have to keep two products within 16 bits.

        Args:
            layer: The layer's name in the network.
        """
        grid = self.activation_grid
        if grid is None or not self.avoid_saturation:
            return False
        return may_saturate(self.weight_grid(layer).high, grid.high)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> QuantizationScheme:
        """What :meth:`to_plain` gave; also before ``avoid_saturation`` existed.

        Raises:
            TypeError: If it has unknown parts.
            ValueError: If a value is out of range or of the wrong kind.
        """
        return cls(**{"avoid_saturation": False, **plain})

    def to_plain(self) -> dict[str, Any]:
        """As plain data for a checkpoint."""
        plain = dict(vars(self))
        plain["ignored_layers"] = list(self.ignored_layers)
        plain["per_tensor_weights"] = list(self.per_tensor_weights)
        plain["layer_bits"] = dict(self.layer_bits)
        return plain


def _check_bits(name: str, bits: Any) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{name} is {bits!r}; expected a whole number of bits from 2 to 8.")


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}.")
