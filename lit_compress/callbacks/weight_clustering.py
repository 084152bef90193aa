"""WeightClustering, the callback that trains weights with few distinct values per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_compress.callbacks.lightning import tracking
from lit_compress.callbacks.lightning.weight_averages import averaged_modules
from lit_compress.callbacks.magnitude_sparsity import MagnitudeSparsity
from lit_compress.callbacks.selected_weights import LAYER_TYPES, SelectedWeightsCallback
from lit_compress.callbacks.stage_order import (
    Stage,
    StageSpan,
    check_not_quantized,
    span_in_steps,
)
from lit_compress.compress.clustering.clustered_weights import ClusteredWeights, Clusters
from lit_compress.compress.clustering.kmeans import ClusterInit, check_init, check_num_clusters
from lit_compress.compress.layers import (
    LayerType,
    Selection,
)
from lit_compress.compress.schedules import Moment, Schedule, Unit, check_moment, check_unit

__all__ = ["WeightClustering"]


class WeightClustering(SelectedWeightsCallback[ClusteredWeights]):
    """Replaces the weights of each layer by few distinct values, and trains those values.

    At ``begin`` the weights of each tensor are clustered (k-means; Han et al. 2016, "Deep
    Compression", section 3). From then on the members of a cluster are trained as one: each gets
    the mean gradient of its cluster, and after each optimizer step each tensor has at most
    ``num_clusters`` distinct values, to the bit (see
    :class:`~lit_compress.compress.clustering.clustered_weights.ClusteredWeights`). Such a model is
    small in a packed file (:func:`~lit_compress.compress.packing.packed_file.write_packed`), not in
    memory.

    The LightningModule is not changed: the clusters lie in this callback, weights in the checkpoint
    have their usual names, and a checkpoint opens without this library. Interrupted runs resume
    exactly. Start from a trained model: clustering random weights keeps nothing that was learnt.
    With sparsity, masks must be final before ``begin``; removed weights stay exactly zero. Under
    manual optimization a step is a training batch.

    Logged to every logger when the weights are clustered: ``clustering/relative_error`` (sum of
    squared changes / sum of squared weights), ``clustering/inertia/<name>`` (sum of squared
    changes) and ``clustering/clusters/<name>``.

    Args:
        num_clusters: The most distinct values of each weight, in [2, 256]; 16 take 4 bits a weight.
            Or a mapping from name patterns of layers to the number of each; the first pattern that
            matches a layer counts, and layers that none matches are skipped.
        init: How k-means begins: ``"kmeans++"``, ``"density"`` or ``"linear"`` (see
            :func:`~lit_compress.compress.clustering.kmeans.kmeans`).
        begin: When the weights are clustered: a float is a fraction of the run, in [0, 1], an int
            a number of ``unit``.
        trainable: Whether the values are trained after that; else the weights stay as they were
            clustered, and only the rest of the model is trained.
        preserve_sparsity: Whether weights that are zero when they are clustered stay exactly zero;
            zero then counts as one of the values.
        layers: Name patterns of the layers to cluster; all of ``layer_types`` by default.
        ignored_layers: Name patterns of the layers to skip. Patterns match names in
            the LightningModule and in its network: ``"model.layer1.*"`` or ``"layer1.*"``.
        layer_types: Kinds of layers to cluster, of ``"conv"``, ``"depthwise"``, ``"linear"``,
            ``"attention"``, ``"recurrent"``, ``"embedding"``. Norms and biases never are.
        unit: What a whole number in ``begin`` counts, ``"step"`` or ``"epoch"``.

    Raises:
        ValueError: At construction, if an argument is out of range or two of them disagree. When
            the fit begins, if a name pattern matches no layer, no layer is left, or the
            checkpoint that is resumed holds clusters of another model. During the fit, if the
            loss or a weight is NaN.
        MisconfigurationException: In ``setup``, if the strategy shards parameters, or a callback
            that prunes comes after this one. When the fit begins, if ``begin`` is a fraction of a
            run without a known length, two callbacks cluster the same weight, or masks of the
            weights change after ``begin``.

    Example::

        trainer = Trainer(max_epochs=3, callbacks=[WeightClustering(16)])
        trainer.fit(model, datamodule)
    """

    verb = "cluster"
    compression_stage: Stage = "cluster"

    def __init__(
        self,
        num_clusters: int | dict[str, int] = 16,
        init: ClusterInit = "kmeans++",
        begin: Moment = 0.0,
        trainable: bool = True,
        preserve_sparsity: bool = True,
        layers: Sequence[str] | None = None,
        ignored_layers: Sequence[str] | None = None,
        layer_types: Sequence[LayerType] = LAYER_TYPES,
        unit: Unit = "step",
    ) -> None:
        _check_numbers(num_clusters)
        check_init(init)
        check_unit(unit)
        check_moment("begin", begin, unit=unit)
        for name, flag in (("trainable", trainable), ("preserve_sparsity", preserve_sparsity)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} is {flag!r}, expected true or false.")
        super().__init__(
            Schedule.at(begin, unit), "num_clusters", num_clusters, layers, ignored_layers,
            layer_types,
        )  # fmt: skip
        self.num_clusters = num_clusters
        self.init = init
        self.trainable = trainable
        self.preserve_sparsity = preserve_sparsity
        self._was_cut = False

    # --- The run ----------------------------------------------------------------------------------

    def start_or_resume(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: dict[str, Any] | None
    ) -> None:
        """Choose the weights, fix the moment, take over a checkpoint's clusters, bind the hooks."""
        if state is None:  # else the run that is resumed may quantize by now
            check_not_quantized(pl_module, self)
        chosen = self._choose(pl_module, self.layers)
        rank_zero_info(f"{type(self).__name__}: {_summary(self.selection)}")
        self._weights = ClusteredWeights(
            chosen,
            {name: self._number_for(name) for name in chosen},
            trainable=self.trainable,
            keep_zero=self.preserve_sparsity,
        )
        if state is not None and self.is_same_run(state, "its weights are clustered again."):
            self._weights.load_state_dict(state["weights"])
            self._clock.resume(state)
        else:
            self._clock.start(trainer, "clusters")
        self._hold(trainer)
        self._was_cut = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse masks that are not final in time, then cluster if it is due."""
        self._check_masks(trainer)
        super().on_train_start(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Give the members of a cluster one gradient, before it is clipped."""
        self._active_weights.tie_gradients(self._names_in(optimizer))

    def follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cluster the weights when it is due."""
        weights = self._active_weights
        if weights.is_clustered:
            if self._was_cut:  # a reconstruction gave the layers around a cut new weights
                weights.apply()
                self._was_cut = False
            return
        if self._clock.due(trainer, pl_module) is None:
            return
        agree = None if trainer.world_size == 1 else partial(_rank_zero_decides, trainer)
        error = weights.cluster(self.init, agree=agree)
        self._clock.last_point = self._clock.active_ramp.end
        for average in averaged_modules(trainer):
            self._keep_average(average)
        metrics = {"clustering/relative_error": error.relative}
        for name, inertia in error.inertia.items():
            metrics[f"clustering/inertia/{name}"] = inertia
            metrics[f"clustering/clusters/{name}"] = float(len(weights.clusters[name].centroids))
        tracking.log_metrics(trainer, metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave clustered weights, and say so if the run ended before there were any."""
        self._active_weights.apply()
        if not self._active_weights.is_clustered:
            ramp = self._clock.active_ramp
            rank_zero_warn(
                f"{type(self).__name__}: training ended before {ramp.unit} {ramp.begin}, where the "
                "weights are clustered; they are not. Train longer, or begin earlier."
            )

    def on_channels_cut(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        kept: Mapping[str, Mapping[int, Tensor]],
    ) -> None:
        """Cut the clusters, and apply them once more when the layers around the cut are done."""
        super().on_channels_cut(trainer, pl_module, kept)
        self._was_cut = True

    # --- Checkpoints ------------------------------------------------------------------------------

    @property
    def declared(self) -> dict[str, Any]:
        """What is clustered and when."""
        return {
            "num_clusters": self.num_clusters,
            "init": self.init,
            "begin": self.schedule.begin,
            "unit": self.schedule.unit,
        }

    def fit_state(self) -> dict[str, Any] | None:
        """Clusters and the moment that they are due."""
        if self._weights is None:
            return None
        return {"weights": self._weights.state_dict(), **self._clock.state_dict()}

    # --- What is known ----------------------------------------------------------------------------

    @property
    def clustered_names(self) -> frozenset[str]:
        """Names, in the LightningModule, of the parameters that are clustered by now."""
        return frozenset() if self._weights is None else frozenset(self._weights.clusters)

    @property
    def clusters(self) -> dict[str, Clusters]:
        """Centroids and indices of each clustered parameter, by name."""
        return {} if self._weights is None else dict(self._weights.clusters)

    # --- Details ----------------------------------------------------------------------------------

    def _number_for(self, name: str) -> int:
        """The number of clusters of a parameter."""
        if isinstance(self.num_clusters, int):
            return self.num_clusters
        assert self.selection is not None, "on_fit_start has chosen the layers"
        return self.num_clusters[self.selection.taken_by[name]]

    def _check_masks(self, trainer: pl.Trainer) -> None:
        """Refuse masks that change after the weights were clustered, or would be filled by it."""
        weights, ramp = self._active_weights, self._clock.active_ramp
        for sparsity in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(sparsity, MagnitudeSparsity) or sparsity.ramp is None:
                continue
            shared = sorted(weights.parameters.keys() & sparsity.masked_names)
            if not shared:
                continue
            if not weights.keep_zero:
                raise MisconfigurationException(
                    f"MagnitudeSparsity masks {shared[0]!r}, and WeightClustering would give its "
                    "zeros other values; set preserve_sparsity=True."
                )
            if sparsity.has_final_masks:
                continue
            masks, own = StageSpan.of(sparsity.ramp), StageSpan.of(ramp)
            assert masks is not None
            assert own is not None
            end, begin = span_in_steps(trainer, masks).end, span_in_steps(trainer, own).begin
            if end <= begin and not weights.is_clustered:
                continue
            fix = "Give both in steps"
            if math.isfinite(end) and ramp.unit == "step":
                fix = f"Set begin={end:.0f}"
            raise MisconfigurationException(
                f"MagnitudeSparsity changes the masks of {shared[0]!r} until {sparsity.ramp.unit} "
                f"{sparsity.ramp.end}, and WeightClustering clusters it at {ramp.unit} "
                f"{ramp.begin}; masks must be final by then. {fix}, or end the sparsity's schedule "
                "earlier."
            )


def _check_numbers(num_clusters: int | dict[str, int]) -> None:
    if not isinstance(num_clusters, dict):
        check_num_clusters("num_clusters", num_clusters)
        return
    if not num_clusters:
        raise ValueError("num_clusters is an empty mapping, expected a number for some layer.")
    for glob, number in num_clusters.items():
        check_num_clusters(f"num_clusters[{glob!r}]", number)


def _summary(selection: Selection | None) -> str:
    assert selection is not None, "_choose made it"
    lines = [f"{len(selection.names)} weights are clustered."]
    if selection.skipped:
        lines.append("Skipped:")
        lines += [f"  {weight.name}: {weight.reason}" for weight in selection.skipped]
    return "\n".join(lines)


def _rank_zero_decides(trainer: pl.Trainer, found: dict[str, Clusters]) -> dict[str, Clusters]:
    packed = {n: (c.centroids.cpu(), c.indices.cpu(), c.zero) for n, c in found.items()}
    return {n: Clusters(*c) for n, c in trainer.strategy.broadcast(packed, src=0).items()}
