"""What a user declares about a search: targets, candidates, scoring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lit_compress.compress.layers import check_is_list
from lit_compress.search.problem import Budget
from lit_compress.search.search_result import Space

__all__ = ["CandidateSettings", "Precision", "ScoringSettings", "SearchTarget", "Split"]

Split: TypeAlias = Literal["train", "val"]
Precision: TypeAlias = Literal["auto", "bf16", "trainer"]

_TARGETS_OF: dict[Space, tuple[str, ...]] = {
    "channels": (
        "target_macs_ratio",
        "target_params_ratio",
        "target_size_bytes",
        "target_latency_ms",
    ),
    "sparsity": ("final_sparsity",),
    "bits": ("mean_weight_bits", "target_size_bytes"),
}
_COSTS = {
    "target_macs_ratio": "macs",
    "target_params_ratio": "num_params",
    "target_size_bytes": "size_bytes",
    "target_latency_ms": "latency_ms",
    "mean_weight_bits": "mean_bits",
}


@dataclass(frozen=True)
class SearchTarget:
    """The budget of a search, as a user declares it; at most one of these.

    Attributes:
        target_macs_ratio: MACs kept ÷ dense, in (0, 1).
        target_params_ratio: Parameters kept ÷ dense, in (0, 1).
        target_size_bytes: Bytes of the weights.
        target_latency_ms: Milliseconds of one forward pass of one example, by a measured table.
        final_sparsity: Zeros ÷ weights of all searched layers together, in (0, 1).
        mean_weight_bits: Bits of a weight on average, in (2, 8).

    Raises:
        ValueError: If more than one is given, or one is out of range.
    """

    target_macs_ratio: float | None = None
    target_params_ratio: float | None = None
    target_size_bytes: int | None = None
    target_latency_ms: float | None = None
    final_sparsity: float | None = None
    mean_weight_bits: float | None = None

    def __post_init__(self) -> None:
        for name in self.given:
            _check_target(name, getattr(self, name))
        if len(self.given) > 1:
            raise ValueError(
                f"{' and '.join(self.given)} are given; a search has one budget, give one of them."
            )

    @property
    def given(self) -> tuple[str, ...]:
        """The names of the targets that are given: none or one."""
        return tuple(name for name, value in vars(self).items() if value is not None)

    def check(self, space: Space, reward_needs_budget: bool) -> None:
        """Refuse a target that is none of a space, or none where one is needed.

        Raises:
            ValueError: In these cases; those that fit are named.
        """
        fitting = _TARGETS_OF[space]
        for name in self.given:
            if name not in fitting:
                raise ValueError(
                    f"{name} is given, and the search is over {space}; its target is one of "
                    f"{', '.join(fitting)}."
                )
        if not self.given and (reward_needs_budget or space == "sparsity"):
            raise ValueError(
                f"a search over {space} by its score alone needs a target, or keeping everything "
                f"would win; give {' or '.join(fitting)}"
                + (", or reward='error_log_macs'." if space == "channels" else ".")
            )

    def budget(self, full_costs: Mapping[str, float]) -> Budget | None:
        """The budget for a model.

        Args:
            full_costs: What the dense model costs, by name.
        """
        if not self.given:
            return None
        (name,) = self.given
        value = float(getattr(self, name))
        if name == "final_sparsity":
            return Budget("weights", float(round((1 - value) * full_costs["weights"])))
        cost = _COSTS[name]
        return Budget(cost, value * full_costs[cost] if name.endswith("_ratio") else value)


@dataclass(frozen=True)
class CandidateSettings:
    """How the networks that are tried are made.

    Attributes:
        round_to: Channels kept are multiples of it where a group has more.
        min_preserve_ratio: No group keeps a smaller share of its channels, in (0, 1].
        importance: Which channels stay; see
            :func:`~lit_compress.compress.channels.importance.channel_importance`.
        num_calibration_batches: Training batches for least squares; 0 for plain cuts.
        ignored_layers: Name patterns of layers to leave whole. Patterns match names in
            the LightningModule and in its network: ``"model.layer1.*"`` or ``"layer1.*"``.

    Raises:
        ValueError: If a value is out of range.
    """

    round_to: int = 8
    min_preserve_ratio: float = 0.2
    importance: str = "group"
    num_calibration_batches: int = 24
    ignored_layers: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_is_list("ignored_layers", self.ignored_layers)
        object.__setattr__(self, "ignored_layers", tuple(self.ignored_layers))
        if self.num_calibration_batches < 0:
            raise ValueError(
                f"num_calibration_batches is {self.num_calibration_batches}, expected at least 0."
            )


@dataclass(frozen=True)
class ScoringSettings:
    """What candidates are scored on, and how.

    Attributes:
        split: ``"train"``: examples of the training data, other ones than those of calibration,
            with the transforms of training. ``"val"``: the validation data, which must be split
            from training then and must not be those that the final model is judged by.
        num_examples: How many at most, drawn at random, the same for all candidates; of the
            training data the first that it gives.
        race: Whether hopeless candidates are given up early.
        precision: ``"trainer"``: the Trainer's. ``"bf16"``: bfloat16. ``"auto"``: bfloat16 where it
            is faster here and ranks a few candidates alike. The best are scored once more in the
            Trainer's in any case.

    Raises:
        ValueError: If a value is out of range.
    """

    split: Split = "train"
    num_examples: int = 5000
    race: bool = True
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.split not in ("train", "val"):
            raise ValueError(f"split is {self.split!r}, expected 'train' or 'val'.")
        if self.precision not in ("auto", "bf16", "trainer"):
            raise ValueError(
                f"precision is {self.precision!r}, expected 'auto', 'bf16' or 'trainer'."
            )
        if isinstance(self.num_examples, bool) or self.num_examples < 1:
            raise ValueError(f"num_examples is {self.num_examples!r}, expected at least 1.")


def _check_target(name: str, value: float) -> None:
    ranges = {"final_sparsity": (0.0, 1.0), "mean_weight_bits": (2.0, 8.0)}
    low, high = ranges.get(name, (0.0, 1.0 if name.endswith("_ratio") else math.inf))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low < value < high:
        expected = "a number above 0" if high == math.inf else f"a number in ({low:g}, {high:g})"
        raise ValueError(f"{name} is {value!r}, expected {expected}.")
