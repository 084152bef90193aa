"""CompressionCallback: the lifecycle of all callbacks that compress a network during a fit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_compress.arguments import differences, plain_arguments
from lit_compress.callbacks.lightning.loader_states import restore_loader_states
from lit_compress.callbacks.lightning.method_wrapping import Bindings
from lit_compress.callbacks.lightning.requirements import (
    check_nan_loss,
    check_strategy,
    explain_unreadable_checkpoints,
)
from lit_compress.callbacks.lightning.structure_in_checkpoints import carry_structure
from lit_compress.callbacks.search.searched import TakesSearched, check_search_before
from lit_compress.callbacks.stage_order import CompressionStage, check_stage_order

__all__ = ["CompressionCallback"]


class CompressionCallback(pl.Callback):
    """What callbacks share that compress a network while it trains.

    A subclass says what it was told (:attr:`declared`), what it does when a fit starts
    (:meth:`start_or_resume`) and what is to be known when the run is resumed (:meth:`fit_state`).
    In return:

    - what cannot work is refused in ``setup``, before anything is loaded (:meth:`check_run`);
    - what it binds to the run with :attr:`bindings` is released on every way out: the end of the
      fit, an exception, an interrupt;
    - a checkpoint's state is kept until the fit starts and its model is known; the state of one
      that was only evaluated is not taken for it;
    - a checkpoint is one of the same run if its arguments are the same (:meth:`is_same_run`), where
      an argument that is newer than the checkpoint has its default;
    - a NaN in the loss stops the run before it reaches the weights.
    """

    changes_weights: ClassVar[bool] = True
    """Whether weights are other ones afterwards, which a snapshot of a teacher must not see."""
    changes_structure: ClassVar[bool] = False
    """Whether a checkpoint must say how the module is built: channels cut, quantizers attached."""

    def __init__(self) -> None:
        super().__init__()
        self.bindings = Bindings()
        self._restored: dict[str, Any] | None = None

    # --- What a subclass says ---------------------------------------------------------------------

    @property
    def declared(self) -> Mapping[str, Any]:
        """The arguments that decide where a run leads, by name."""
        raise NotImplementedError

    def check_run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work, in the ``setup`` of a fit, before anything is loaded."""
        check_strategy(trainer, type(self).__name__, self.changes_structure)
        if isinstance(self, TakesSearched):
            check_search_before(trainer, self)
        if isinstance(self, CompressionStage):
            check_stage_order(trainer, pl_module)

    def start_or_resume(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: dict[str, Any] | None
    ) -> None:
        """Get ready for the run.

        Args:
            trainer: A Trainer in ``on_fit_start``.
            pl_module: The module, with the weights of the checkpoint that is resumed, if any.
            state: What :meth:`fit_state` gave when that was written; ``None`` for a new run.
        """
        raise NotImplementedError

    def fit_state(self) -> dict[str, Any] | None:
        """What a resumed run has to know, as tensors and plain data; ``None`` before a fit."""
        raise NotImplementedError

    def follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do what is due between two batches: before the first, and after each.

        After a batch it comes before validation and checkpoints.
        """

    def release(self) -> None:
        """Release the run; called at its end, however it ends, and possibly more than once."""
        self.bindings.release()

    # --- The run ----------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything is loaded."""
        if self.changes_structure:
            carry_structure(pl_module)
        if stage == "fit":
            self._restored = None  # evaluating a checkpoint leaves its state here
            self.check_run(trainer, pl_module)
            self.bindings.add(explain_unreadable_checkpoints(trainer))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start a run, or go on where the checkpoint left off."""
        self.release()
        if trainer.ckpt_path is not None:
            self.bindings.add(restore_loader_states(trainer))
        state, self._restored = self._restored, None
        self.start_or_resume(trainer, pl_module, state)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do what is due before the first step, of a resumed run as well."""
        self.follow(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Do what is due after a batch."""
        self.follow(trainer, pl_module)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Stop before a NaN reaches the weights."""
        check_nan_loss(loss, trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Release the run."""
        self.release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Release the run."""
        self.release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the run."""
        self.release()

    # --- Checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The arguments and :meth:`fit_state`."""
        if self._restored is not None:
            return self._restored
        state = self.fit_state()
        return {} if state is None else {"declared": plain_arguments(self.declared), **state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the fit starts and the model is known."""
        self._restored = state_dict or None

    def is_same_run(self, state: Mapping[str, Any], otherwise: str, warn: bool = False) -> bool:
        """Whether a checkpoint was written under the arguments of this run.

        Args:
            state: What :meth:`state_dict` gave.
            otherwise: What happens if it was not, for the message that names the differences.
            warn: Whether that message is a warning.
        """
        saved = state.get("declared")
        if not isinstance(saved, dict):
            rank_zero_info(
                f"{type(self).__name__}: the checkpoint is of an earlier version, which did not "
                "keep arguments that can be compared; it is taken for one of this very run."
            )
            return True
        parameters = inspect.signature(type(self)).parameters
        found = differences(saved, self.declared, {n: p.default for n, p in parameters.items()})
        if found:
            (rank_zero_warn if warn else rank_zero_info)(
                f"{type(self).__name__}: the checkpoint was written under other arguments "
                f"({'; '.join(found)}); {otherwise}"
            )
        return not found
