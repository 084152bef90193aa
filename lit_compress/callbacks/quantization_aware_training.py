"""Training with the rounding of integers in place, on an unmodified LightningModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_compress.callbacks import tracking
from lit_compress.callbacks._cut_in_fit import rewrap
from lit_compress.callbacks._method_wrapping import MethodWrapper
from lit_compress.callbacks._network_calls import find_network
from lit_compress.callbacks._quantizers_in_fit import (
    clustered_weights,
    cut_quantizers,
    give_quantizers,
    train_scales,
)
from lit_compress.callbacks._requirements import (
    explain_unreadable_checkpoints,
    refuse_nan_loss,
    refuse_sharded_strategy,
    refuse_spawned_processes,
)
from lit_compress.callbacks._run_clock import current_moment, resolved_moment
from lit_compress.callbacks._structure_in_checkpoints import carry_structure
from lit_compress.callbacks._training_sample import TrainingSample
from lit_compress.callbacks._weight_averages import averaged_modules
from lit_compress.compress.quantization.network import (
    Quantization,
    calibrate,
    fit_weights,
    is_quantized,
    quantized_network,
    remove_quantization,
)
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.compress.quantization.training_plan import Moment, QuantizationPlan, check_moments

__all__ = ["QuantizationAwareTraining"]

Ranges = Literal["observed", "learned"]


class QuantizationAwareTraining(pl.Callback):
    """Trains a network as if its weights and activations were integers, during ``Trainer.fit``.

    Weights (a scale for each output channel) and activations (a scale and a zero point for each)
    are rounded in the forward pass, and gradients pass through (Jacob et al. 2018, section 3; with
    ``ranges="learned"``, LSQ: Esser et al. 2020). What is rounded is what integer kernels of
    runtimes fuse: a layer with the batch norm and ReLU behind it is one operation, sums of
    residual blocks are another. A checkpoint or the module exports with exactly these ranges.

    The LightningModule is not changed in any other way: its layers stay the modules they were, with
    their hooks, dropout, batch norms and parameters, and nothing needs to be exportable. The network
    gets a child module ``quantization`` with the scales, so that checkpoints hold them;
    ``Trainer.fit/validate/test(ckpt_path=...)`` and :func:`lit_compress.load_compressed` bring
    it back. Interrupted runs resume exactly. Masks of ``MagnitudeSparsity`` and centroids of
    ``WeightClustering`` are kept: zeros stay zero, weights that are equal stay equal.

    Start from a trained network: ranges are calibrated on training batches when the fit begins.
    Integers cannot follow a network whose weights still move far.

    Logged to every logger when it changes: ``quantization/weight_bits`` (the least of all layers)
    and ``quantization/quantizing``.

    Args:
        weight_bits: Bits of weights, 2 to 8.
        activation_bits: Bits of activations, 2 to 8; ``None`` leaves them in floating point.
        layer_bits: Bits of weights by name pattern of the layer, where they differ.
        ranges: ``"observed"``: weights by their greatest magnitude, activations by a moving average
            of what they reach. ``"learned"``: scales are trained with the weights, for few bits.
        begin: When rounding begins; a float is a fraction of the run, an int a number of steps or
            epochs. Before it, ranges are only observed.
        freeze_batch_norm: When batch norms stop following the batches and use their running
            statistics, as they will in the end; ``None`` for never.
        freeze_ranges: When observed ranges of activations stop moving; ``None`` for never.
        initial_weight_bits: Weights begin with so many bits and lose one after the other until
            ``freeze_ranges`` (or the end of the run); ``None`` begins with those they end with.
        unit: What whole numbers count, ``"step"`` or ``"epoch"``.
        num_calibration_batches: Training batches for the first ranges.
        ignored_layers: Name patterns (within the network) of layers left in floating point.
        quantize_first_layer: Whether the first layer is quantized.
        quantize_last_layer: Whether the last layer is quantized.
        network: Dotted name of the network in the LightningModule; by default the only child that
            holds all parameters, or else the module itself.

    Raises:
        ValueError: At construction, if an argument is out of range or of the wrong kind. When the
            fit begins, if nothing can be quantized, a name pattern matches nothing or an activation
            is NaN. During the fit, if the loss is NaN.
        MisconfigurationException: When the fit begins, if the strategy shards parameters or spawns
            processes, there are no training batches, a moment is a fraction of a run of unknown
            length, or callbacks come in an order that cannot work.

    Example::

        trainer = Trainer(max_epochs=3, callbacks=[QuantizationAwareTraining()])
        trainer.fit(model, datamodule)
    """

    changes_weights = True

    def __init__(
        self,
        weight_bits: int = 8,
        activation_bits: int | None = 8,
        layer_bits: dict[str, int] | None = None,
        ranges: Ranges = "observed",
        begin: Moment = 0.0,
        freeze_batch_norm: Moment | None = 0.5,
        freeze_ranges: Moment | None = 0.75,
        initial_weight_bits: int | None = None,
        unit: Literal["step", "epoch"] = "step",
        num_calibration_batches: int = 8,
        ignored_layers: Sequence[str] | None = None,
        quantize_first_layer: bool = True,
        quantize_last_layer: bool = True,
        network: str | None = None,
    ) -> None:
        super().__init__()
        if ranges not in get_args(Ranges):
            raise ValueError(f"ranges is {ranges!r}; choose 'observed' or 'learned'.")
        self.scheme = QuantizationScheme(
            weight_bits,
            activation_bits,
            layer_bits or {},
            "learned" if ranges == "learned" else "minmax",
            ranges,
            ignored_layers or (),
            quantize_first_layer,
            quantize_last_layer,
        )
        check_moments(begin, freeze_batch_norm, freeze_ranges, unit)
        _check_initial_bits(initial_weight_bits, weight_bits)
        if isinstance(num_calibration_batches, bool) or not (
            isinstance(num_calibration_batches, int) and num_calibration_batches >= 1
        ):
            raise ValueError(
                f"num_calibration_batches is {num_calibration_batches!r}; give a whole number of "
                "at least 1."
            )
        self.begin = begin
        self.freeze_batch_norm = freeze_batch_norm
        self.freeze_ranges = freeze_ranges
        self.initial_weight_bits = initial_weight_bits
        self.unit = unit
        self.num_calibration_batches = num_calibration_batches
        self.network = network

        self._plan: QuantizationPlan | None = None
        self._now: int = 0
        self._restored: dict[str, Any] | None = None
        self._bound: list[MethodWrapper] = []

    # --- The run ----------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Carry the quantizers in checkpoints; refuse what cannot work before anything is loaded."""
        carry_structure(pl_module)
        if stage == "fit":
            self._restored = None  # evaluating a checkpoint leaves its state here
            refuse_sharded_strategy(trainer, type(self).__name__)
            refuse_spawned_processes(trainer, type(self).__name__)
            self._bound.append(explain_unreadable_checkpoints(trainer))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the network calibrated quantizers, or take those of the checkpoint."""
        self._let_go()
        network = self._network(pl_module)
        state, self._restored = self._restored, None
        if state is not None and state["declared"] == self._declared and is_quantized(network):
            # The run keeps the moments it was started with, also when max_epochs has grown.
            self._plan = QuantizationPlan(**state["plan"])
        else:
            self._plan = self._resolved_plan(trainer)
            self._prepare(trainer, pl_module, network)
        if train_scales(trainer, network) or self.scheme.activation_ranges == "learned":
            rewrap(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The mode of the first step."""
        self._follow_plan(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep frozen batch norms in evaluation mode, which validation and epochs undo."""
        if self._active_plan.batch_norm_frozen(self._now):
            for module in self._network(pl_module).modules():
                if isinstance(module, _BatchNorm):
                    module.training = False

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Stop before a NaN reaches the weights."""
        refuse_nan_loss(loss, trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """The mode of the next step, before validation and checkpoints."""
        self._follow_plan(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the run ended before weights had their bits."""
        network = self._network(pl_module)
        if not quantized_network(network).quantizing:
            rank_zero_warn(
                f"{type(self).__name__}: training ended before {self.unit} "
                f"{self._active_plan.begin}, where rounding begins; the network was not trained "
                "with integers. Train longer, or begin earlier."
            )
        elif self._active_plan.least_bits(self._now) > self._active_plan.last_bits:
            rank_zero_warn(
                f"{type(self).__name__}: training ended with "
                f"{self._active_plan.least_bits(self._now)} bits; {self._active_plan.last_bits} are "
                f"reached at {self.unit} {self._active_plan.freeze_ranges}. Train longer."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of what was bound to the run; the network stays quantized."""
        self._let_go()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let go of what was bound to the run."""
        self._let_go()

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

    def state_dict(self) -> dict[str, Any]:
        """When things happen, as plain data; scales are among the module's weights."""
        if self._plan is None:
            return self._restored or {}
        return {"declared": self._declared, "plan": vars(self._plan)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the fit begins."""
        self._restored = state_dict or None

    # --- Details ----------------------------------------------------------------------------------

    @property
    def _active_plan(self) -> QuantizationPlan:
        assert self._plan is not None, "on_fit_start has not run"
        return self._plan

    @property
    def _declared(self) -> str:
        """What the run is to reach and when, to recognise a checkpoint of the same run."""
        return (
            f"{self.scheme}, {self.begin}, {self.freeze_batch_norm}, {self.freeze_ranges}, "
            f"{self.initial_weight_bits}, {self.unit}"
        )

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        network = find_network(pl_module, self.network)
        original: nn.Module = getattr(network, "_orig_mod", network)
        return original

    def _resolved_plan(self, trainer: pl.Trainer) -> QuantizationPlan:
        def at(moment: Moment | None) -> int | None:
            if moment is None:
                return None
            return resolved_moment(trainer, moment, self.unit, type(self).__name__)

        begin = at(self.begin)
        assert begin is not None
        least = min((self.scheme.weight_bits, *self.scheme.layer_bits.values()))
        end = at(self.freeze_ranges)
        if self.initial_weight_bits is not None and end is None:
            end = at(1.0)
        return QuantizationPlan(
            begin, at(self.freeze_batch_norm), at(self.freeze_ranges), end or begin,
            self.initial_weight_bits or least, least,
        )  # fmt: skip

    def _prepare(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module
    ) -> None:
        if is_quantized(network):
            remove_quantization(network)  # of another stage, with other bits
        sample = TrainingSample(trainer, pl_module, network, self.num_calibration_batches)
        scheme = self.scheme.with_per_tensor(clustered_weights(trainer, pl_module, network))
        quantization = give_quantizers(trainer, pl_module, network, scheme, sample.inputs[0].run)
        rank_zero_info(f"{type(self).__name__}: {quantization.placement}")
        calibrate(network, lambda net, batch: batch.run(net), sample.inputs, "moving_average")
        self._set_bits(network, self._active_plan.first_bits)

    def _follow_plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._now = now = current_moment(trainer, pl_module, self.unit)
        plan, network = self._active_plan, self._network(pl_module)
        quantization = quantized_network(network)
        before = (quantization.quantizing, quantization.least_weight_bits)
        if plan.least_bits(now) != quantization.least_weight_bits:
            self._set_bits(network, plan.least_bits(now))
        for part in self._and_averages(trainer, pl_module, network):
            part.set_mode(observing=not plan.ranges_frozen(now), quantizing=plan.rounds(now))
            part.least_weight_bits = quantization.least_weight_bits
        after = (quantization.quantizing, quantization.least_weight_bits)
        if after != before or now == 0:
            values = {"quantization/quantizing": float(after[0])}
            values["quantization/weight_bits"] = float(after[1])
            tracking.log_metrics(trainer, values)

    def _set_bits(self, network: nn.Module, bits: int) -> None:
        quantization = quantized_network(network)
        quantization.least_weight_bits = bits
        if self.scheme.weight_ranges == "mse":
            fit_weights(network)

    def _and_averages(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module
    ) -> list[Quantization]:
        name = next(name for name, module in pl_module.named_modules() if module is network)
        parts = [network, *(a.get_submodule(name) for a in averaged_modules(trainer))]
        return [quantized_network(part) for part in parts]

    def _let_go(self) -> None:
        for wrapper in self._bound:
            wrapper.remove()
        self._bound.clear()


def _check_initial_bits(initial: int | None, final: int) -> None:
    if initial is None:
        return
    if isinstance(initial, bool) or not isinstance(initial, int) or not final <= initial <= 8:
        raise ValueError(
            f"initial_weight_bits is {initial!r}; expected a whole number from weight_bits "
            f"({final}) to 8, or nothing."
        )
