"""Distillation losses on logits and on features.

All of them compute in float32 at least, whatever the inputs' type, and let gradients flow into both
arguments: run the teacher under :class:`torch.no_grad`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["attention_transfer", "feature_mse", "soft_cross_entropy", "soft_target_kl"]


def soft_target_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    r"""Divergence of the student's softened predictions from the teacher's.

    .. math:: T^2 \cdot \mathrm{KL}(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T))

    The factor :math:`T^2` keeps the size of the gradients about the same for every temperature.
    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015),
    section 2.

    Args:
        student_logits: ``(N, C, *)``, the classes in dimension 1.
        teacher_logits: ``(N, C, *)``, the same shape.
        temperature: T in (0, inf); the higher, the softer both predictions.

    Returns:
        A scalar in [0, inf): the sum over classes, averaged over the batch and the dimensions
        after the classes. float64 if an input is, else float32.

    Raises:
        ValueError: If the shapes differ, there is no class dimension, or the temperature is not
            positive and finite.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> soft_target_kl(logits, logits, temperature=4.0).item()
        0.0
    """
    student, teacher = _softened(student_logits, teacher_logits, temperature)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True)
    return divergence.sum(dim=1).mean() * temperature**2


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> Tensor:
    r"""Cross-entropy of the student's softened predictions under the teacher's.

    .. math:: -\sum_c \mathrm{softmax}(z_t / T)_c \log \mathrm{softmax}(z_s / T)_c

    This is PocketFlow's form, without the factor :math:`T^2`: its gradient is :math:`T^2` times
    smaller than that of :func:`soft_target_kl`, so it wants a larger weight (PocketFlow: 4 at
    T = 4). Its minimum is the entropy of the teacher's predictions, not zero.

    Args:
        student_logits: ``(N, C, *)``, the classes in dimension 1.
        teacher_logits: ``(N, C, *)``, the same shape.
        temperature: T in (0, inf); the higher, the softer both predictions.

    Returns:
        A scalar in [0, inf): the sum over classes, averaged over the batch and the dimensions
        after the classes. float64 if an input is, else float32.

    Raises:
        ValueError: If the shapes differ, there is no class dimension, or the temperature is not
            positive and finite.

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> round(soft_cross_entropy(logits, logits, temperature=4.0).item(), 4)  # log 2
        0.6931
    """
    student, teacher = _softened(student_logits, teacher_logits, temperature)
    return -(teacher.exp() * student).sum(dim=1).mean()


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two feature maps.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (2015), equation 3, for features of
    equal width, so without the regressor.

    Args:
        student: Features of any shape.
        teacher: Features of the same shape.

    Returns:
        A scalar in [0, inf), averaged over all elements. float64 if an input is, else float32.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> feature_mse(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])).item()
        5.0
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's features have shape {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}; the mean squared error needs equal shapes. Pair layers of "
            "equal width, or use attention transfer, which lets the channels differ."
        )
    return F.mse_loss(_at_least_float32(student), _at_least_float32(teacher))


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared difference of two activation-based attention maps.

    A map is :math:`\sum_c A_c^2` over the channels, flattened and divided by its Euclidean norm,
    so only *where* a layer is active counts, not how strongly nor in how many channels.
    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention" (2017), section 3.1,
    :math:`F^2_{sum}`. The paper's equation 2 takes the norm of the difference; this is its square
    averaged over positions, which is smooth where the maps agree and is what the authors' released
    code computes. It is small (at most 2 / positions): weights of about 1000 are usual.

    Args:
        student: ``(N, C, *spatial)`` with at least one spatial dimension.
        teacher: ``(N, C', *spatial)``; only the channels may differ.

    Returns:
        A scalar in [0, 2 / positions], averaged over the batch and the positions. float64 if an
        input is, else float32.

    Raises:
        ValueError: If the batch or spatial sizes differ, or there is no spatial dimension.

    Example:
        >>> student = torch.tensor([[[1.0, 0.0]]])  # one channel, active at the left
        >>> teacher = torch.tensor([[[0.0, 3.0], [0.0, 4.0]]])  # two channels, at the right
        >>> attention_transfer(student, teacher).item()
        1.0
    """
    if student.ndim < 3 or teacher.ndim < 3:
        raise ValueError(
            f"The student's features have shape {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}; attention transfer needs (N, C, *spatial) with at least one "
            "spatial dimension. Pair layers before the pooling, or use the mean squared error."
        )
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"The student's features have shape {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}; attention transfer needs equal batch and spatial sizes and "
            "resizes nothing. Pair layers of the same resolution."
        )
    return F.mse_loss(_attention_map(student), _attention_map(teacher))


def _attention_map(features: Tensor) -> Tensor:
    """``(N, C, *spatial)`` -> ``(N, positions)``, each row of Euclidean norm 1."""
    energy = _at_least_float32(features).square().sum(dim=1).flatten(start_dim=1)
    return F.normalize(energy, dim=1)


def _softened(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The log-probabilities of both, ``(N, C, *)``, at the temperature."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}, expected a positive finite number.")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"The student's logits have shape {tuple(student_logits.shape)}, the teacher's "
            f"{tuple(teacher_logits.shape)}; they must agree. Take a teacher with the same classes "
            "for the same input."
        )
    if student_logits.ndim < 2:
        raise ValueError(
            f"The logits have shape {tuple(student_logits.shape)}, expected (N, C, *) with the "
            "classes in dimension 1. Add a batch dimension, as in logits.unsqueeze(0)."
        )
    student = _at_least_float32(student_logits) / temperature
    teacher = _at_least_float32(teacher_logits) / temperature
    return student.log_softmax(dim=1), teacher.log_softmax(dim=1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
