"""Draw a few training batches for calibration, with the network's inputs on them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.data import DataLoader

from lit_compress.callbacks.distillation.teacher import copy_network
from lit_compress.callbacks.lightning.loader_states import fresh_loaders
from lit_compress.callbacks.lightning.network_calls import NetworkCalls
from lit_compress.measure import ExampleInputs
from lit_compress.measure.inputs import with_batch_size

__all__ = ["NetworkInput", "TrainingSample", "beside", "draw_batches", "on_device"]

_SEED = 0


@dataclass(frozen=True)
class NetworkInput:
    """What a network is called with on one batch.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, network: nn.Module) -> Any:
        """Call a network with it."""
        return network(*self.args, **self.kwargs)

    def cut_to(self, batch_size: int) -> NetworkInput:
        """The same with fewer (or repeated) examples, or as it is if it holds no batch."""
        try:
            changed: Any = with_batch_size((self.args, self.kwargs), batch_size)
        except ValueError:
            return self
        return NetworkInput(*changed)

    def as_example(self) -> ExampleInputs | None:
        """One example as ``measure`` takes it; ``None`` where arguments of both kinds are given."""
        if self.args and self.kwargs:
            return None
        one = self.cut_to(1)
        return one.kwargs or one.args


class TrainingSample:
    """The first batches that training would see, the same in each run and after each resume.

    They are drawn beside the run: its loaders, their workers and the random state stay as they are.

    Args:
        trainer: A Trainer in ``on_fit_start`` or later.
        pl_module: The module that it trains.
        network: The network inside of it that is to be called.
        num_batches: How many, at least 1; fewer if the epoch is shorter.

    Raises:
        MisconfigurationException: If there is no training batch, or it cannot be found out what the
            network is called with.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        network: nn.Module,
        num_batches: int,
    ) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._network_name = next(n for n, m in pl_module.named_modules() if m is network)
        self.batches = [on_device(trainer, b) for b in draw_batches(trainer, num_batches)]
        self.inputs = self._inputs()

    def losses(self) -> tuple[nn.Module, Callable[[Any], Tensor]]:
        """A copy of the network, and the training loss of it on one of :attr:`batches`.

        Raises:
            MisconfigurationException: Under manual optimization, where no step returns the loss.
        """
        if not self._pl_module.automatic_optimization:
            raise MisconfigurationException(
                "gradients of the loss are needed, and under manual optimization training_step "
                "keeps it to itself; choose an importance other than 'taylor'."
            )
        copied = self._stand_in()

        def loss_of(batch: Any) -> Tensor:
            output = copied.training_step(batch, 0)
            loss = output["loss"] if isinstance(output, dict) else output
            assert isinstance(loss, Tensor)
            return loss

        return copied.get_submodule(self._network_name), loss_of

    def _inputs(self) -> list[NetworkInput]:
        stand_in = self._stand_in()
        calls = NetworkCalls(stand_in.get_submodule(self._network_name), requires_grad=False)
        calls.install()
        step = self._step(stand_in)
        inputs = []
        try:
            with isolate_rng(), torch.no_grad(), calls.recording():
                for batch in self.batches:
                    step(batch, 0)
                    inputs += [NetworkInput(c.args, c.kwargs) for c in calls.take()[:1]]
        except Exception as error:
            raise MisconfigurationException(
                f"a step of {type(stand_in).__name__} on a training batch raised "
                f"{type(error).__name__}: {error}. It was run to see what the network is called "
                "with, on a copy of the module."
            ) from error
        if not inputs and self._pl_module.example_input_array is not None:
            inputs = [self._example(self._pl_module.example_input_array)]
        if not inputs:
            raise MisconfigurationException(
                f"it cannot be found out what {type(self._pl_module).__name__} calls its network "
                "with: its training and validation steps do not call forward. Set "
                "example_input_array on the module."
            )
        return inputs

    def _step(self, stand_in: pl.LightningModule) -> Callable[..., Any]:
        if stand_in.automatic_optimization:
            return stand_in.training_step
        # A manual training step would step the optimizers.
        return stand_in.validation_step if is_overridden("validation_step", stand_in) else _ignore

    def _stand_in(self) -> pl.LightningModule:
        """A copy of the module that logs nothing."""
        copied = copy_network(self._pl_module)
        assert isinstance(copied, pl.LightningModule)
        copied.trainer = self._trainer
        for name in ("log", "log_dict"):
            vars(copied)[name] = _ignore
        return copied

    def _example(self, example: Any) -> NetworkInput:
        moved = on_device(self._trainer, example)
        if isinstance(moved, dict):
            return NetworkInput((), moved)
        return NetworkInput(tuple(moved) if isinstance(moved, tuple) else (moved,), {})


def draw_batches(trainer: pl.Trainer, num_batches: int) -> list[Any]:
    """The first training batches, drawn beside the run.

    Args:
        trainer: A Trainer in ``on_fit_start`` or later.
        num_batches: How many, at least 1.

    Returns:
        At most that many batches, as the loader gives them.

    Raises:
        MisconfigurationException: If there are none.
    """
    combined, loaders = fresh_loaders(trainer)
    wanted = int(min(num_batches, trainer.num_training_batches))
    batches = []
    if combined is not None:  # it is where limit_train_batches=0
        with isolate_rng():
            torch.manual_seed(_SEED)
            stream = CombinedLoader(tree_map(beside, loaders), combined._mode)
            batches = [item[0] for item in itertools.islice(iter(stream), wanted)]
    if not batches:
        raise MisconfigurationException(
            "the training data has no batch, and at least one is needed to see what the network "
            "is called with. Check the training data loader."
        )
    return batches


def beside(loader: Any) -> Any:
    """A loader over the same data that begins at the beginning and has a life of its own."""
    copied = copy.copy(loader)
    if isinstance(copied, DataLoader):
        sampler: Any = copy.copy(copied.sampler)
        if isinstance(getattr(sampler, "generator", None), torch.Generator):
            sampler.generator = torch.Generator().manual_seed(_SEED)
        batch_sampler: Any = copy.copy(copied.batch_sampler)
        if getattr(batch_sampler, "sampler", None) is copied.sampler:
            batch_sampler.sampler = sampler
        # A DataLoader guards these against being set after it is made.
        vars(copied).update(
            sampler=sampler,
            batch_sampler=batch_sampler,
            generator=torch.Generator().manual_seed(_SEED),
            num_workers=0,
            prefetch_factor=None,
            persistent_workers=False,
            timeout=0,
            _iterator=None,
        )
    elif callable(getattr(copied, "set_epoch", None)) and hasattr(copied, "load_state_dict"):
        copied.set_epoch(-1)  # drops the place of a resumed run
        copied.set_epoch(0)
    return copied


def on_device(trainer: pl.Trainer, batch: Any, loader: int = 0) -> Any:
    """A batch as the module gets it: converted, transferred, without gradient history.

    Args:
        trainer: The Trainer.
        batch: As the loader gives it.
        loader: The loader's number.
    """
    module = trainer.lightning_module
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=loader)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=loader)
    return tree_map_only(Tensor, Tensor.detach, batch)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``self.log``."""
