"""Compare the outputs of an exported file with those of torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from lit_compress.deploy.route import Tensors
from lit_compress.measure.table import aligned

__all__ = ["Parity", "ParityError", "ParityTolerance", "compare"]


class ParityError(ValueError):
    """A file computes something else than torch does."""


@dataclass(frozen=True)
class ParityTolerance:
    """From where on a file counts as right.

    The defaults lie between what exact files reach and what wrong ones do. Of trained CIFAR-10
    networks in int8 on 1,000 images, files that compute what torch computes have a cosine of .99998
    and a largest error of .8 %: single values that lie between two integers are rounded the other
    way. Files whose products saturate have .989 and 26 to 37 %. Networks with random weights
    magnify single roundings, and may need more.

    Attributes:
        max_error: Largest difference of two entries, as a part of the largest magnitude in torch's
            output, 0 to 1; of the worst output where there are several.
        cosine: Least cosine of the angle between the outputs of both, over all examples, 0 to 1;
            of the worst output where there are several.
        argmax_agreement: Least share of positions at which both have the same largest entry,
            0 to 1. One position may always differ: of two entries that are nearly equal either
            may be the greater.

    Raises:
        ValueError: If a number is out of range.
    """

    cosine: float = 0.999
    argmax_agreement: float = 0.95
    max_error: float = 0.02

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r}; expected a number from 0 to 1.")

    def check(self, parity: Parity, where: str) -> None:
        """Refuse what is beyond the tolerance.

        Args:
            parity: What was found.
            where: The file in words, for the message.

        Raises:
            ValueError: If torch's own outputs are not finite: nothing can be compared with them.
            ParityError: If a number is below the least one, or not a number.
        """
        if not parity.reference_is_finite:
            raise ValueError(
                f"{where} cannot be compared: the network gives NaN or infinity on check_inputs. "
                "The file was not kept. Give inputs on which its outputs are finite."
            )
        agreement = parity.argmax_agreement
        agrees = agreement is None or (
            agreement >= min(self.argmax_agreement, 1 - 1 / parity.num_positions)
        )
        near = parity.max_relative_error <= self.max_error
        if parity.cosine >= self.cosine and agrees and near:
            return
        shown = "no argmax" if agreement is None else f"argmax agreement {agreement:.4f}"
        raise ParityError(
            f"{where} does not compute what torch computes: cosine {parity.cosine:.5f} and {shown} "
            f"on {parity.num_examples} examples, largest error {parity.max_abs_error:.3g} "
            f"({100 * parity.max_relative_error:.2f} % of the largest output); expected at least "
            f"{self.cosine} and {self.argmax_agreement}, and at most {100 * self.max_error:g} %. "
            "The file was not kept. Give real inputs to compare on, export to another target, or "
            "leave the layers that lose most out of quantization (ignored_layers); a wider "
            "tolerance keeps the file."
        )


@dataclass(frozen=True)
class Parity:
    """How close the outputs of a file are to torch's.

    Attributes:
        cosine: Cosine of the angle between both, over all examples; the least one of several
            outputs. NaN where an output is not finite.
        max_abs_error: Largest difference of two entries.
        max_relative_error: The same as a part of the largest magnitude in torch's output; the
            largest one of several outputs. Infinite where an output is not finite.
        argmax_agreement: Share of positions (examples, pixels) at which both have the same
            largest entry in the class dimension: the second one, or the last one of a matrix
            a position. ``None`` where no output has one.
        num_examples: Examples compared.
        num_positions: Positions compared.
        reference_is_finite: Whether all of torch's outputs are.
    """

    cosine: float
    max_abs_error: float
    max_relative_error: float
    argmax_agreement: float | None
    num_examples: int
    num_positions: int
    reference_is_finite: bool = True

    def __str__(self) -> str:
        agreement = self.argmax_agreement
        rows = [
            ("cosine", f"{self.cosine:.6f}"),
            (
                "largest error",
                f"{self.max_abs_error:.3g} ({100 * self.max_relative_error:.2f} % of the largest "
                "output)",
            ),
            ("argmax agreement", "none" if agreement is None else f"{100 * agreement:.2f} %"),
            ("examples", str(self.num_examples)),
        ]
        return "\n".join(aligned(("against torch", ""), rows))


class _Sums:
    """Running sums over batches of one output."""

    def __init__(self) -> None:
        self.ours = self.theirs = self.both = 0.0
        self.same = self.positions = 0
        self.max_abs_error = self.largest = 0.0
        self.is_finite = True

    def add(self, reference: Tensor, candidate: Tensor) -> None:
        a, b = reference.double(), candidate.double()
        self.is_finite &= bool(a.isfinite().all())
        self.ours += float((a * a).sum())
        self.theirs += float((b * b).sum())
        self.both += float((a * b).sum())
        if a.numel():
            error = float((a - b).abs().max())
            self.max_abs_error = max(self.max_abs_error, error, key=_nan_last)
            self.largest = max(self.largest, float(a.abs().max()), key=_nan_last)
        if a.dim() >= 2 and a.shape[_class_dim(a)] > 1 and reference.is_floating_point():
            dim = _class_dim(a)
            same = a.argmax(dim) == b.argmax(dim)
            self.same += int(same.sum())
            self.positions += same.numel()

    @property
    def max_relative_error(self) -> float:
        if not math.isfinite(self.max_abs_error + self.largest):
            return math.inf
        if self.max_abs_error == 0:
            return 0.0
        return self.max_abs_error / self.largest if self.largest else math.inf

    @property
    def cosine(self) -> float:
        if not math.isfinite(self.ours + self.theirs + self.both):
            return math.nan
        if self.ours == 0 or self.theirs == 0:
            return 1.0 if self.ours == self.theirs else 0.0
        return self.both / math.sqrt(self.ours * self.theirs)


def compare(pairs: Iterable[tuple[Tensors, Tensors]]) -> Parity:
    """Compare what torch gave with what a file gave.

    Args:
        pairs: A batch each: torch's outputs and the file's, as many tensors of the same shapes;
            the first dimension is the batch.

    Returns:
        All batches together.

    Raises:
        ParityError: If the number of outputs or a shape differs.
        ValueError: If there is no batch.
    """
    sums: list[_Sums] = []
    examples = 0
    for reference, candidate in pairs:
        _check_shapes(reference, candidate)
        sums = sums or [_Sums() for _ in reference]
        for total, ours, theirs in zip(sums, reference, candidate, strict=True):
            total.add(ours, theirs)
        examples += reference[0].shape[0] if reference[0].dim() else 1
    if not sums:
        raise ValueError("there was no batch to compare; give at least one.")
    positions = sum(total.positions for total in sums)
    return Parity(
        cosine=min((total.cosine for total in sums), key=_nan_first),
        max_abs_error=max((total.max_abs_error for total in sums), key=_nan_last),
        max_relative_error=max(total.max_relative_error for total in sums),
        argmax_agreement=sum(t.same for t in sums) / positions if positions else None,
        num_examples=examples,
        num_positions=positions,
        reference_is_finite=all(total.is_finite for total in sums),
    )


def _check_shapes(reference: Tensors, candidate: Tensors) -> None:
    ours = [tuple(tensor.shape) for tensor in reference]
    theirs = [tuple(tensor.shape) for tensor in candidate]
    if ours != theirs:
        raise ParityError(
            f"the file gives outputs of shapes {theirs}; torch gives {ours}. The exporter changed "
            "the outputs: return tensors only, each once."
        )


def _class_dim(tensor: Tensor) -> int:
    """``(batch, classes, ...)`` of images and vectors; ``(batch, position, classes)`` of text."""
    return -1 if tensor.dim() == 3 else 1


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _nan_first(value: float) -> float:
    return -math.inf if math.isnan(value) else value
