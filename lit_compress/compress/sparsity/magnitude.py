"""Magnitude sparsity: how many weights of each layer become zero, and which.

Counts are exact. ``round(sparsity * N)`` units of N become zero, whatever the ties; the layers'
shares are whole numbers that add up to the total.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_compress.compress.sparsity.patterns import SparsityPattern, Unstructured

__all__ = [
    "allocate_zeros",
    "apportion",
    "check_sparsity",
    "heuristic_sparsities",
    "keep_largest",
    "kth_smallest",
    "magnitude_masks",
    "pack_mask",
    "unpack_mask",
]


def check_sparsity(name: str, sparsity: float) -> None:
    """Refuse what is no sparsity.

    Raises:
        ValueError: If ``sparsity`` is not a number in [0, 1).
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise ValueError(f"{name} is {sparsity!r}, expected a number in [0, 1).")
    if not 0.0 <= sparsity < 1.0:
        hint = f" For {sparsity} % write {sparsity / 100}." if 1 < sparsity < 100 else ""
        raise ValueError(
            f"{name} is {sparsity}, expected a share of zeros in [0, 1).{hint}"
            + (" A layer without weights computes nothing." if sparsity == 1 else "")
        )


# --- How many -------------------------------------------------------------------------------------


def allocate_zeros(
    sizes: Mapping[str, int],
    sparsity: float | Mapping[str, float],
    rule: Literal["uniform", "heuristic", "global"],
) -> dict[str, int] | int:
    """How many units are to be zero.

    Args:
        sizes: Units (weights, or blocks of them) in each layer.
        sparsity: The target for all layers together, in [0, 1); or one for each layer, in which
            case ``rule`` does not matter and each layer has ``round(sparsity * size)`` zeros.
        rule: ``"uniform"``: every layer at the same sparsity, to the nearest unit.
            ``"heuristic"``: larger layers at a higher one, see :func:`heuristic_sparsities`.
            ``"global"``: one number for all layers; magnitudes decide where the zeros fall.

    Returns:
        Zeros in each layer that add up to ``round(sparsity * sum(sizes))``, or that sum alone for
        ``"global"``: what :func:`magnitude_masks` takes.

    Raises:
        ValueError: If ``sparsity`` is out of range or ``rule`` unknown.

    Examples:
        >>> allocate_zeros({"a": 5, "b": 10}, 0.5, "uniform")
        {'a': 3, 'b': 5}
        >>> allocate_zeros({"a": 5, "b": 10}, 0.5, "global")
        8
    """
    if isinstance(sparsity, Mapping):
        for name in sizes:
            check_sparsity(f"sparsity of {name!r}", sparsity[name])
        return {name: round(sparsity[name] * size) for name, size in sizes.items()}
    check_sparsity("sparsity", sparsity)
    if rule == "global":
        return round(sparsity * sum(sizes.values()))
    return _allocate_by_rule(sizes, sparsity, rule)


def _allocate_by_rule(sizes: Mapping[str, int], sparsity: float, rule: str) -> dict[str, int]:
    if rule == "uniform":
        shares = dict.fromkeys(sizes, float(sparsity))
    elif rule == "heuristic":
        shares = heuristic_sparsities(sizes, sparsity)
    else:
        raise ValueError(f"rule is {rule!r}, expected 'uniform', 'heuristic' or 'global'.")
    total = round(sparsity * sum(sizes.values()))
    counts = apportion(total, [shares[k] * n for k, n in sizes.items()], list(sizes.values()))
    return dict(zip(sizes, counts, strict=True))


def heuristic_sparsities(sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """PocketFlow's rule: a layer's sparsity grows with the logarithm of its size.

    ``r_l = alpha * ln(N_l)``. The original fixes ``alpha = r * sum(N) / sum(N * ln N)``, by which
    a large layer can be asked for more than all of its weights. Here no layer passes
    ``1 - (1 - r) / 3`` (the upper bound of PocketFlow's searched ratios: a third of the uniform
    share always stays), and ``alpha`` is the one with which the total is met all the same.

    Args:
        sizes: Units in each layer.
        sparsity: The target for all layers together, in [0, 1).

    Returns:
        The sparsity of each layer, in [0, 1), with ``sum(r_l * N_l) = sparsity * sum(N)``.

    Examples:
        >>> r = heuristic_sparsities({"small": 10, "large": 1000}, 0.5)
        >>> round(r["small"], 3), round(r["large"], 3)
        (0.168, 0.503)
    """
    if sparsity == 0.0 or not sizes:
        return dict.fromkeys(sizes, 0.0)
    logs = {name: math.log(size) for name, size in sizes.items()}
    if not any(logs.values()):  # every layer holds a single unit: nothing to rank
        return dict.fromkeys(sizes, sparsity)
    cap = 1.0 - (1.0 - sparsity) / 3.0
    wanted = sparsity * sum(sizes.values())
    # sum(min(alpha * ln N, cap) * N) is linear between the points where a layer meets the cap.
    # Cap the largest layers one at a time until the rest share what is left without passing it.
    capped: set[str] = set()
    for name in [*sorted(sizes, key=lambda n: -sizes[n]), None]:
        free = [n for n in sizes if n not in capped and logs[n] > 0]
        if not free:
            break
        left = wanted - cap * sum(sizes[n] for n in capped)
        alpha = left / sum(sizes[n] * logs[n] for n in free)
        if alpha * max(logs[n] for n in free) <= cap or name is None:
            return {n: cap if n in capped else alpha * logs[n] for n in sizes}
        capped.add(name)
    # Only layers of a single unit are left, and their logarithm is 0: share what remains evenly.
    singles = [n for n in sizes if n not in capped]
    rest = (wanted - cap * sum(sizes[n] for n in capped)) / sum(sizes[n] for n in singles)
    return {n: cap if n in capped else rest for n in sizes}


def apportion(total: int, shares: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Whole numbers near ``shares`` that add up to ``total`` (largest remainder method).

    Args:
        total: The sum to reach, in [0, sum(caps)].
        shares: The exact, fractional shares; their sum is within one unit a share of ``total``.
        caps: The largest value each share may take.

    Returns:
        Counts with ``sum(counts) == total`` and ``0 <= counts[i] <= caps[i]``.

    Raises:
        ValueError: If ``total`` is negative or above ``sum(caps)``.

    Examples:
        >>> apportion(5, [2.6, 1.6, 0.8], [9, 9, 9])
        [3, 1, 1]
    """
    if not 0 <= total <= sum(caps):
        raise ValueError(f"total is {total}, expected a number in [0, {sum(caps)}].")
    counts = [min(math.floor(s), c) for s, c in zip(shares, caps, strict=True)]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - shares[i])
    step = 1 if total >= sum(counts) else -1
    while (missing := abs(total - sum(counts))) > 0:
        movable = [
            i
            for i in (by_remainder if step > 0 else reversed(by_remainder))
            if 0 <= counts[i] + step <= caps[i]
        ]
        for i in movable[:missing]:
            counts[i] += step
    return counts


# --- Which ----------------------------------------------------------------------------------------


def magnitude_masks(
    weights: Mapping[str, Tensor],
    num_zeros: Mapping[str, int] | int,
    pattern: SparsityPattern | None = None,
) -> dict[str, Tensor]:
    """Masks that remove the units of smallest magnitude, exactly as many as asked.

    Args:
        weights: The weights to choose among, any shapes that fit the pattern.
        num_zeros: Units to remove in each layer; or one number, chosen among all layers together
            (global magnitude pruning).
        pattern: What a unit is; each weight on its own by default.

    Returns:
        For each weight a bool mask of its shape, ``True`` where the weight is kept. In a tie the
        unit that comes first in memory order goes.

    Raises:
        ValueError: If a weight holds NaN, or if more units are to go than the pattern allows.
    """
    pattern = pattern or Unstructured()
    # Half-precision weights are ranked in float32: not every kernel takes them.
    scores = {name: pattern.scores(weight).float() for name, weight in weights.items()}
    for name, score in scores.items():
        if torch.isnan(score.sum()):
            raise ValueError(
                f"the weight {name!r} holds NaN: its magnitudes cannot be ranked. Training has "
                "diverged; resume from an earlier checkpoint with a lower learning rate, or set "
                "gradient_clip_val on the Trainer."
            )
    if isinstance(num_zeros, int):
        kept = keep_largest(torch.cat(list(scores.values())), num_zeros)
        parts = torch.split(kept, [s.numel() for s in scores.values()])
        masks = dict(zip(scores, parts, strict=True))
    else:
        masks = {name: keep_largest(score, num_zeros[name]) for name, score in scores.items()}
    return {name: pattern.expand(masks[name], weights[name].shape) for name in weights}


def keep_largest(scores: Tensor, num_removed: int) -> Tensor:
    """Keep all but the ``num_removed`` smallest scores.

    Args:
        scores: Shape ``(n,)``; a score of ``inf`` is never removed.
        num_removed: How many go, in [0, number of finite scores].

    Returns:
        Bool ``(n,)`` with exactly ``n - num_removed`` ones. Among equal scores the first go.

    Raises:
        ValueError: If ``num_removed`` is out of range.

    Examples:
        >>> keep_largest(torch.tensor([3.0, 1.0, 1.0, 2.0]), 1)
        tensor([ True, False,  True,  True])
    """
    size = scores.numel()
    if not 0 <= num_removed <= size:
        raise ValueError(f"num_removed is {num_removed}, expected a number in [0, {size}].")
    if num_removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = kth_smallest(scores, num_removed)
    if torch.isinf(threshold):
        removable = int(torch.isfinite(scores).sum())
        raise ValueError(
            f"num_removed is {num_removed}, but the pattern allows only {removable} of {size} "
            "weights to go; lower the sparsity to what the pattern reaches."
        )
    kept = scores > threshold
    ties_kept = size - num_removed - int(kept.count_nonzero())
    if ties_kept > 0:
        ties = (scores == threshold).nonzero().view(-1)
        kept[ties[len(ties) - ties_kept :]] = True
    return kept


_SAMPLE_STRIDE = 101
_SMALL = 1 << 17


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest value (k = 1 is the smallest), exactly.

    ``torch.kthvalue`` takes longer than a training step on ten million weights on the CPU. Here a
    sample of one value in 101 brackets the answer, and only the values inside of the bracket are
    ranked; should the bracket miss, all values are. Never an approximation.

    Args:
        values: Shape ``(n,)``, without NaN.
        k: In [1, n].
    """
    size = values.numel()
    if size >= _SMALL and values.device.type == "cpu":
        sample = values[::_SAMPLE_STRIDE].sort().values
        position = (k - 1) / (size - 1)
        # Four standard deviations of a binomial count, and a little for the ends.
        slack = 4.0 * math.sqrt(len(sample) * position * (1.0 - position)) + 4.0
        low = max(math.floor(position * (len(sample) - 1) - slack), 0)
        high = min(math.ceil(position * (len(sample) - 1) + slack), len(sample) - 1)
        # At the ends of the sample there is no bound: the answer may lie outside of it.
        inside = torch.ones_like(values, dtype=torch.bool)
        num_below = 0
        if low > 0:
            inside = values >= sample[low]
            num_below = size - int(inside.count_nonzero())
        if high < len(sample) - 1:
            inside &= values <= sample[high]
        candidates = values[inside]
        if num_below < k <= num_below + candidates.numel():
            return candidates.kthvalue(k - num_below).values
    return values.kthvalue(k).values


# --- Storage --------------------------------------------------------------------------------------

_BIT_VALUES = (128, 64, 32, 16, 8, 4, 2, 1)


def pack_mask(mask: Tensor) -> Tensor:
    """A bool mask as uint8, eight entries a byte, on the CPU; padded with zeros at the end.

    Args:
        mask: Bool, any shape.

    Returns:
        uint8, shape ``(ceil(n / 8),)``.

    Examples:
        >>> pack_mask(torch.tensor([True, False, False, False, False, False, False, True, True]))
        tensor([129, 128], dtype=torch.uint8)
    """
    bits = mask.detach().to("cpu", torch.uint8).reshape(-1)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    values = torch.tensor(_BIT_VALUES, dtype=torch.uint8)
    return (bits * values).sum(dim=1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """The way back from :func:`pack_mask`.

    Args:
        packed: uint8, shape ``(ceil(n / 8),)``.
        shape: The mask's shape, with n entries.

    Raises:
        ValueError: If the number of bytes does not fit the shape.
    """
    expected = -(-shape.numel() // 8)
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise ValueError(
            f"a packed mask for shape {tuple(shape)} is {expected} bytes of uint8; came "
            f"{tuple(packed.shape)} of {packed.dtype}."
        )
    values = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) & values).ne(0).view(-1)
    return bits[: shape.numel()].view(shape)
