"""QuantizationAwareTraining, the callback that trains a network with fake quantization."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_compress.callbacks.base import CompressionCallback
from lit_compress.callbacks.lightning.loader_states import fresh_loaders
from lit_compress.callbacks.lightning.network_calls import find_network
from lit_compress.callbacks.lightning.requirements import check_not_compiled
from lit_compress.callbacks.lightning.run_clock import resolve_moments
from lit_compress.callbacks.lightning.training_sample import draw_batches
from lit_compress.callbacks.lightning.weight_averages import AverageWatch, num_extra_epochs
from lit_compress.callbacks.quantization.quantized_training import QuantizedTraining
from lit_compress.callbacks.quantization.quantizers_in_fit import (
    CallWatch,
    FrozenBatchNorms,
    SteadyScales,
    agree_on_ranges,
    cut_quantizers,
    follow_in_average,
)
from lit_compress.callbacks.search.searched import (
    SEARCHED,
    LayerBits,
    declared_bits,
    found_bits,
)
from lit_compress.callbacks.stage_order import Stage, StageSpan, check_resolved_order
from lit_compress.compress.quantization.network import is_quantized, quantized_network
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.compress.quantization.training_plan import QuantizationMoments, QuantizationPlan
from lit_compress.compress.schedules import Moment, Unit
from lit_compress.search.search_result import SearchResult, Space
from lit_compress.search.settings import CandidateSettings

__all__ = ["QuantizationAwareTraining"]

Ranges = Literal["observed", "learned"]


class QuantizationAwareTraining(CompressionCallback):
    """Trains a network as if its weights and activations were integers, during ``Trainer.fit``.

    Weights (a scale for each output channel) and activations (a scale and a zero point for each)
    are rounded in the forward pass, and gradients pass through (Jacob et al. 2018, section 3; with
    ``ranges="learned"``, LSQ: Esser et al. 2020). What is rounded is what integer kernels of
    runtimes fuse: a layer with the batch norm and ReLU behind it is one operation, sums of
    residual blocks are another. A checkpoint or the module exports with exactly these ranges.

    The LightningModule is not changed in any other way: its layers stay the modules they were, with
    their hooks, dropout, batch norms and parameters, and nothing needs to be exportable. The
    network gets a child module ``quantization`` with the scales, so that checkpoints hold them;
    ``Trainer.fit/validate/test(ckpt_path=...)`` and :func:`lit_compress.load_compressed` bring
    it back. Interrupted runs resume exactly. Masks of ``MagnitudeSparsity`` and centroids of
    ``WeightClustering`` are kept: zeros stay zero, weights that are equal stay equal.

    Start from a trained network: ranges are calibrated on training batches when the fit begins, and
    once more where rounding begins. Integers cannot follow a network whose weights still move far.
    Processes that train together agree on the ranges. Learned scales join the optimizer's parameter
    group of least weight decay; before ``begin`` they do not move, and no step changes one by more
    than a factor of two.

    Logged to every logger when it changes: ``quantization/weight_bits`` (the least of all layers)
    and ``quantization/quantizing``.

    Args:
        weight_bits: Bits of weights, 2 to 8.
        activation_bits: Bits of activations, 2 to 8; ``None`` leaves them in floating point.
        layer_bits: Bits of weights by name pattern of the layer, where they differ; or
            ``"searched"``: what the ``RatioSearch`` listed before it finds.
        ranges: ``"observed"``: weights by their largest magnitude, activations by a moving average
            of what they reach. ``"learned"``: scales are trained with the weights, for few bits.
        begin: When rounding begins; a float is a fraction of the run, an int a number of steps or
            epochs. Before it the run is what it would be without this callback. Channels must be
            cut and weights clustered by then.
        freeze_batch_norm: When batch norms stop following the batches and use their running
            statistics, as they will in the end; ``None`` for never. Do it late and at a small
            learning rate: without the batches' own scale, steps of the size before can make a
            network with narrow channels (MobileNet) diverge.
        freeze_ranges: When observed ranges of activations stop moving; ``None`` for never.
        initial_weight_bits: Weights begin with so many bits and lose one after the other until
            ``freeze_ranges`` (or the end of the run); ``None`` begins with those they end with.
        unit: What whole numbers count, ``"step"`` or ``"epoch"``.
        num_calibration_batches: Training batches for the first ranges.
        ignored_layers: Name patterns of layers left in floating point. Patterns match names in
            the LightningModule and in its network: ``"model.layer1.*"`` or ``"layer1.*"``.
        quantize_first_layer: Whether the first layer is quantized.
        quantize_last_layer: Whether the last layer is quantized.
        network: Dotted name of the network in the LightningModule; by default the only child that
            holds all parameters, or else the module itself.
        avoid_saturation: Whether the scales of 8-bit weights leave room for the sums of two
            products, which saturate on x86 processors without VNNI.

    Raises:
        ValueError: At construction, if an argument is out of range or of the wrong kind. When the
            fit begins, if nothing can be quantized, a name pattern matches nothing or an activation
            is NaN. During the fit, if the loss is NaN.
        MisconfigurationException: In ``setup``, if the strategy shards parameters or spawns
            processes, the module is compiled, or callbacks come in an order that cannot work. When
            the fit begins, if there are no training batches, a moment is a fraction of a run of
            unknown length, two of these callbacks have the same network, or the checkpoint's
            optimizer trains scales that these arguments do not have.

    Example::

        trainer = Trainer(max_epochs=3, callbacks=[QuantizationAwareTraining()])
        trainer.fit(model, datamodule)
    """

    changes_structure = True
    compression_stage: Stage = "quantize"
    searched_space: Space = "bits"

    def __init__(
        self,
        weight_bits: int = 8,
        activation_bits: int | None = 8,
        layer_bits: LayerBits | None = None,
        ranges: Ranges = "observed",
        begin: Moment = 0.0,
        freeze_batch_norm: Moment | None = None,
        freeze_ranges: Moment | None = 0.75,
        initial_weight_bits: int | None = None,
        unit: Unit = "step",
        num_calibration_batches: int = 8,
        ignored_layers: Sequence[str] | None = None,
        quantize_first_layer: bool = True,
        quantize_last_layer: bool = True,
        network: str | None = None,
        avoid_saturation: bool = True,
    ) -> None:
        super().__init__()
        if ranges not in get_args(Ranges):
            raise ValueError(f"ranges is {ranges!r}; choose 'observed' or 'learned'.")
        self.scheme = QuantizationScheme(
            weight_bits, activation_bits, declared_bits(layer_bits, network),
            "learned" if ranges == "learned" else "minmax", ranges,
            ignored_layers or (), quantize_first_layer, quantize_last_layer,
            avoid_saturation=avoid_saturation,
        )  # fmt: skip
        self.moments = QuantizationMoments(
            begin, freeze_batch_norm, freeze_ranges, initial_weight_bits, unit
        )
        self.moments.check_bits(weight_bits)
        if isinstance(num_calibration_batches, bool) or not (
            isinstance(num_calibration_batches, int) and num_calibration_batches >= 1
        ):
            raise ValueError(
                f"num_calibration_batches is {num_calibration_batches!r}; give a whole number of "
                "at least 1."
            )
        if network is not None and not isinstance(network, str):
            raise ValueError(
                f"network is {network!r}; give its dotted name in the LightningModule."
            )
        self.num_calibration_batches = num_calibration_batches
        self.network = network
        self._is_searched = layer_bits == SEARCHED

        self._training: QuantizedTraining | None = None
        self._found: nn.Module | None = None  # the network, during a fit
        self._resumes = False
        self._frozen = FrozenBatchNorms()
        self._calls: CallWatch | None = None

    # --- The run ----------------------------------------------------------------------------------

    def check_run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse compiled modules, too, which have fixed what they compute."""
        super().check_run(trainer, pl_module)
        check_not_compiled(pl_module, type(self).__name__)
        self._training = None

    def start_or_resume(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: dict[str, Any] | None
    ) -> None:
        """Fix the moments, or take over those and the quantizers of a checkpoint."""
        check_not_compiled(pl_module, type(self).__name__)  # configure_model may have done it
        self._check_own_network(trainer, pl_module)
        self._found = network = self._network(pl_module)
        fresh_loaders(trainer)  # what is calibrated on later
        self._resumes = (
            state is not None
            and self.is_same_run(state, "the network is calibrated again.")
            and is_quantized(network)
        )
        if state is not None and self._resumes:
            # The run keeps the moments it was started with, also when max_epochs has grown.
            plan = QuantizationPlan(**{"unit": self.moments.unit, **state["plan"]})
            self._training = self._with_plan(plan)
            self._training.resume(trainer, pl_module, network)
        else:
            self._check_same_scales(state)
            draw_batches(trainer, 1)  # says so now if there are none
            self._training = self._with_plan(self._plan(trainer))
        check_resolved_order(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the network calibrated quantizers, after cuts and clusters of the first step."""
        network = self._trained
        if not self._resumes:
            self._active.prepare(trainer, pl_module, network)
        self._calls = CallWatch(network)
        self.bindings.add(
            self._calls,
            SteadyScales(trainer, network),
            AverageWatch(trainer, lambda average: follow_in_average(pl_module, network, average)),
        )
        super().on_train_start(trainer, pl_module)

    def follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The mode of the next step."""
        self._active.follow_plan(trainer, pl_module, self._trained)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep frozen batch norms in evaluation mode, which validation and epochs undo."""
        if not self._active.plan.batch_norm_frozen(self._active.now):
            return
        extra = num_extra_epochs(trainer)
        if extra and trainer.current_epoch >= (trainer.max_epochs or 0) - extra:
            self._frozen.release()  # SWA takes new statistics for its average
        else:
            self._frozen.hold(self._trained)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Agree on the ranges that processes observed; then the mode of the next step."""
        if self._calls is not None:
            self._calls.num_steps += 1
        quantization = quantized_network(self._trained)
        if quantization.observing:
            agree_on_ranges(trainer, quantization)
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if training does not reach what was quantized."""
        if self._calls is not None and self._calls.was_missed:
            name = self.network or "its network"
            rank_zero_warn(
                f"{type(self).__name__}: no training step of {type(pl_module).__name__} called the "
                f"forward of {name}, so it trains in floating point. Call it in training_step, or "
                "name the part that is called by network=."
            )
        if self._calls is not None:
            self._calls.remove()
            self._calls = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the run ended before weights had their bits."""
        self._frozen.release()
        plan, now = self._active.plan, self._active.now
        name, unit = type(self).__name__, plan.unit
        if not quantized_network(self._trained).quantizing:
            rank_zero_warn(
                f"{name}: training ended before {unit} {plan.begin}, where rounding begins; the "
                "network was not trained with integers. Train longer, or begin earlier."
            )
        elif plan.least_bits(now) > plan.last_bits:
            rank_zero_warn(
                f"{name}: training ended with {plan.least_bits(now)} bits; {plan.last_bits} "
                f"are reached at {unit} {plan.bits_end}. Train longer."
            )

    def release(self) -> None:
        """Release the run; the network stays quantized."""
        super().release()
        self._frozen.release()
        self._calls = self._found = None

    def on_channels_cut(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        kept: Mapping[str, Mapping[int, Tensor]],
    ) -> None:
        """Cut the scales where ``ChannelPruning`` cut the weights."""
        network = self._network(pl_module)
        if is_quantized(network):
            cut_quantizers(trainer, pl_module, network, kept)

    # --- Checkpoints ------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks in one Trainer apart."""
        return self._generate_state_key(network=self.network)

    @property
    def declared(self) -> dict[str, Any]:
        """What is rounded and when."""
        scheme = replace(self.scheme, layer_bits={}) if self._is_searched else self.scheme
        return {"scheme": scheme, "moments": self.moments, "searched": self._is_searched}

    def fit_state(self) -> dict[str, Any] | None:
        """When things happen; scales are among the module's weights."""
        if self._training is None:
            return None
        return {"plan": dict(vars(self._training.plan)), "learned": self._training.learns}

    # --- A search before it -----------------------------------------------------------------------

    @property
    def waits_for_search(self) -> bool:
        """Whether ``layer_bits="searched"``."""
        return self._is_searched

    def take_searched(self, result: SearchResult, candidates: CandidateSettings) -> None:
        """Work with the bits that were found from now on."""
        self.scheme = replace(self.scheme, layer_bits=found_bits(result))

    # --- Details ----------------------------------------------------------------------------------

    def stage_span(self, resolved: bool) -> StageSpan | None:
        """From where rounding begins to the end of the run."""
        if not resolved:
            return StageSpan(self.moments.begin, math.inf, self.moments.unit)
        if self._training is None:
            return None
        return StageSpan(self._training.plan.begin, math.inf, self._training.plan.unit)

    @property
    def _active(self) -> QuantizedTraining:
        assert self._training is not None, "on_fit_start has not run"
        return self._training

    @property
    def _trained(self) -> nn.Module:
        assert self._found is not None, "on_fit_start has not run"
        return self._found

    def _plan(self, trainer: pl.Trainer) -> QuantizationPlan:
        name = type(self).__name__
        moments, unit = resolve_moments(trainer, self.moments.moments, self.moments.unit, name)
        last_bits = min((self.scheme.weight_bits, *self.scheme.layer_bits.values()))
        try:
            return self.moments.plan(moments, unit, last_bits)
        except ValueError as error:
            raise MisconfigurationException(f"{name}: {error}") from error

    def _with_plan(self, plan: QuantizationPlan) -> QuantizedTraining:
        name, batches = type(self).__name__, self.num_calibration_batches
        return QuantizedTraining(name, self.scheme, plan, batches)

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        return find_network(pl_module, self.network)

    def _check_own_network(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        own = set(self._network(pl_module).modules())
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, QuantizationAwareTraining) and other is not self:
                theirs = other._network(pl_module)
                if theirs in own or self._network(pl_module) in set(theirs.modules()):
                    raise MisconfigurationException(
                        f"two {type(self).__name__} callbacks quantize the network "
                        f"{self.network or other.network or type(theirs).__name__!r}; name "
                        "disjoint networks by network=, or use layer_bits for layers of other bits."
                    )

    def _check_same_scales(self, state: dict[str, Any] | None) -> None:
        if state is not None and state["learned"]:
            raise MisconfigurationException(
                f"the optimizer in the checkpoint trains scales that {type(self).__name__} learned "
                f"under other arguments ({state['declared']}); these ones ({self.declared}) have "
                "other scales. Resume under the same arguments, or start a new run from the "
                "weights: load_compressed(checkpoint, module), then fit without ckpt_path."
            )
