"""Prepare a network with quantizers in a fit, and switch modes and bits as the plan says."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_compress.callbacks.lightning import tracking
from lit_compress.callbacks.lightning.run_clock import current_moment
from lit_compress.callbacks.lightning.training_sample import TrainingSample
from lit_compress.callbacks.lightning.weight_averages import averaged_modules
from lit_compress.callbacks.pruning.cut_in_fit import rewrap
from lit_compress.callbacks.quantization.quantizers_in_fit import (
    agree_on_ranges,
    clustered_weights,
    drop_scales,
    give_quantizers,
    let_scales_learn,
    quantizers_of_averages,
    train_scales,
)
from lit_compress.compress.quantization.network import (
    calibrate,
    fit_weights,
    is_quantized,
    quantized_network,
    remove_quantization,
)
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.compress.quantization.training_plan import QuantizationPlan

__all__ = ["QuantizedTraining"]


class QuantizedTraining:
    """Carries out the plan of one run.

    Args:
        callback: The callback's name, for messages.
        scheme: What is quantized.
        plan: When what happens.
        num_calibration_batches: Training batches for the first ranges.

    Attributes:
        now: The moment that was followed last.
    """

    def __init__(
        self,
        callback: str,
        scheme: QuantizationScheme,
        plan: QuantizationPlan,
        num_calibration_batches: int,
    ) -> None:
        self.scheme = scheme
        self.plan = plan
        self.now = 0
        self._callback = callback
        self._phase: tuple[object, ...] | None = None
        self._num_batches = num_calibration_batches
        self._calibrated_at: int | None = None

    @property
    def learns(self) -> bool:
        """Whether scales are trained."""
        return self.scheme.weight_ranges == "learned"

    def prepare(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module
    ) -> None:
        """Give the network calibrated quantizers, which wait for the plan."""
        if is_quantized(network):  # by another stage, with other bits
            drop_scales(trainer, network)
            remove_quantization(network)
        sample = self._sample(trainer, pl_module, network)
        scheme = self.scheme.with_per_tensor(clustered_weights(trainer, pl_module, network))
        quantization = give_quantizers(trainer, pl_module, network, scheme, sample.inputs[0].run)
        rank_zero_info(f"{self._callback}: {quantization.placement}")
        quantization.least_weight_bits = self.plan.first_bits
        self.now = current_moment(trainer, pl_module, self.plan.unit)
        self._calibrate(trainer, pl_module, network, sample)
        quantization.set_mode(observing=False, quantizing=False)
        train_scales(trainer, network)
        let_scales_learn(network, False)

    def resume(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module
    ) -> None:
        """Go on with the quantizers of a checkpoint, before the optimizer's state is restored."""
        train_scales(trainer, network)
        let_scales_learn(network, quantized_network(network).quantizing)
        self._rewrap(trainer, pl_module)

    def follow_plan(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module
    ) -> None:
        """The mode and the bits of the next step, for the network and the averages of it."""
        self.now = now = current_moment(trainer, pl_module, self.plan.unit)
        plan = self.plan
        averages = list(averaged_modules(trainer))
        phase = (
            plan.rounds(now),
            plan.ranges_frozen(now),
            plan.least_bits(now),
            *map(id, averages),
        )
        if phase == self._phase:
            return  # as it was in the step before
        self._phase = phase
        quantization = quantized_network(network)
        quantizers = quantizers_of_averages(trainer, pl_module, network)
        before = (quantization.quantizing, quantization.least_weight_bits)
        if plan.least_bits(now) != quantization.least_weight_bits:
            quantization.least_weight_bits = plan.least_bits(now)
            if self.learns:
                fit_weights(network)  # the best range for fewer bits is a smaller one
            for average in quantizers:
                average.load_state_dict(quantization.state_dict())
        begins = plan.rounds(now) and not quantization.quantizing
        if begins and self._calibrated_at != now:
            self._calibrate(trainer, pl_module, network, self._sample(trainer, pl_module, network))
        for part in (quantization, *quantizers):
            part.set_mode(observing=not plan.ranges_frozen(now), quantizing=plan.rounds(now))
        if begins:
            let_scales_learn(network, True)
            self._rewrap(trainer, pl_module)
        after = (quantization.quantizing, quantization.least_weight_bits)
        if after != before or now == 0:
            values = {"quantization/quantizing": float(after[0])}
            values["quantization/weight_bits"] = float(after[1])
            tracking.log_metrics(trainer, values)

    def _sample(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module
    ) -> TrainingSample:
        return TrainingSample(trainer, pl_module, network, self._num_batches)

    def _calibrate(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        network: nn.Module,
        sample: TrainingSample,
    ) -> None:
        calibrate(network, lambda net, batch: batch.run(net), sample.inputs, "moving_average")
        agree_on_ranges(trainer, quantized_network(network), also_learned=True)
        for average in quantizers_of_averages(trainer, pl_module, network):
            average.load_state_dict(quantized_network(network).state_dict())
        self._calibrated_at = self.now

    def _rewrap(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.learns:
            rewrap(trainer, pl_module)
