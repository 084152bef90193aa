"""The distillation objective: the weighted sum of task loss, logit loss and feature losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lit_compress.callbacks.distillation.teacher import Teacher
from lit_compress.callbacks.lightning.network_calls import NetworkCall, logits_of
from lit_compress.compress.distillation import (
    attention_transfer,
    feature_mse,
    soft_cross_entropy,
    soft_target_kl,
)

__all__ = ["FeatureLoss", "FeatureMatching", "LogitsLoss", "Objective"]

LogitsLoss = Literal["kl", "soft_cross_entropy"]
FeatureLoss = Literal["mse", "attention_transfer"]

_LOGITS_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl": soft_target_kl,
    "soft_cross_entropy": soft_cross_entropy,
}
_FEATURE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": feature_mse,
    "attention_transfer": attention_transfer,
}


@dataclass(frozen=True)
class FeatureMatching:
    """Which layers of a student follow which layers of its teacher.

    Attributes:
        pairs: Names of layers in the student's network -> names of layers in the teacher. The
            losses of the pairs are added up.
        loss: ``"mse"`` (equal shapes) or ``"attention_transfer"`` (equal resolution; the channels
            may differ).
        weight: Weight of the sum in the total loss, in [0, inf). Attention transfer is small by
            nature: about 1000 is usual.

    Raises:
        ValueError: If ``pairs`` is empty, the loss unknown or the weight negative or not finite.
    """

    pairs: dict[str, str]
    loss: FeatureLoss = "mse"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError(
                "features.pairs is empty, expected student layer -> teacher layer, as in "
                "{'layer3': 'layer3'}. Leave features out to distil the logits alone."
            )
        _refuse_unknown("features.loss", self.loss, get_args(FeatureLoss))
        _refuse_negative("features.weight", self.weight)


@dataclass(frozen=True)
class Objective:
    """The weighted sum that a distillation minimises.

    Attributes:
        temperature: Softens both predictions, in (0, inf).
        loss: The loss on logits.
        task_loss_weight: In [0, inf).
        distill_loss_weight: Weight of the loss on logits, in [0, inf).
        features: Layers to match too.

    Raises:
        ValueError: If one is out of range, or all weights are 0.
    """

    temperature: float
    loss: LogitsLoss
    task_loss_weight: float
    distill_loss_weight: float
    features: FeatureMatching | None

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or self.temperature <= 0:
            raise ValueError(
                f"temperature is {self.temperature!r}, expected a positive finite number."
            )
        _refuse_unknown("loss", self.loss, get_args(LogitsLoss))
        _refuse_negative("task_loss_weight", self.task_loss_weight)
        _refuse_negative("distill_loss_weight", self.distill_loss_weight)
        if not (self.task_loss_weight or self.distill_loss_weight or self._feature_weight):
            raise ValueError(
                "task_loss_weight and distill_loss_weight are both 0, which leaves nothing to "
                "train for; expected at least one above 0."
            )

    @property
    def student_layers(self) -> Sequence[str]:
        """The student's layers whose features are compared."""
        return [] if self.features is None else list(self.features.pairs)

    @property
    def teacher_layers(self) -> Sequence[str]:
        """The teacher's layers whose features are compared."""
        return [] if self.features is None else list(dict.fromkeys(self.features.pairs.values()))

    def losses(self, calls: Sequence[NetworkCall], teacher: Teacher) -> dict[str, Tensor]:
        """How far the student is from the teacher.

        Args:
            calls: What the student was asked and what it answered.
            teacher: Is asked the same; skipped where no weight is above 0.

        Returns:
            ``logits_loss`` and ``feature_loss``, unweighted scalars averaged over the calls; those
            without a weight are left out.

        Raises:
            ValueError: If outputs or features differ in shape, or an output holds no logits.
            MisconfigurationException: If a layer took no part in a call.
        """
        compared: dict[str, list[Tensor]] = {}
        for call in calls if self.distill_loss_weight or self._feature_weight else ():
            answer = teacher.answer(call)
            if self.distill_loss_weight:
                logits_loss = _LOGITS_LOSSES[self.loss](
                    logits_of(call.output), logits_of(answer.output), self.temperature
                )
                compared.setdefault("logits_loss", []).append(logits_loss)
            if self.features is not None and self._feature_weight:
                feature_loss = _feature_loss(self.features, call, answer)
                compared.setdefault("feature_loss", []).append(feature_loss)
        return {name: torch.stack(values).mean() for name, values in compared.items()}

    def total(
        self,
        task_loss: Tensor,
        losses: Mapping[str, Tensor],
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> Tensor:
        """The weighted sum.

        Args:
            task_loss: The module's own loss.
            losses: What :meth:`losses` returned.
            scale: Applied to each distillation loss, as a gradient scaler already did to
                ``task_loss``.
        """
        weights = {"logits_loss": self.distill_loss_weight, "feature_loss": self._feature_weight}
        total = self.task_loss_weight * task_loss
        for name, loss in losses.items():
            total = total + scale(weights[name] * loss)
        return total

    @property
    def _feature_weight(self) -> float:
        return 0.0 if self.features is None else self.features.weight


def _feature_loss(features: FeatureMatching, call: NetworkCall, answer: NetworkCall) -> Tensor:
    """The sum over pairs; a layer that runs several times in a call is averaged over its runs."""
    total = torch.zeros(())
    for student_layer, teacher_layer in features.pairs.items():
        ours, theirs = call.features.get(student_layer, []), answer.features.get(teacher_layer, [])
        if not ours or len(ours) != len(theirs):
            raise MisconfigurationException(
                f"In one call of the network the student's {student_layer!r} ran {len(ours)} times "
                f"and the teacher's {teacher_layer!r} {len(theirs)} times; expected the same "
                "number, at least once. Pair layers that every call runs, in training too."
            )
        try:
            runs = [
                _FEATURE_LOSSES[features.loss](logits_of(our), logits_of(their))
                for our, their in zip(ours, theirs, strict=True)
            ]
        except ValueError as error:
            raise ValueError(
                f"features.pairs, {student_layer!r} -> {teacher_layer!r}: {error}"
            ) from error
        total = total.to(runs[0]) + torch.stack(runs).mean()
    return total


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_negative(name: str, value: Any) -> None:
    if not is_number(value) or value < 0:
        raise ValueError(f"{name} is {value!r}, expected a finite number of at least 0.")


def _refuse_unknown(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, known))}.")
