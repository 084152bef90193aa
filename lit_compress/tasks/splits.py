"""Seeded choices of images that treat all classes alike."""

import torch
from torch import Tensor


def hold_out(labels: Tensor, per_class: int | float, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices into those that stay and those held out, the same part of each class.

    Args:
        labels: ``(n,)``, int64.
        per_class: Images held out of each class: an int is their number, a float in (0, 1) their
            fraction, rounded, at least one. Every class keeps at least one image.
        seed: Which images.

    Returns:
        Two increasing lists of indices, ``(n - h,)`` and ``(h,)``.

    Raises:
        ValueError: If ``per_class`` is out of its range, or would take all images of a class.

    Examples:
        >>> stay, held = hold_out(torch.tensor([0, 0, 0, 1, 1, 1]), 1, seed=0)
        >>> len(stay), len(held)
        (4, 2)
    """
    if per_class <= 0 or (isinstance(per_class, float) and per_class >= 1):
        raise ValueError(
            f"per_class came as {per_class}; give a number of images of at least 1, or a fraction "
            "in (0, 1)."
        )
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels):
        members = (labels == label).nonzero().flatten()
        count = per_class if isinstance(per_class, int) else max(1, round(per_class * len(members)))
        if count >= len(members):
            raise ValueError(
                f"Class {int(label)} has {len(members)} images, and {count} are to be held out; "
                "hold out fewer."
            )
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def limit_per_class(labels: Tensor, limit: int, seed: int) -> Tensor:
    """Return the indices of at most ``limit`` images of each class.

    Args:
        labels: ``(n,)``, int64.
        limit: At least 1.
        seed: Which images.

    Returns:
        Increasing indices.

    Raises:
        ValueError: If ``limit`` is below 1.
    """
    if limit < 1:
        raise ValueError(f"limit came as {limit}; give at least 1 image a class.")
    generator = torch.Generator().manual_seed(seed)
    kept = [
        members[torch.randperm(len(members), generator=generator)[:limit]]
        for label in torch.unique(labels)
        for members in [(labels == label).nonzero().flatten()]
    ]
    return torch.cat(kept).sort().values
