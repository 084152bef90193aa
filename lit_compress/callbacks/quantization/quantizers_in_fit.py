"""Quantizers during a fit: calibration, optimizers, averages, processes and batch norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lit_compress.callbacks.lightning.method_wrapping import MethodWrapper
from lit_compress.callbacks.lightning.weight_averages import averaged_modules
from lit_compress.callbacks.weight_clustering import WeightClustering
from lit_compress.compress.layers import plain_name
from lit_compress.compress.quantization.network import (
    Quantization,
    attach,
    is_quantized,
    prepare,
    quantization_record,
    quantized_network,
    remove_quantization,
)
from lit_compress.compress.quantization.quantizers import Quantizer
from lit_compress.compress.quantization.scheme import QuantizationScheme

__all__ = [
    "CallWatch",
    "FrozenBatchNorms",
    "SteadyScales",
    "agree_on_ranges",
    "clustered_weights",
    "cut_quantizers",
    "drop_scales",
    "follow_in_average",
    "give_quantizers",
    "let_scales_learn",
    "quantizers_of_averages",
    "train_scales",
]


def give_quantizers(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    network: nn.Module,
    scheme: QuantizationScheme,
    run: Callable[[nn.Module], Any],
) -> Quantization:
    """Prepare a network that is about to train, and the averages that callbacks keep of it.

    Args:
        trainer: A Trainer in ``on_fit_start`` or later.
        pl_module: The module.
        network: The network inside of it, not quantized.
        scheme: What is to be quantized.
        run: Calls the network once.
    """
    quantization = prepare(network, scheme, run, plain_name(_name(pl_module, network)))
    record = quantization_record(network)
    assert record is not None
    for average in averaged_modules(trainer):
        part = average.get_submodule(_name(pl_module, network))
        if is_quantized(part):
            remove_quantization(part)
        attach(part, record)
    return quantization


def train_scales(trainer: pl.Trainer, network: nn.Module) -> int:
    """Have the optimizer of a network train the scales that are learned.

    They join the parameter group of least weight decay of the optimizer that has most of the
    network's parameters, so that schedulers and the resuming of optimizers go on as they are.

    Args:
        trainer: A Trainer; in ``on_fit_start``, before optimizer states are restored, if they hold
            states of these scales, else in ``on_train_start``.
        network: A quantized network.

    Returns:
        How many scales were added.
    """
    # Where a checkpoint brought them, they are among the parameters that the user's optimizer got.
    scales = drop_scales(trainer, network)
    if not scales or not trainer.optimizers:
        return 0
    own = {id(p) for p in network.parameters()}
    optimizer = max(
        trainer.optimizers,
        key=lambda o: sum(id(p) in own for g in o.param_groups for p in g["params"]),
    )
    group = min(optimizer.param_groups, key=lambda g: float(g.get("weight_decay", 0.0)))
    group["params"] += scales
    return len(scales)


def drop_scales(trainer: pl.Trainer, network: nn.Module) -> list[nn.Parameter]:
    """Take the learned scales of a quantized network out of all optimizers, and return them."""
    scales = list(quantized_network(network).parameters())
    dropped = {id(scale) for scale in scales}
    for optimizer in trainer.optimizers:
        for scale in scales:
            optimizer.state.pop(scale, None)
        for group in optimizer.param_groups:
            if any(id(p) in dropped for p in group["params"]):
                group["params"] = [p for p in group["params"] if id(p) not in dropped]
    return scales


def let_scales_learn(network: nn.Module, learn: bool) -> None:
    """Say whether scales that are learned get gradients; DDP waits for those of all that do."""
    for scale in quantized_network(network).parameters():
        scale.requires_grad_(learn)
        if not learn:
            scale.grad = None


def quantizers_of_averages(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module
) -> list[Quantization]:
    """The quantizers of a network in the averages that callbacks keep of it."""
    name = _name(pl_module, network)
    parts = [average.get_submodule(name) for average in averaged_modules(trainer)]
    return [quantized_network(part) for part in parts if is_quantized(part)]


@torch.no_grad()
def follow_in_average(
    pl_module: pl.LightningModule, network: nn.Module, average: nn.Module
) -> None:
    """Give an average the ranges of the network: zero points are no numbers to average.

    Args:
        pl_module: The module.
        network: A quantized network inside of it.
        average: An average of the module. Scales that are learned stay averages.
    """
    part = average.get_submodule(_name(pl_module, network))
    if is_quantized(part):
        ranges = dict(quantized_network(network).named_buffers())
        for name, buffer in quantized_network(part).named_buffers():
            buffer.copy_(ranges[name])


def agree_on_ranges(
    trainer: pl.Trainer, quantization: Quantization, also_learned: bool = False
) -> None:
    """Give all processes the mean of the ranges that they observed.

    Args:
        trainer: The Trainer.
        quantization: A network's quantizers, the same in each process.
        also_learned: Whether learned scales start again from these ranges.
    """
    if trainer.world_size == 1:
        return

    def mean(ends: Tensor) -> Tensor:
        return trainer.strategy.reduce(ends, reduce_op="mean")

    quantization.map_ranges(mean, also_learned)


class FrozenBatchNorms:
    """Batch norms held in evaluation mode, until they get their own mode back."""

    def __init__(self) -> None:
        self._held: dict[int, nn.Module] = {}

    def hold(self, network: nn.Module) -> None:
        """Put the batch norms of a network that are in training mode into evaluation mode."""
        for module in network.modules():
            if isinstance(module, _BatchNorm) and module.training:
                module.training = False
                self._held[id(module)] = module

    def release(self) -> None:
        """Put those that were held back into training mode."""
        for module in self._held.values():
            module.training = True
        self._held.clear()


class SteadyScales:
    """Keeps an optimizer step from changing a learned scale by more than a factor of two.

    A scale that a large step takes to zero or below would have no gradient that brings it back.

    Args:
        trainer: A Trainer whose optimizers have the scales.
        network: A quantized network.
    """

    def __init__(self, trainer: pl.Trainer, network: nn.Module) -> None:
        self._scales = list(quantized_network(network).parameters())
        self._before: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        if self._scales:
            for optimizer in trainer.optimizers:
                self._handles.append(optimizer.register_step_pre_hook(self._note))
                self._handles.append(optimizer.register_step_post_hook(self._limit))

    def remove(self) -> None:
        """Let optimizers step as they did."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _note(self, *_: Any) -> None:
        self._before = [scale.detach().clone() for scale in self._scales]

    @torch.no_grad()
    def _limit(self, *_: Any) -> None:
        for scale, before in zip(self._scales, self._before, strict=True):
            scale.clamp_(before / 2, before * 2)


class CallWatch:
    """Finds out whether training steps call a quantized network.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.num_steps = 0
        self._called = False
        self._wrapper = MethodWrapper(quantized_network(network), "run", self._run)

    @property
    def was_missed(self) -> bool:
        """Whether there were training steps and none of them called it."""
        return self.num_steps > 0 and not self._called

    def remove(self) -> None:
        """Stop watching."""
        self._wrapper.remove()

    def _run(self, run: Callable[..., Any], network: nn.Module, *args: Any) -> Any:
        self._called |= network.training
        return run(network, *args)


def cut_quantizers(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    network: nn.Module,
    kept: Mapping[str, Mapping[int, Tensor]],
) -> None:
    """Cut the scales of weights that were cut, with the optimizer's state for them.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        network: A quantized network inside of it.
        kept: As in ``on_channels_cut``.
    """
    name = _name(pl_module, network)
    prefix = plain_name(f"{name}." if name else "")
    parts = [network, *(a.get_submodule(name) for a in averaged_modules(trainer))]
    for quantization in map(quantized_network, filter(is_quantized, parts)):
        for weight in dict.fromkeys(quantization.placement.weights.values()):
            quantizer = quantization.weight(weight)
            left = kept.get(prefix + plain_name(weight), {})
            if quantizer.axis is not None and quantizer.axis in left:
                _cut(trainer, quantizer, left[quantizer.axis])


def _cut(trainer: pl.Trainer, quantizer: Quantizer, kept: Tensor) -> None:
    for optimizer in trainer.optimizers:
        state = optimizer.state.get(quantizer.scale, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == quantizer.scale.shape and value.dim():
                state[key] = value[kept.to(value.device)]
    for tensor in (quantizer.scale, quantizer.zero_point):
        tensor.data = tensor.data[kept.to(tensor.device)].clone()
    quantizer.scale.grad = None


def clustered_weights(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module
) -> list[str]:
    """Names within a network of the weights that callbacks keep, or will keep, in clusters."""
    name = _name(pl_module, network)
    prefix = plain_name(f"{name}." if name else "")
    clustered: set[str] = set()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightClustering) and callback.selection is not None:
            clustered |= set(callback.selection.names)
    return [n for n, _ in network.named_parameters() if prefix + plain_name(n) in clustered]


def _name(pl_module: pl.LightningModule, network: nn.Module) -> str:
    name: str = next(n for n, module in pl_module.named_modules() if module is network)
    return name
