"""Fits with channels that go on the way, and what the tests look at in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lit_compress import ChannelPruning, Schedule
from tests.callbacks.nets import Net, loader, trainer

WIDTHS = {"0": 8, "4": 16}
"""The groups of ``Net``: the first convolution with its norm and the depthwise one, the next."""
HALF = {"0": 4, "4": 8}


class WideNet(Net):
    """Wide enough that 1 % of it is more than one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.model[0] = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        self.model[1] = nn.BatchNorm2d(64)
        self.model[3] = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.model[4] = nn.Conv2d(64, 96, 1)
        self.model[8] = nn.Linear(384, 4)


def pruning(ratio: Any = 0.5, at: int | None = None, **arguments: Any) -> ChannelPruning:
    """The callback, without rounding unless told; ``at`` is the step of a single cut."""
    if at is not None:
        arguments["schedule"] = Schedule("constant", begin=at, end=at, update_every=1)
    return ChannelPruning(ratio, **({"round_to": 1} | arguments))


def fit(
    *callbacks: pl.Callback,
    module: pl.LightningModule | Callable[[], pl.LightningModule] = Net,
    data: Iterable[Any] | None = None,
    ckpt_path: Any = None,
    seed: int = 1,
    **settings: Any,
) -> pl.LightningModule:
    """Train a module, or what a function makes once the seed is set, for 2 epochs of 8 steps."""
    pl.seed_everything(seed, verbose=False)
    model = module if isinstance(module, pl.LightningModule) else module()
    run = trainer(**({"max_epochs": 2, "callbacks": list(callbacks)} | settings))
    run.fit(model, loader() if data is None else data, ckpt_path=ckpt_path)
    return model


def widths(module: nn.Module) -> dict[str, int]:
    """Channels of a ``Net``, all of whose tensors and attributes must agree."""
    network = getattr(module, "model", module)
    network = getattr(network, "_orig_mod", network)
    first, norm, _, depthwise, second, _, _, _, linear = network
    kept = {"0": first.out_channels, "4": second.out_channels}
    assert first.weight.shape[0] == norm.num_features == len(norm.running_mean) == kept["0"]
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == kept["0"]
    assert depthwise.weight.shape == (kept["0"], 1, 3, 3)
    assert second.weight.shape[:2] == (kept["4"], kept["0"])
    assert second.in_channels == kept["0"]
    assert linear.weight.shape == (4, linear.in_features) == (4, 4 * kept["4"])
    return kept


class Watch(pl.Callback):
    """Notes the widths at the end of each batch, after the callbacks before it."""

    def __init__(self) -> None:
        self.start: dict[str, int] = {}
        self.seen: list[dict[str, int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):  # type: ignore[no-untyped-def]
        """The widths of the first step."""
        self.start = self.start or widths(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):  # type: ignore[no-untyped-def]
        """The widths after a step and the cut that followed it."""
        self.seen.append(widths(pl_module))

    @property
    def firsts(self) -> list[int]:
        """Channels of the first group after each step."""
        return [kept["0"] for kept in self.seen]


class AcrossCut(pl.Callback):
    """Stands before and after a callback and compares what is left over the cut with before.

    ``around(callback)`` gives the three callbacks in their order.
    """

    def __init__(self) -> None:
        self.before: tuple[dict[str, Any], list[dict[str, Any]], list[Any]] | None = None
        self.compared = 0

    def around(self, callback: ChannelPruning) -> list[pl.Callback]:
        """This one, the callback, and this one again."""
        self.callback = callback
        looks_back = pl.callbacks.LambdaCallback(
            on_train_batch_end=lambda t, m, *_: self.compare(t, m)
        )
        return [self, callback, looks_back]

    def on_train_batch_end(self, trainer, pl_module, *args):  # type: ignore[no-untyped-def]
        """Note weights, optimizer state, and who the parameters are."""
        self.before = self.look(trainer, pl_module)

    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        """Copies of the weights and of each parameter's optimizer state, and all parameters."""
        weights = {n: t.detach().clone() for n, t in module.state_dict().items()}
        names = {id(p): n for n, p in module.named_parameters()}
        states = [
            {
                names[id(p)]: {k: torch.as_tensor(v).clone() for k, v in state.items()}
                for p, state in optimizer.state.items()
            }
            for optimizer in trainer.optimizers
        ]
        held = [[id(p) for g in o.param_groups for p in g["params"]] for o in trainer.optimizers]
        return weights, states, held

    def compare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """What is left has the bits that it had, in the module and in its optimizers."""
        assert self.before is not None
        weights, states, held = self.look(trainer, module)
        old_weights, old_states, old_held = self.before
        if all(t.shape == old_weights[n].shape for n, t in weights.items()):
            return
        assert held == old_held
        kept = self._kept(weights, old_weights)
        for name, tensor in weights.items():
            assert torch.equal(tensor, part(old_weights[name], kept.get(name, {}))), name
        for state, old in zip(states, old_states, strict=True):
            assert state.keys() == old.keys()
            for name, entries in state.items():
                for key, value in entries.items():
                    expected = part(old[name][key], kept.get(name, {}))
                    assert torch.equal(value, expected), (name, key)
        self.compared += 1

    def _kept(self, weights: dict[str, Any], old: dict[str, Any]) -> dict[str, dict[int, Any]]:
        """Which channels stayed, found by looking for the values of the first convolutions."""
        name = next(n for n in weights if n.endswith("0.weight"))
        first = find_rows(weights[name], old[name])
        prefix = name.removesuffix("0.weight")
        rows = old[prefix + "4.weight"].index_select(1, first)
        second = find_rows(weights[prefix + "4.weight"], rows)
        inputs = (second[:, None] * 4 + torch.arange(4)).flatten()
        kept = {"0.weight": {0: first}, "3.weight": {0: first}, "3.bias": {0: first}}
        kept |= {f"1.{n}": {0: first} for n in ("weight", "bias", "running_mean", "running_var")}
        kept |= {"4.weight": {0: second, 1: first}, "4.bias": {0: second}, "8.weight": {1: inputs}}
        return {prefix + n: by_dim for n, by_dim in kept.items()}


def find_rows(slim: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Which rows of a tensor are those of another one."""
    same = [[torch.equal(row, other) for other in dense] for row in slim]
    found = torch.tensor(same).nonzero()
    assert len(found) == len(slim), "not every row that is left was there before"
    return found[:, 1]


def part(tensor: torch.Tensor, kept: dict[int, torch.Tensor]) -> torch.Tensor:
    """The part of a tensor shaped as a parameter, or as sums over its dimensions."""
    for dim, indices in kept.items():
        if tensor.dim() > dim and tensor.shape[dim] > 1:
            tensor = tensor.index_select(dim, indices)
    return tensor


def shuffled(num_workers: int = 0, **settings: Any) -> DataLoader:
    """The images of ``loader`` in random order."""
    return DataLoader(loader().dataset, 8, shuffle=True, num_workers=num_workers, **settings)
