"""Image classification: one LightningModule for all recipes."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lit_compress.tasks.assets import load_weights, weights_path
from lit_compress.tasks.models import build_model

LrSchedule = Literal["cosine", "constant", "one_cycle"]

_ONE_CYCLE_WARMUP = 0.3
_ONE_CYCLE_START = 1 / 25


class ImageClassifier(LightningModule):
    """Trains an image classifier with cross-entropy; the network is the attribute ``model``.

    Batches are pairs of images ``(batch, channels, height, width)`` and labels ``(batch,)``.
    Logs ``train_loss``; ``val_loss``, ``val_top1``, ``val_top5``; ``test_loss``, ``test_top1``,
    ``test_top5``. Accuracies lie in [0, 1]; with fewer than five classes, top-5 counts them all.

    Args:
        model: Name of the network, as for :func:`~lit_compress.tasks.models.build_model`.
        num_classes: Logits of the network, at least 1.
        model_args: Further arguments of the network, such as ``{"width": 0.5}``.
        weights: Weights to start from: a file, or a name in ``weights/`` of the assets folder. A
            checkpoint of this module brings its own: there this argument is not kept.
        optimizer: ``"sgd"`` (with Nesterov momentum) or ``"adamw"``.
        lr: Highest learning rate, above 0.
        momentum: Of ``"sgd"``, in [0, 1).
        weight_decay: At least 0.
        lr_schedule: How the learning rate goes, step by step; see :func:`lr_factor`.
        warmup_fraction: Fraction of the run, in [0, 1), in which the rate rises from 0. For
            ``"one_cycle"``, 0 means its usual 0.3.
        label_smoothing: In [0, 1); of the training loss only.

    Raises:
        ValueError: If an argument is out of its range, or the weights do not fit the network.
        AssetsNotFoundError: If there are no such weights.
    """

    def __init__(
        self,
        model: str = "resnet20",
        num_classes: int = 10,
        model_args: dict[str, Any] | None = None,
        weights: str | None = None,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        lr_schedule: LrSchedule = "cosine",
        warmup_fraction: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        # Not `weights`: a checkpoint must load where that file is not.
        self.save_hyperparameters(ignore=["weights"])
        _check_choice("optimizer", optimizer, ("sgd", "adamw"))
        _check_choice("lr_schedule", lr_schedule, ("cosine", "constant", "one_cycle"))
        if lr <= 0:
            raise ValueError(f"lr came as {lr}; give a learning rate above 0.")
        if weight_decay < 0:
            raise ValueError(f"weight_decay came as {weight_decay}; give 0 or more.")
        for name in ("momentum", "warmup_fraction", "label_smoothing"):
            if not 0 <= self.hparams[name] < 1:
                raise ValueError(f"{name} came as {self.hparams[name]}; give a value in [0, 1).")
        self.model = build_model(model, num_classes, **(model_args or {}))
        if weights is not None:
            load_weights(self.model, weights_path(weights))
        accuracies = MetricCollection(
            {
                "top1": MulticlassAccuracy(num_classes, average="micro"),
                "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            }
        )
        self.val_accuracies = accuracies.clone(prefix="val_")
        self.test_accuracies = accuracies.clone(prefix="test_")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(batch, num_classes)`` of images ``(batch, channels, h, w)``."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of the batch."""
        images, labels = batch
        smoothing = self.hparams["label_smoothing"]
        loss = F.cross_entropy(self(images), labels, label_smoothing=smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracies over the validation set."""
        self._evaluate("val_loss", self.val_accuracies, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracies over the test set."""
        self._evaluate("test_loss", self.test_accuracies, batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return logits; labels in the batch are ignored."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        logits: Tensor = self(images)
        return logits

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and a scheduler that steps with it.

        Raises:
            MisconfigurationException: If the schedule needs the length of the run, and it has none.
        """
        hparams = self.hparams
        optimizer: torch.optim.Optimizer
        if hparams["optimizer"] == "sgd":
            momentum = hparams["momentum"]
            optimizer = torch.optim.SGD(
                self.model.parameters(),
                hparams["lr"],
                momentum=momentum,
                weight_decay=hparams["weight_decay"],
                nesterov=momentum > 0,
            )
        else:
            optimizer = torch.optim.AdamW(
                self.model.parameters(), hparams["lr"], weight_decay=hparams["weight_decay"]
            )
        schedule, warmup = hparams["lr_schedule"], hparams["warmup_fraction"]
        if schedule == "constant" and warmup == 0:
            return optimizer
        total_steps = self.trainer.estimated_stepping_batches
        if not 0 <= total_steps < math.inf:
            raise MisconfigurationException(
                f"lr_schedule={schedule!r} with warmup_fraction={warmup} needs the length of the "
                "run, and the Trainer has none. Set Trainer(max_epochs=...) or max_steps, or take "
                "lr_schedule='constant' without warm-up."
            )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, int(total_steps), schedule, warmup)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _evaluate(
        self, loss_name: str, accuracies: MetricCollection, batch: tuple[Tensor, Tensor]
    ) -> None:
        images, labels = batch
        logits = self(images)
        self.log(loss_name, F.cross_entropy(logits, labels), prog_bar=True, sync_dist=True)
        accuracies.update(logits, labels)
        self.log_dict(accuracies, prog_bar=True)


def lr_factor(
    step: int, total_steps: int, schedule: LrSchedule = "cosine", warmup_fraction: float = 0.0
) -> float:
    """Return the learning rate of a step as a fraction of the highest one.

    With ``p`` the fraction of the run done and ``w`` the warm-up fraction: for ``p < w`` the factor
    rises linearly (``(step + 1)`` over the warm-up's steps plus 1); then ``"constant"`` stays at 1
    and ``"cosine"`` falls as ``(1 + cos(pi (p - w) / (1 - w))) / 2`` to 0 (Loshchilov and Hutter
    2017, without restarts). ``"one_cycle"`` rises from 1/25 to 1 by a half cosine instead and then
    falls as ``"cosine"`` (Smith and Topin 2018; momentum stays as it is).

    Args:
        step: Optimizer steps done, at least 0; from ``total_steps`` on, the last value holds.
        total_steps: Optimizer steps of the run; 0 counts as 1.
        schedule: The form.
        warmup_fraction: ``w``, in [0, 1); for ``"one_cycle"``, 0 means 0.3.

    Returns:
        The factor, in [0, 1].

    Examples:
        >>> lr_factor(0, 100), lr_factor(50, 100), lr_factor(100, 100)
        (1.0, 0.5, 0.0)
        >>> lr_factor(0, 100, "one_cycle"), lr_factor(30, 100, "one_cycle")
        (0.04, 1.0)
        >>> lr_factor(99, 100, "constant")
        1.0
    """
    if schedule == "one_cycle" and warmup_fraction == 0:
        warmup_fraction = _ONE_CYCLE_WARMUP
    total_steps = max(total_steps, 1)
    done = min(step, total_steps) / total_steps
    if done < warmup_fraction:
        if schedule == "one_cycle":
            rise = _half_cosine(1 - done / warmup_fraction)
            return _ONE_CYCLE_START + (1 - _ONE_CYCLE_START) * rise
        return (step + 1) / (warmup_fraction * total_steps + 1)
    if schedule == "constant":
        return 1.0
    return _half_cosine((done - warmup_fraction) / (1 - warmup_fraction))


def _half_cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return (1 + math.cos(math.pi * progress)) / 2


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} came as {value!r}; the choices are {', '.join(choices)}.")
