"""k-means on one weight: a tensor with few distinct values in place of many."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["MAX_CLUSTERS", "ClusterInit", "cluster_means", "inertia", "kmeans"]

ClusterInit = Literal["kmeans++", "density", "linear"]

MIN_CLUSTERS, MAX_CLUSTERS = 2, 256

# Seeds of k-means++ are drawn from at most so many values, evenly spaced by rank: drawing from all
# values of a large layer would cost more than the k-means itself, and gains nothing.
_NUM_CANDIDATES = 2**16


@torch.no_grad()
def kmeans(
    values: Tensor,
    num_clusters: int,
    init: ClusterInit = "kmeans++",
    *,
    generator: torch.Generator | None = None,
    num_iterations: int = 100,
    keep_zero: bool = False,
) -> tuple[Tensor, Tensor]:
    """Few values for many, such that the sum of squared distances is (locally) least.

    Lloyd's algorithm on sorted values: in one dimension a cluster is an interval, so that an
    iteration is one search for the interval borders and one pass of sums. All of it happens on the
    tensor's device, in float64, and is deterministic for a given generator state.

    A centroid that loses all of its members moves to the value that is worst off. Where there are
    no more distinct values than clusters, each is its own centroid and nothing changes.

    Args:
        values: Floating point, any shape and device, at least one element.
        num_clusters: The most clusters there may be, in [2, 256].
        init: How Lloyd's algorithm begins (Han et al. 2016, "Deep Compression", section 3.2):
            ``"linear"``: evenly spaced from the least value to the largest; ``"density"``: evenly
            spaced by rank; ``"kmeans++"``: drawn one after the other, with a probability
            proportional to the squared distance from those drawn before (Arthur & Vassilvitskii
            2007).
        generator: Of the random numbers of ``"kmeans++"``; torch's own by default.
        num_iterations: The most iterations of Lloyd's algorithm; it stops where nothing moves.
        keep_zero: If there are zeros, one centroid is exactly 0 and has exactly the zeros as its
            members: a sparse tensor stays as sparse as it was. Without zeros it has no effect.

    Returns:
        Centroids, sorted, distinct, of the dtype of ``values``, shape ``[k]``, ``1 <= k <=
        num_clusters``, each with at least one member; and indices, uint8, of the shape of
        ``values``. ``centroids[indices.int()]`` are the clustered values. Each value goes to its
        nearest centroid, the lesser one if two are as near; with ``keep_zero``, each value that
        is not zero goes to its nearest centroid that is not zero.

    Raises:
        ValueError: If an argument is out of range, or ``values`` is empty, not floating point or
            holds NaN or infinity.

    Examples:
        >>> centroids, indices = kmeans(torch.tensor([0.0, 1.0, 1.5, -2.0, 0.0]), 3, "linear")
        >>> centroids, indices
        (tensor([-2.0000,  0.0000,  1.2500]), tensor([1, 2, 2, 0, 1], dtype=torch.uint8))
    """
    _check(values, num_clusters, init, num_iterations)
    flat = values.detach().flatten()
    zeros = flat == 0
    has_zeros = keep_zero and bool(zeros.any())
    live = flat[~zeros] if has_zeros else flat
    if len(live) == 0:
        return flat.new_zeros(1), torch.zeros(values.shape, dtype=torch.uint8, device=flat.device)
    most = num_clusters - has_zeros
    in_order = live.sort().values.double()
    points, counts = torch.unique_consecutive(in_order, return_counts=True)
    centroids = points
    if len(points) > most:
        centroids = _seed(points, counts, most, init, generator)
        centroids = _lloyd(points, counts, centroids, num_iterations)
    if has_zeros:
        # Values of both signs with the mean 0: the least of them stands for all, so that they are
        # told from the zeros.
        centroids = torch.where(centroids == 0, points[points.abs().argmin()], centroids)
    # Rounding keeps the order and the distinctness: each centroid lies between members of its own.
    centroids = centroids.to(values.dtype)
    centroids, indices = _assign(live, centroids)
    if has_zeros:
        centroids, indices = _with_zero(centroids, indices, zeros)
    return centroids, indices.to(torch.uint8).view(values.shape)


@torch.no_grad()
def cluster_means(values: Tensor, indices: Tensor, sizes: Tensor) -> Tensor:
    """The mean of each cluster's members; NaN for a cluster without members.

    Sums are in float64, so that the mean of equal float32 (or shorter) numbers is that number to
    the bit, and are made in the same order each time, so that processes with equal values get
    equal means on CUDA devices as well (no atomic additions).

    Args:
        values: Floating point, any shape.
        indices: uint8, of as many elements, in [0, k).
        sizes: int64, shape ``[k]``: the number of each cluster's members.

    Returns:
        float64, shape ``[k]``.
    """
    indices, flat = indices.flatten(), values.flatten().double()
    if flat.device.type == "cpu":
        sums = torch.bincount(indices, flat, minlength=len(sizes))
    else:
        sums = _sums_by_sorting(flat, indices, sizes)
    return sums / sizes


@torch.no_grad()
def inertia(values: Tensor, centroids: Tensor, indices: Tensor) -> float:
    """The sum of squared distances between values and their centroids.

    Args:
        values: Floating point, any shape.
        centroids: Shape ``[k]``.
        indices: uint8, of the shape of ``values``.
    """
    clustered = centroids.double()[indices.int()]
    return float((values.double() - clustered).square().sum())


def _seed(
    points: Tensor, counts: Tensor, k: int, init: ClusterInit, generator: torch.Generator | None
) -> Tensor:
    """``k`` first centroids (float64, sorted) for more than ``k`` distinct, sorted points."""
    if init == "linear":
        share = torch.linspace(0, 1, k, dtype=torch.float64, device=points.device)
        return points[0] + (points[-1] - points[0]) * share
    if init == "density":
        share = (torch.arange(k, dtype=torch.float64, device=points.device) + 0.5) / k
        up_to = counts.cumsum(0)
        rank = (share * up_to[-1]).long()
        return points[torch.searchsorted(up_to, rank, right=True)]
    return _seed_by_distance(points, counts, k, generator)


def _seed_by_distance(
    points: Tensor, counts: Tensor, k: int, generator: torch.Generator | None
) -> Tensor:
    device = points.device
    rank = torch.linspace(0, len(points) - 1, min(len(points), _NUM_CANDIDATES)).long()
    points, counts = points[rank.to(device)], counts[rank.to(device)]
    source = "cpu" if generator is None else generator.device
    draws = torch.rand(k, generator=generator, device=source, dtype=torch.float64).to(device)
    weights = counts
    squared = torch.full_like(points, torch.inf)
    chosen = []
    for draw in draws:
        # In whole numbers, since sums of floats in another order would choose other points.
        up_to = weights.cumsum(0)
        place = torch.searchsorted(up_to, (draw * up_to[-1]).long(), right=True)
        chosen.append(points[place.clamp_max(len(points) - 1)])
        squared = torch.minimum(squared, (points - chosen[-1]).square())
        nearness = squared / squared.max()
        weights = (nearness.nan_to_num() * 2**30).long() * counts
    return torch.stack(chosen).sort().values


def _lloyd(points: Tensor, counts: Tensor, centroids: Tensor, num_iterations: int) -> Tensor:
    """Lloyd's algorithm on distinct, sorted points (float64) that count ``counts`` times."""
    weighted, up_to = points * counts, counts.cumsum(0)
    last = len(points) - 1
    for _ in range(num_iterations):
        borders = torch.searchsorted(points, _midpoints(centroids), right=True)
        starts = torch.nn.functional.pad(borders, (1, 0))
        ends = torch.nn.functional.pad(borders, (0, 1), value=last + 1)
        sums = torch.segment_reduce(weighted, "sum", lengths=ends - starts)
        up_to_end = torch.nn.functional.pad(up_to, (1, 0))
        means = sums / (up_to_end[ends] - up_to_end[starts])
        # A rounded sum must not carry a mean out of its interval.
        low, high = points[starts.clamp_max(last)], points[(ends - 1).clamp_min(0)]
        moved = torch.minimum(torch.maximum(means, low), high)
        empty = ends == starts
        if bool(empty.any()):
            moved[empty] = _worst_off(points, counts, centroids, int(empty.sum()))
            moved = moved.sort().values
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _worst_off(points: Tensor, counts: Tensor, centroids: Tensor, num: int) -> Tensor:
    """The points that add most to the inertia."""
    nearest = centroids[torch.searchsorted(_midpoints(centroids), points)]
    return points[((points - nearest).square() * counts).topk(num).indices]


def _assign(values: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The centroids that have members, and the place among them of each value's nearest one."""
    indices = torch.bucketize(values.double(), _midpoints(centroids.double()))
    used = torch.bincount(indices, minlength=len(centroids)) > 0
    return centroids[used], (used.long().cumsum(0) - 1)[indices]


def _with_zero(centroids: Tensor, indices: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Zero put among the centroids of the other values, and the zeros among the indices."""
    place = int((centroids < 0).sum())
    zero = centroids.new_zeros(1)
    every = torch.full(zeros.shape, place, device=zeros.device)
    every[~zeros] = indices + (indices >= place)
    return torch.cat([centroids[:place], zero, centroids[place:]]), every


def _midpoints(centroids: Tensor) -> Tensor:
    return (centroids[1:] + centroids[:-1]) / 2


def _sums_by_sorting(values: Tensor, indices: Tensor, sizes: Tensor) -> Tensor:
    order = torch.argsort(indices, stable=True)
    return torch.segment_reduce(values[order], "sum", lengths=sizes)


def _check(values: Tensor, num_clusters: int, init: str, num_iterations: int) -> None:
    check_num_clusters("num_clusters", num_clusters)
    check_init(init)
    if isinstance(num_iterations, bool) or not isinstance(num_iterations, int):
        raise ValueError(f"num_iterations is {num_iterations!r}, expected a whole number.")
    if num_iterations < 0:
        raise ValueError(f"num_iterations is {num_iterations}, expected 0 or more.")
    if not values.is_floating_point():
        raise ValueError(
            f"the values to cluster are {values.dtype}, expected floating point; integers are "
            "stored as they are."
        )
    if values.numel() == 0:
        raise ValueError("there are no values to cluster; expected at least one.")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            "the values to cluster hold NaN or infinity. Look for a learning rate that is too "
            "high, and go on from the last checkpoint with finite weights."
        )


def check_num_clusters(name: str, num_clusters: int) -> None:
    """Refuse a number of clusters that is no whole number in [2, 256].

    Raises:
        ValueError: If it is not; ``name`` is what the message calls it.
    """
    whole = isinstance(num_clusters, int) and not isinstance(num_clusters, bool)
    if not whole or not MIN_CLUSTERS <= num_clusters <= MAX_CLUSTERS:
        raise ValueError(
            f"{name} is {num_clusters!r}, expected a whole number from {MIN_CLUSTERS} to "
            f"{MAX_CLUSTERS}."
        )


def check_init(init: str) -> None:
    """Refuse an unknown way to begin.

    Raises:
        ValueError: If ``init`` is none of :data:`ClusterInit`.
    """
    if init not in get_args(ClusterInit):
        raise ValueError(f"init is {init!r}, expected one of {', '.join(get_args(ClusterInit))}.")
