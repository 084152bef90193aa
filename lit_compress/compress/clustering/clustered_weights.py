"""Parameters with few distinct values that train as clusters: the stateful twin of ``kmeans``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_compress.compress.channels.groups import take
from lit_compress.compress.clustering.kmeans import (
    ClusterInit,
    check_num_clusters,
    cluster_means,
    inertia,
    kmeans,
)
from lit_compress.compress.packing.tensors import num_index_bits, pack_bits, unpack_bits

__all__ = ["ClusteredWeights", "ClusteringError", "Clusters"]


@dataclass
class Clusters:
    """The clusters of one parameter.

    Attributes:
        centroids: Shape ``[k]``, of the parameter's dtype, on its device.
        indices: uint8, of the parameter's shape, on its device: which centroid each weight has.
        zero: The cluster that stays exactly zero; ``None`` if there is none.
    """

    centroids: Tensor
    indices: Tensor
    zero: int | None

    def __post_init__(self) -> None:
        self._sizes = torch.bincount(self.indices.flatten(), minlength=len(self.centroids))

    def values(self, centroids: Tensor) -> Tensor:
        """A tensor of the parameter's shape, each element the one of its cluster."""
        return centroids.index_select(0, self.indices.flatten().int()).view(self.indices.shape)

    def means(self, tensor: Tensor) -> Tensor:
        """The means of a tensor of the parameter's shape, by cluster; shape ``[k]``, its dtype.

        The mean over the cluster of zeros is 0, and clusters without members keep their centroid.
        """
        means = cluster_means(tensor, self.indices, self._sizes).to(tensor.dtype)
        means = torch.where(self._sizes == 0, self.centroids.to(tensor.dtype), means)
        if self.zero is not None:
            means[self.zero] = 0
        return means

    def to(self, device: torch.device) -> Clusters:
        """The same on another device."""
        return Clusters(self.centroids.to(device), self.indices.to(device), self.zero)


@dataclass(frozen=True)
class ClusteringError:
    """What clustering changed.

    Attributes:
        inertia: By name, the sum of squared changes.
        squares: By name, the sum of the squared weights before.
    """

    inertia: dict[str, float]
    squares: dict[str, float]

    @property
    def relative(self) -> float:
        """All squared changes / all squared weights, in [0, 1]; 0 where all weights are 0."""
        total = sum(self.squares.values())
        return sum(self.inertia.values()) / total if total else 0.0


class ClusteredWeights:
    """Parameters that have few distinct values each, and keep them so while they are trained.

    Once :meth:`cluster` has chosen the clusters, the members of a cluster are trained as one:
    :meth:`tie_gradients` gives each member the mean gradient of its cluster, the optimizer (its
    momentum, weight decay and all) then moves them alike, and :meth:`apply` sets them to their
    mean after the step, so that at most k distinct values remain, to the bit.

    This is stochastic gradient descent on the weights under the constraint that members of a
    cluster are equal: the mean is the orthogonal projection onto the tied weights. Han et al. 2016
    ("Deep Compression", section 3.3) add the members' gradients up instead of averaging them: the
    same direction for each centroid, but a step that grows with the size of its cluster. With the
    mean, a learning rate means what it meant before; for optimizers that divide by the size of the
    gradient, such as Adam, the two are the same.

    The clusters lie beside the parameters, never in them: no parameter is renamed, replaced or
    wrapped. All methods but :meth:`cluster` do nothing before it was called. Afterwards
    :meth:`tie_gradients` and :meth:`apply` take about 5 ns a weight each, on one CPU core.

    Args:
        parameters: The parameters by name.
        num_clusters: The most values of each, in [2, 256].
        trainable: Whether centroids move; else each parameter stays as it was clustered.
        keep_zero: Whether the weights that are zero when they are clustered stay exactly zero.

    Raises:
        ValueError: If a number of clusters is out of range.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        num_clusters: Mapping[str, int],
        *,
        trainable: bool = True,
        keep_zero: bool = True,
    ) -> None:
        for name in parameters:
            check_num_clusters(f"num_clusters[{name!r}]", num_clusters[name])
        self.parameters = dict(parameters)
        self.num_clusters = {name: num_clusters[name] for name in parameters}
        self.trainable = trainable
        self.keep_zero = keep_zero
        self.clusters: dict[str, Clusters] = {}

    @property
    def is_clustered(self) -> bool:
        """Whether the clusters have been chosen."""
        return bool(self.clusters)

    @torch.no_grad()
    def cluster(
        self,
        init: ClusterInit = "kmeans++",
        seed: int = 0,
        agree: Callable[[dict[str, Clusters]], dict[str, Clusters]] | None = None,
    ) -> ClusteringError:
        """Choose clusters by :func:`~lit_compress.compress.clustering.kmeans.kmeans`; apply them.

        Args:
            init: How k-means begins.
            seed: Of its random numbers; torch's own generator is not touched.
            agree: Takes this process's clusters and returns those that all processes use.

        Returns:
            What the clustering changed.

        Raises:
            ValueError: If a weight is NaN or infinite; it is named, and no weight was changed.
        """
        found = {}
        for name, p in self.parameters.items():
            generator = torch.Generator().manual_seed(seed)
            try:
                centroids, indices = kmeans(
                    p, self.num_clusters[name], init, generator=generator, keep_zero=self.keep_zero
                )
            except ValueError as error:
                raise ValueError(f"{name!r} cannot be clustered: {error}") from error
            pinned = self.keep_zero and bool((p == 0).any())
            zero = int((centroids == 0).int().argmax()) if pinned else None
            found[name] = Clusters(centroids, indices, zero)
        if agree is not None:
            found = agree(found)
        self.clusters = {name: found[name].to(p.device) for name, p in self.parameters.items()}
        lost, squares = {}, {}
        for name, p in self.parameters.items():
            clusters = self.clusters[name]
            lost[name] = inertia(p, clusters.centroids, clusters.indices)
            squares[name] = float(p.double().square().sum())
            p.copy_(clusters.values(clusters.centroids))
        return ClusteringError(lost, squares)

    @torch.no_grad()
    def apply(self, names: Iterable[str] | None = None) -> None:
        """Make the members of each cluster equal again, of the named parameters or of all.

        They become their mean, or, if not trainable, what they were. Equal members do not change.
        """
        for name in self.clusters if names is None else names:
            if name in self.clusters:
                p, clusters = self.parameters[name], self.clusters[name]
                if self.trainable:
                    clusters.centroids = clusters.means(p)
                p.copy_(clusters.values(clusters.centroids))

    @torch.no_grad()
    def tie_gradients(self, names: Iterable[str] | None = None) -> None:
        """Give each weight the mean gradient of its cluster, and none to those that stay.

        Args:
            names: Of the parameters whose gradients are meant; all by default.
        """
        for name in self.clusters if names is None else names:
            gradient = self.parameters[name].grad
            if name not in self.clusters or gradient is None or gradient.is_sparse:
                continue
            if self.trainable:
                clusters = self.clusters[name]
                gradient.copy_(clusters.values(clusters.means(gradient)))
            else:
                gradient.zero_()

    @torch.no_grad()
    def apply_to_copy(self, parameters: Mapping[str, Tensor]) -> None:
        """Make members equal in a copy of the parameters, such as an average of them.

        Args:
            parameters: Tensors by name, on any device; those without clusters are skipped.
        """
        for name, clusters in self.clusters.items():
            if name in parameters:
                copy = parameters[name]
                there = clusters.to(copy.device)
                centroids = there.means(copy) if self.trainable else there.centroids
                copy.copy_(there.values(centroids))

    @torch.no_grad()
    def cut(self, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Follow a cut of the parameters: the indices go with their channels.

        Args:
            kept: By parameter name and dimension: the indices that stayed. Parameters have the
                shapes after the cut already.
        """
        for name, indices in kept.items():
            if name in self.clusters:
                old = self.clusters[name]
                left = take(old.indices, indices)
                self.clusters[name] = Clusters(old.centroids, left, old.zero)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors: centroids, and indices in as few bits as they need."""
        return {
            "shapes": {name: list(p.shape) for name, p in self.parameters.items()},
            "clusters": {
                name: {
                    "centroids": clusters.centroids.to("cpu"),
                    "indices": pack_bits(clusters.indices, num_index_bits(len(clusters.centroids))),
                    "zero": clusters.zero,
                }
                for name, clusters in self.clusters.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the clusters; the weights themselves come with the model's state.

        Raises:
            ValueError: If the state is of other parameters; the first mismatch is named.
        """
        shapes = {name: list(p.shape) for name, p in self.parameters.items()}
        for name in [*shapes, *state["shapes"]]:
            ours, theirs = shapes.get(name), state["shapes"].get(name)
            if ours != theirs:
                raise ValueError(
                    f"the checkpoint's clusters do not fit the model: {name!r} has shape {theirs} "
                    f"in the checkpoint and {ours} here (None: it is not clustered). Resume with "
                    "the model and the layer selection that wrote the checkpoint."
                )
        self.clusters = {}
        for name, stored in state["clusters"].items():
            p, centroids = self.parameters[name], stored["centroids"]
            bits = num_index_bits(len(centroids))
            indices = unpack_bits(stored["indices"], bits, p.numel()).view(p.shape)
            clusters = Clusters(centroids.to(p.dtype), indices, stored["zero"])
            self.clusters[name] = clusters.to(p.device)
