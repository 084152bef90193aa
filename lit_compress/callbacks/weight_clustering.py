"""Weights of few distinct values while the model trains, on an unmodified LightningModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_compress.callbacks import tracking
from lit_compress.callbacks._clustering_order import refuse_moving_masks
from lit_compress.callbacks._method_wrapping import Removable
from lit_compress.callbacks._network_calls import name_of_network
from lit_compress.callbacks._requirements import (
    explain_unreadable_checkpoints,
    refuse_nan_loss,
    refuse_sharded_strategy,
)
from lit_compress.callbacks._run_clock import current_moment, resolved_moment
from lit_compress.callbacks._stage_order import (
    Stage,
    StageSpan,
    check_stage_order,
    refuse_quantized_network,
)
from lit_compress.callbacks._weight_averages import AverageWatch, averaged_modules
from lit_compress.compress.clustered_weights import ClusteredWeights, Clusters
from lit_compress.compress.clustering import ClusterInit, check_init, check_num_clusters
from lit_compress.compress.layers import (
    LayerType,
    Selection,
    plain_name,
    refuse_bare_string,
    select_weights,
)
from lit_compress.compress.schedules import check_moment

__all__ = ["WeightClustering"]


class WeightClustering(pl.Callback):
    """Replaces the weights of each layer by few distinct values, and trains those values.

    At ``begin`` the weights of each tensor are clustered (k-means; Han et al. 2016, "Deep
    Compression", section 3). From then on the members of a cluster are trained as one: each gets
    the mean gradient of its cluster, and after each optimizer step each tensor has at most
    ``num_clusters`` distinct values, to the bit (see
    :class:`~lit_compress.compress.clustered_weights.ClusteredWeights`). Such a model is small in a
    packed file (:func:`~lit_compress.compress.packing.write_packed`), not in memory.

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
            :func:`~lit_compress.compress.clustering.kmeans`).
        begin: When the weights are clustered: a float is a fraction of the run, in [0, 1], an int
            an optimizer step.
        trainable: Whether the values are trained after that; else the weights stay as they were
            clustered, and only the rest of the model is trained.
        preserve_sparsity: Whether weights that are zero when they are clustered stay exactly zero;
            zero then counts as one of the values.
        layers: Name patterns of the layers to cluster; all of ``layer_types`` by default.
        ignored_layers: Name patterns of the layers to skip. Patterns match names in
            the LightningModule and in its network: ``"model.layer1.*"`` or ``"layer1.*"``.
        layer_types: Kinds of layers to cluster, of ``"conv"``, ``"depthwise"``, ``"linear"``,
            ``"attention"``, ``"recurrent"``, ``"embedding"``. Norms and biases never are.

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

    changes_weights = True
    compression_stage: Stage = "cluster"

    def __init__(
        self,
        num_clusters: int | dict[str, int] = 16,
        init: ClusterInit = "kmeans++",
        begin: int | float = 0.0,
        trainable: bool = True,
        preserve_sparsity: bool = True,
        layers: Sequence[str] | None = None,
        ignored_layers: Sequence[str] | None = None,
        layer_types: Sequence[LayerType] = ("conv", "linear", "attention", "recurrent"),
    ) -> None:
        super().__init__()
        self.num_clusters = num_clusters
        by_layer = _checked_numbers(num_clusters)
        check_init(init)
        check_moment("begin", begin)
        for name, flag in (("trainable", trainable), ("preserve_sparsity", preserve_sparsity)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} is {flag!r}, expected true or false.")
        for name, value in (("layers", layers), ("ignored_layers", ignored_layers)):
            refuse_bare_string(name, value)
        if by_layer is not None and layers is not None:
            raise ValueError(
                "num_clusters is a mapping and layers is given too; the mapping's keys already "
                "name the layers. Leave layers out."
            )
        self.init = init
        self.begin = begin
        self.trainable = trainable
        self.preserve_sparsity = preserve_sparsity
        self.layers = layers if by_layer is None else list(by_layer)
        self.ignored_layers = ignored_layers
        self.layer_types = layer_types

        self.selection: Selection | None = None
        self._weights: ClusteredWeights | None = None
        self._begin_step: int | None = None
        self._restored: dict[str, Any] | None = None
        self._bound: list[Removable] = []
        self._is_bound = False
        self._was_cut = False

    # --- The run ----------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything is loaded."""
        if stage == "fit":
            self._restored = None  # evaluating a checkpoint leaves its state here
            refuse_sharded_strategy(trainer, type(self).__name__)
            check_stage_order(trainer, pl_module)
            self._bound.append(explain_unreadable_checkpoints(trainer))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the weights, fix the moment, take over a checkpoint's clusters, bind the hooks."""
        self._unbind()
        if self._restored is None:  # else the run that is resumed may quantize by now
            refuse_quantized_network(pl_module, self)
        self.selection = select_weights(
            pl_module,
            layers=self.layers,
            ignored_layers=self.ignored_layers,
            layer_types=self.layer_types,
            network=name_of_network(pl_module),
        )
        rank_zero_info(f"{type(self).__name__}: {_summary(self.selection)}")
        named = {plain_name(name): p for name, p in pl_module.named_parameters()}
        self._weights = ClusteredWeights(
            {name: named[name] for name in self.selection.names},
            {name: self._number_for(name) for name in self.selection.names},
            trainable=self.trainable,
            keep_zero=self.preserve_sparsity,
        )
        self._start_or_resume(trainer)
        self._bind(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cluster before the first step, if that is when it is due."""
        assert self._begin_step is not None
        self._refuse_shared_weights(trainer)
        refuse_moving_masks(trainer, self._active_weights, self._begin_step)
        self._cluster_if_due(trainer, pl_module)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Stop before a NaN reaches the weights."""
        refuse_nan_loss(loss, trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Give the members of a cluster one gradient, before it is clipped."""
        self._active_weights.tie_gradients(self._names_in(optimizer))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Cluster when it is due, before validation and checkpoints."""
        self._cluster_if_due(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave clustered weights, and say so if the run ended before there were any."""
        self._active_weights.apply()
        if not self._active_weights.is_clustered:
            rank_zero_warn(
                f"{type(self).__name__}: training ended before step {self._begin_step}, where the "
                "weights are clustered; they are not. Train longer, or begin earlier."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of optimizers and other callbacks."""
        self._unbind()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let go of optimizers and other callbacks."""
        self._unbind()

    def on_channels_cut(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        kept: Mapping[str, Mapping[int, Tensor]],
    ) -> None:
        """Cut the clusters where ``ChannelPruning`` cut the weights."""
        if self._weights is not None and self._is_bound:
            self._weights.cut(kept)
            self._was_cut = True

    # --- Checkpoints ------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks in one Trainer apart."""
        return self._generate_state_key(
            layers=None if self.layers is None else list(self.layers),
            ignored_layers=None if self.ignored_layers is None else list(self.ignored_layers),
            layer_types=list(self.layer_types),
        )

    def state_dict(self) -> dict[str, Any]:
        """Clusters and the moment that they are due, as tensors and plain data."""
        if self._weights is None:
            return self._restored or {}
        return {
            "weights": self._weights.state_dict(),
            "begin_step": self._begin_step,
            "declared": self._declared,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the fit begins and the model's parameters are known."""
        self._restored = state_dict or None

    # --- What is known ----------------------------------------------------------------------------

    @property
    def clustered_names(self) -> frozenset[str]:
        """Names, in the LightningModule, of the parameters that are clustered by now."""
        return frozenset() if self._weights is None else frozenset(self._weights.clusters)

    @property
    def clusters(self) -> dict[str, Clusters]:
        """Centroids and indices of each clustered parameter, by name."""
        return {} if self._weights is None else dict(self._weights.clusters)

    def stage_span(self, resolved: bool) -> StageSpan | None:
        """The moment at which the weights are clustered."""
        moment = self._begin_step if resolved else self.begin
        return None if moment is None else StageSpan(moment, moment)

    @property
    def _active_weights(self) -> ClusteredWeights:
        assert self._weights is not None, "on_fit_start has not run"
        return self._weights

    @property
    def _declared(self) -> str:
        """What is clustered and when, to recognise a checkpoint of the same run."""
        return f"{self.num_clusters} clusters by {self.init} at {self.begin}"

    # --- Details ----------------------------------------------------------------------------------

    def _number_for(self, name: str) -> int:
        """The number of clusters of a parameter."""
        if isinstance(self.num_clusters, int):
            return self.num_clusters
        assert self.selection is not None, "on_fit_start has chosen the layers"
        return self.num_clusters[self.selection.taken_by[name]]

    def _start_or_resume(self, trainer: pl.Trainer) -> None:
        state, self._restored = self._restored, None
        if state is not None and state["declared"] == self._declared:
            self._active_weights.load_state_dict(state["weights"])
            # The run keeps the moment it was started with, also when max_epochs has grown.
            self._begin_step = state["begin_step"]
            return
        if state is not None:
            rank_zero_info(
                f"{type(self).__name__}: the checkpoint was written under other arguments "
                f"({state['declared']}); its weights are clustered anew as this run says."
            )
        self._begin_step = resolved_moment(trainer, self.begin, "step", type(self).__name__)

    def _refuse_shared_weights(self, trainer: pl.Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, WeightClustering) and other is not self:
                shared = self._active_weights.parameters.keys() & other._active_weights.parameters
                if shared:
                    raise MisconfigurationException(
                        f"two WeightClustering callbacks cluster {min(shared)!r}; give them "
                        "disjoint layers."
                    )

    def _bind(self, trainer: pl.Trainer) -> None:
        weights = self._active_weights
        for optimizer in trainer.optimizers:
            names = self._names_in(optimizer)
            self._bound.append(
                optimizer.register_step_post_hook(lambda *_, names=names: weights.apply(names))
            )
        self._bound.append(AverageWatch(trainer, self._tie_average))
        self._is_bound, self._was_cut = True, False

    def _unbind(self) -> None:
        for removable in self._bound:
            removable.remove()
        self._bound.clear()
        self._is_bound = False

    def _names_in(self, optimizer: Optimizer) -> list[str]:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [n for n, p in self._active_weights.parameters.items() if id(p) in own]

    def _tie_average(self, average: nn.Module) -> None:
        named = {plain_name(name): p for name, p in average.named_parameters()}
        self._active_weights.apply_to_copy(named)

    def _cluster_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights, begin = self._active_weights, self._begin_step
        assert begin is not None, "on_fit_start has not run"
        if weights.is_clustered:
            if self._was_cut:  # a reconstruction gave the layers around a cut new weights
                weights.apply()
                self._was_cut = False
            return
        if current_moment(trainer, pl_module, "step") < begin:
            return
        agree = None if trainer.world_size == 1 else partial(_rank_zero_decides, trainer)
        error = weights.cluster(self.init, agree=agree)
        for average in averaged_modules(trainer):
            self._tie_average(average)
        metrics = {"clustering/relative_error": error.relative}
        for name, inertia in error.inertia.items():
            metrics[f"clustering/inertia/{name}"] = inertia
            metrics[f"clustering/clusters/{name}"] = float(len(weights.clusters[name].centroids))
        tracking.log_metrics(trainer, metrics)


def _checked_numbers(num_clusters: int | dict[str, int]) -> dict[str, int] | None:
    """The numbers by layer, or ``None`` where all layers have the same."""
    if not isinstance(num_clusters, dict):
        check_num_clusters("num_clusters", num_clusters)
        return None
    if not num_clusters:
        raise ValueError("num_clusters is an empty mapping, expected a number for some layer.")
    for glob, number in num_clusters.items():
        check_num_clusters(f"num_clusters[{glob!r}]", number)
    return num_clusters


def _summary(selection: Selection) -> str:
    lines = [f"{len(selection.names)} weights are clustered."]
    if selection.skipped:
        lines.append("Left alone:")
        lines += [f"  {weight.name}: {weight.reason}" for weight in selection.skipped]
    return "\n".join(lines)


def _rank_zero_decides(trainer: pl.Trainer, found: dict[str, Clusters]) -> dict[str, Clusters]:
    packed = {n: (c.centroids.cpu(), c.indices.cpu(), c.zero) for n, c in found.items()}
    return {n: Clusters(*c) for n, c in trainer.strategy.broadcast(packed, src=0).items()}
