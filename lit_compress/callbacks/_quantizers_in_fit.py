"""Quantizers that come and change in a fit: optimizers, averages and cuts follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lit_compress.callbacks._weight_averages import averaged_modules
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

__all__ = ["clustered_weights", "cut_quantizers", "give_quantizers", "train_scales"]


def give_quantizers(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    network: nn.Module,
    scheme: QuantizationScheme,
    run: Callable[[nn.Module], Any],
) -> Quantization:
    """Prepare a network that is about to train, and the averages that callbacks keep of it.

    Args:
        trainer: A Trainer in ``on_fit_start``.
        pl_module: The module.
        network: The network inside of it, not quantized.
        scheme: What is to be quantized.
        run: Calls the network once.
    """
    quantization = prepare(network, scheme, run)
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
        trainer: A Trainer in ``on_fit_start``, before optimizer states are restored.
        network: A quantized network.

    Returns:
        How many scales were added.
    """
    known = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    scales = [p for p in quantized_network(network).parameters() if id(p) not in known]
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
    """Names within a network of the weights that callbacks keep in clusters."""
    name = _name(pl_module, network)
    prefix = f"{name}." if name else ""
    clustered: set[str] = set()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        clustered |= set(getattr(callback, "clustered_names", ()))
    names = {plain_name(n): n for n, _ in network.named_parameters()}
    return [own for plain, own in names.items() if plain_name(prefix) + plain in clustered]


def _name(pl_module: pl.LightningModule, network: nn.Module) -> str:
    return next(name for name, module in pl_module.named_modules() if module is network)
