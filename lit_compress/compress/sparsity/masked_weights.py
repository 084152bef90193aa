"""Parameters with masks: the stateful twin of ``magnitude``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_compress.compress.channels.groups import take
from lit_compress.compress.sparsity.magnitude import magnitude_masks, pack_mask, unpack_mask
from lit_compress.compress.sparsity.patterns import SparsityPattern, Unstructured

__all__ = ["MaskedWeights"]


class MaskedWeights:
    """Parameters that are kept sparse in place, and can come back until they are settled.

    The masks lie beside the parameters, never in them: no parameter is renamed, replaced or
    wrapped. Until :meth:`settle` is called, a dense backup remembers the last value of every
    removed weight; masks are chosen on the backup's magnitudes, so that a removed weight returns,
    with its old value, once it outgrows those that were kept (Zhu & Gupta 2017 as PocketFlow does
    it; spec of the mask: :func:`~lit_compress.compress.sparsity.magnitude.magnitude_masks`).

    Args:
        parameters: The parameters by name, each fitting the pattern.
        pattern: What is removed together; each weight on its own by default.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], pattern: SparsityPattern | None = None
    ) -> None:
        self.pattern = pattern or Unstructured()
        self.parameters = dict(parameters)
        # Masks have the parameters' dtype and layout: multiplying by them in one fused call is
        # several times faster than by bool masks, and costs under 1 % of a training step.
        self.masks = {
            name: torch.ones_like(p, requires_grad=False) for name, p in self.parameters.items()
        }
        self.backups: dict[str, Tensor] | None = {}

    @property
    def sizes(self) -> dict[str, int]:
        """Units of the pattern in each parameter."""
        return {name: self.pattern.num_units(p.shape) for name, p in self.parameters.items()}

    @property
    def is_settled(self) -> bool:
        """Whether the masks are final."""
        return self.backups is None

    @torch.no_grad()
    def update(
        self,
        num_zeros: Mapping[str, int] | int,
        agree: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> None:
        """Choose new masks by magnitude and apply them.

        Args:
            num_zeros: As for :func:`~lit_compress.compress.sparsity.magnitude.magnitude_masks`.
            agree: Takes this process's packed masks and returns those that all processes use.

        Raises:
            ValueError: If a weight holds NaN.
            RuntimeError: If the masks are settled.
        """
        if self.backups is None:
            raise RuntimeError("the masks are settled; they cannot be updated any more.")
        dense = {
            name: torch.where(self.masks[name].bool(), p, self.backups[name])
            if name in self.backups
            else p.detach().clone()
            for name, p in self.parameters.items()
        }
        kept = magnitude_masks(dense, num_zeros, self.pattern)
        if agree is not None:
            packed = agree({name: pack_mask(mask) for name, mask in kept.items()})
            kept = {name: unpack_mask(packed[name], p.shape) for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            self.masks[name].copy_(kept[name])
            p.copy_(dense[name])
        self.backups = dense
        self.clear()

    def settle(self) -> None:
        """Make the masks final and forget the removed weights."""
        self.backups = None

    def reopen(self) -> None:
        """Let settled masks be updated again; what they removed comes back as zero."""
        if self.backups is None:
            self.backups = {}

    @torch.no_grad()
    def apply(self, names: Iterable[str] | None = None) -> None:
        """Set the removed weights to zero again, of the named parameters or of all."""
        names = list(self.parameters if names is None else names)
        if names:
            weights: list[Tensor] = [self.parameters[n] for n in names]
            torch._foreach_mul_(weights, [self.masks[n] for n in names])

    @torch.no_grad()
    def clear(self) -> None:
        """As :meth:`apply`, but every zero is +0.

        A product with 0 leaves the sign of what was removed, and a file with two kinds of zeros
        compresses worse. Slower than :meth:`apply`; meant for moments when weights are stored.
        """
        for name, p in self.parameters.items():
            p.masked_fill_(self.masks[name] == 0, 0.0)

    @torch.no_grad()
    def cut(self, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Follow a cut of the parameters: masks and removed values go with their channels.

        Args:
            kept: By parameter name and dimension: the indices that stayed. Parameters have the
                shapes after the cut already.
        """
        for name, indices in kept.items():
            if name in self.masks:
                self.masks[name] = take(self.masks[name], indices)
            if self.backups and name in self.backups:
                self.backups[name] = take(self.backups[name], indices)

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Set the gradients of the removed weights to zero."""
        gradients, masks = [], []
        for name, p in self.parameters.items():
            if p.grad is not None:
                gradients.append(p.grad)
                masks.append(self.masks[name])
        if gradients:
            torch._foreach_mul_(gradients, masks)

    @torch.no_grad()
    def apply_to_copy(self, parameters: Mapping[str, Tensor]) -> None:
        """Mask a copy of the parameters, such as an average of them, wherever it lies.

        Args:
            parameters: Tensors by name; those without a mask are skipped.
        """
        for name, mask in self.masks.items():
            if name in parameters:
                copy = parameters[name]
                copy.masked_fill_(mask.to(copy.device) == 0, 0.0)

    def sparsities(self) -> dict[str, float]:
        """The share of removed weights in each parameter, in [0, 1]."""
        return {name: 1.0 - kept / self.masks[name].numel() for name, kept in self._kept().items()}

    def sparsity(self) -> float:
        """The share of removed weights in all parameters together, in [0, 1]."""
        total = sum(mask.numel() for mask in self.masks.values())
        return (total - sum(self._kept().values())) / total

    def _kept(self) -> dict[str, int]:
        return {name: int(mask.count_nonzero()) for name, mask in self.masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors: packed masks, and the backups of removed weights until settled."""
        backups = self.backups
        return {
            "pattern": str(self.pattern),
            "masks": {name: pack_mask(mask.bool()) for name, mask in self.masks.items()},
            "shapes": {name: list(p.shape) for name, p in self.parameters.items()},
            # Only what the masks removed is worth keeping; the rest is in the weights themselves.
            "removed": None
            if backups is None
            else {
                name: backup[~self.masks[name].bool()].to("cpu") for name, backup in backups.items()
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over masks and backups; the weights themselves come with the model's state.

        Raises:
            ValueError: If the state is of other parameters; the first mismatch is named.
        """
        if state["pattern"] != str(self.pattern):
            raise ValueError(
                f"the checkpoint's masks have the pattern {state['pattern']!r}, this run's "
                f"{str(self.pattern)!r}; resume with the pattern of the checkpoint."
            )
        shapes = {name: list(p.shape) for name, p in self.parameters.items()}
        for name in [*shapes, *state["shapes"]]:
            ours, theirs = shapes.get(name), state["shapes"].get(name)
            if ours != theirs:
                raise ValueError(
                    f"the checkpoint's masks do not fit the model: {name!r} has shape {theirs} in "
                    f"the checkpoint and {ours} here (None: it has no mask). Resume with the model "
                    "and the layer selection that wrote the checkpoint."
                )
        for name, p in self.parameters.items():
            self.masks[name].copy_(unpack_mask(state["masks"][name], p.shape))
        self.backups = None if state["removed"] is None else {}
        for name, removed in (state["removed"] or {}).items():
            p = self.parameters[name]
            backup = p.detach().clone()
            backup[~self.masks[name].bool()] = removed.to(p.device, p.dtype)
            assert self.backups is not None
            self.backups[name] = backup
