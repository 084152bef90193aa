"""Data modules of images in memory: their base, scikit-learn's digits, torchvision's CIFAR."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from lit_compress.tasks.loader import ArrayLoader, Augmentation, Batch, Normalization
from lit_compress.tasks.splits import hold_out

Split = Literal["train", "val", "test"]
Arrays = tuple[Tensor, Tensor]
"""Images ``(n, channels, height, width)`` uint8 and labels ``(n,)`` int64."""

CROP_AND_FLIP = Augmentation(crop_padding=4, horizontal_flip=True)
"""The usual augmentation of 32-pixel images: He et al. 2016, section 4.2."""


class ImageDataModule(LightningDataModule, ABC):
    """Gives loaders over images in memory; a subclass says which images.

    A fit through this module can be resumed inside an epoch: the place of the training loader is
    part of the checkpoint. (Lightning saves it too, but drops it where the loader is made before
    the checkpoint is read, as ``trainer.estimated_stepping_batches`` does.)

    Args:
        batch_size: Images in a batch of one process, at least 1.
        normalization: How bytes become floats.
        augmentation: Of training images; None for none.
        drop_last: Leave out the last training batch of an epoch when it is not full.
        seed: Of the held-out split, the order and the augmentation.

    Raises:
        ValueError: If ``batch_size`` is below 1 or ``seed`` below 0.
    """

    def __init__(
        self,
        batch_size: int,
        normalization: Normalization,
        *,
        augmentation: Augmentation | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size came as {batch_size}; give at least 1.")
        if seed < 0:
            raise ValueError(f"seed came as {seed}; give 0 or more.")
        self.batch_size = batch_size
        self.normalization = normalization
        self.augmentation = augmentation
        self.drop_last = drop_last
        self.seed = seed
        self.class_names: tuple[str, ...] = ()
        self.splits: dict[Split, Arrays] = {}
        self._train_loader: ArrayLoader | None = None
        self._place_to_load: dict[str, Any] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes; known after :meth:`setup`."""
        return len(self.class_names)

    @abstractmethod
    def read(self) -> dict[Split, Arrays]:
        """Return the images and labels of all three splits, and set ``class_names``."""

    def setup(self, stage: str | None = None) -> None:
        """Read the images, the first time."""
        if not self.splits:
            self.splits = self.read()
        self._train_loader = None

    def train_dataloader(self) -> ArrayLoader | DataLoader[Batch]:
        """Return the loader of the training split: shuffled, augmented, resumable."""
        loader = self.loader("train")
        if isinstance(loader, ArrayLoader):
            self._train_loader = loader
            if self._place_to_load is not None:
                loader.load_state_dict(self._place_to_load)
                self._place_to_load = None
        return loader

    def val_dataloader(self) -> ArrayLoader | DataLoader[Batch]:
        """Return the loader of the validation split, in order."""
        return self.loader("val")

    def test_dataloader(self) -> ArrayLoader | DataLoader[Batch]:
        """Return the loader of the test split, in order."""
        return self.loader("test")

    def predict_dataloader(self) -> ArrayLoader | DataLoader[Batch]:
        """Return the loader of the test split, in order."""
        return self.loader("test")

    def loader(self, split: Split) -> ArrayLoader | DataLoader[Batch]:
        """Return a loader of one split, for this process of the Trainer's."""
        images, labels = self.splits[split]
        training = split == "train"
        # To overfit is to see the same few batches in every epoch.
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        return ArrayLoader(
            images,
            labels,
            self.batch_size,
            self.normalization,
            shuffle=training and not overfit,
            drop_last=training and self.drop_last,
            augmentation=self.augmentation if training else None,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the training loader, for the checkpoint."""
        if self._train_loader is None:
            return {}
        return {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the training loader, made already or not, to its place in the checkpoint."""
        fitting = self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        place = state_dict.get("train_loader")
        if place is None or not fitting:
            return
        if self._train_loader is None:
            self._place_to_load = place
        else:
            self._train_loader.load_state_dict(place)


class DigitsDataModule(ImageDataModule):
    """scikit-learn's 1,797 handwritten digits: grey, 8 x 8, embedded in the package.

    Args:
        batch_size: Images in a batch, at least 1.
        val_fraction: Part of all images held out for validation, in (0, 1), the same part of each
            class.
        test_fraction: Part of all images held out for testing, likewise.
        crop_padding: Training images are shifted by up to this many pixels; 0 for none.
        seed: Of the splits, the order and the shifts.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        crop_padding: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size,
            Normalization(mean=(0.305,), std=(0.376,)),
            augmentation=Augmentation(crop_padding, horizontal_flip=False),
            seed=seed,
        )
        if val_fraction <= 0 or test_fraction <= 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                f"val_fraction came as {val_fraction} and test_fraction as {test_fraction}; give "
                "fractions above 0 that leave some images for training."
            )
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def read(self) -> dict[Split, Arrays]:
        """Split the embedded digits."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.class_names = tuple(str(name) for name in digits.target_names)
        images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))[:, None]
        labels = torch.from_numpy(digits.target).long()
        rest, test = hold_out(labels, self.test_fraction, self.seed)
        # A fraction of what is left that is `val_fraction` of all.
        fraction = self.val_fraction / (1 - self.test_fraction)
        train, val = hold_out(labels[rest], fraction, self.seed)
        parts: dict[Split, Tensor] = {"train": rest[train], "val": rest[val], "test": test}
        return {split: (images[part], labels[part]) for split, part in parts.items()}


class CIFARDataModule(ImageDataModule):
    """CIFAR-10 or CIFAR-100 as torchvision reads it: 50,000 images to train on, 10,000 to test.

    Args:
        num_classes: 10 or 100: which of the two.
        root: Folder that holds torchvision's ``cifar-10-batches-py`` or ``cifar-100-python``.
        download: Fetch it there if it is missing.
        batch_size: Images in a batch, at least 1.
        val_fraction: Part of each class held out of the training images for validation, in (0, 1).
        augmentation: Of training images; None for none.
        drop_last: Leave out the last training batch of an epoch when it is not full.
        seed: Of the held-out split, the order and the augmentation.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        num_classes: Literal[10, 100] = 10,
        root: str = "data",
        download: bool = False,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        augmentation: Augmentation | None = CROP_AND_FLIP,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size,
            Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
            augmentation=augmentation,
            drop_last=drop_last,
            seed=seed,
        )
        if num_classes not in (10, 100):
            raise ValueError(f"num_classes came as {num_classes}; CIFAR has 10 or 100.")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction came as {val_fraction}; give a fraction in (0, 1).")
        self.variant = num_classes
        self.root = root
        self.download = download
        self.val_fraction = val_fraction

    def prepare_data(self) -> None:
        """Fetch the archive, in one process a machine, if ``download`` says so."""
        if self.download:
            self._dataset(train=True)

    def read(self) -> dict[Split, Arrays]:
        """Read both parts and hold out the validation split.

        Raises:
            FileNotFoundError: If the archive is not there, or is damaged.
        """
        parts = {}
        for training in (True, False):
            try:
                dataset = self._dataset(training, download=False)
            except RuntimeError as error:
                raise FileNotFoundError(
                    f"CIFAR-{self.variant} is not in {self.root!r}, or is damaged there ({error}). "
                    "Set download=True, or root to the folder that holds it."
                ) from error
            images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
            parts[training] = (images, torch.tensor(dataset.targets))
        self.class_names = tuple(dataset.classes)
        images, labels = parts[True]
        train, val = hold_out(labels, self.val_fraction, self.seed)
        return {
            "train": (images[train], labels[train]),
            "val": (images[val], labels[val]),
            "test": parts[False],
        }

    def _dataset(self, train: bool, download: bool = True) -> Any:
        from torchvision import datasets

        kind = datasets.CIFAR10 if self.variant == 10 else datasets.CIFAR100
        return kind(self.root, train=train, download=download)
