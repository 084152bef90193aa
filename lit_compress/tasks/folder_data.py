"""Data modules over folders of image files, ImageNet's layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_compress.tasks.assets import cifar10_jpeg_dir
from lit_compress.tasks.data import (
    CROP_AND_FLIP,
    Arrays,
    ImageDataModule,
    Split,
)
from lit_compress.tasks.image_files import ImageFiles, decode_image, decoded_once, find_images
from lit_compress.tasks.loader import ArrayLoader, Augmentation, Batch, Normalization
from lit_compress.tasks.splits import hold_out, limit_per_class

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageFolderDataModule(ImageDataModule):
    """Image files in ``train/<class>/``, and ``val/<class>/`` and ``test/<class>/`` if there.

    Without ``val``, a part of each class is held out of ``train``; without ``test``, ``val`` is
    tested on. Images are scaled and cut to squares, decoded once and kept in memory as bytes (and
    in the cache folder for the next start) where all of them fit; otherwise a torch DataLoader
    decodes them again each epoch. Labels count the class folders in alphabetical order.

    Args:
        root: The folder that holds ``train``.
        image_size: Height and width of the squares, in pixels, at least 1.
        batch_size: Images in a batch of one process, at least 1.
        val_per_class: What is held out of each class without a ``val`` folder: an int is a number
            of images, a float in (0, 1) a fraction.
        max_train_per_class: Train on this many images of each class at most; None for all.
        augmentation: Of training images; None for none.
        mean: Subtracted from each channel, for images scaled to [0, 1].
        std: Divides each channel then; above 0.
        drop_last: Leave out the last training batch of an epoch when it is not full.
        memory_limit_gb: Decoded images are kept in memory up to this size (1e9 bytes).
        num_workers: Processes of the DataLoader, used only beyond that size.
        seed: Of the held-out split, the order and the augmentation.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        batch_size: int = 128,
        val_per_class: int | float = 0.1,
        max_train_per_class: int | None = None,
        augmentation: Augmentation | None = CROP_AND_FLIP,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        drop_last: bool = False,
        memory_limit_gb: float = 4.0,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size,
            Normalization(tuple(mean), tuple(std)),
            augmentation=augmentation,
            drop_last=drop_last,
            seed=seed,
        )
        if image_size < 1:
            raise ValueError(f"image_size came as {image_size}; give at least 1 pixel.")
        if val_per_class <= 0 or (isinstance(val_per_class, float) and val_per_class >= 1):
            raise ValueError(
                f"val_per_class came as {val_per_class}; give a number of images of at least 1, "
                "or a fraction in (0, 1)."
            )
        if max_train_per_class is not None and max_train_per_class < 1:
            raise ValueError(f"max_train_per_class came as {max_train_per_class}; give at least 1.")
        if memory_limit_gb < 0:
            raise ValueError(f"memory_limit_gb came as {memory_limit_gb}; give 0 or more.")
        if num_workers < 0:
            raise ValueError(f"num_workers came as {num_workers}; give 0 or more.")
        self.root = root
        self.image_size = image_size
        self.val_per_class = val_per_class
        self.max_train_per_class = max_train_per_class
        self.memory_limit_gb = memory_limit_gb
        self.num_workers = num_workers
        self._parts: dict[Split, Part] = {}

    def find_root(self) -> Path:
        """Return the folder that holds ``train``."""
        return Path(self.root).expanduser()

    def prepare_data(self) -> None:
        """Decode the images into the cache, in one process a machine."""
        parts = self._find_parts()
        if self._fit_memory(parts):
            for source in _sources(parts):
                decoded_once(source, self.image_size)

    def setup(self, stage: str | None = None) -> None:
        """Find the images, and read them into memory where they fit, the first time."""
        if not self._parts:
            self._parts = self._find_parts()
            self.class_names = self._parts["train"].source.class_names
            if self._parts["test"] is self._parts["val"]:
                where = self.find_root()
                rank_zero_info(f"{where} has no folder 'test': testing on the validation images.")
        self._train_loader = None
        if self._fit_memory(self._parts):
            super().setup(stage)

    def read(self) -> dict[Split, Arrays]:
        """Read the decoded images, from the cache where they are there."""
        decoded = {
            id(source): decoded_once(source, self.image_size) for source in _sources(self._parts)
        }
        return {
            split: (decoded[id(part.source)][part.indices], part.labels)
            for split, part in self._parts.items()
        }

    def loader(self, split: Split) -> ArrayLoader | DataLoader[Batch]:
        """Return a loader of one split: from memory, or a DataLoader where that is too small."""
        if self.splits:
            return super().loader(split)
        training = split == "train"
        return DataLoader(
            DecodedOnDemand(self._parts[split], self.image_size),
            self.batch_size,
            shuffle=training,
            drop_last=training and self.drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=Collate(self.augmentation if training else None, self.normalization),
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _find_parts(self) -> "dict[Split, Part]":
        root = self.find_root()
        files = find_images(root / "train")
        train = Part.whole(files)
        if (root / "val").is_dir():
            val = _find_like(files, root / "val")
        else:
            stay, held = hold_out(files.labels, self.val_per_class, self.seed)
            train, val = Part(files, stay), Part(files, held)
        if self.max_train_per_class is not None:
            kept = limit_per_class(train.labels, self.max_train_per_class, self.seed)
            # Decode only these; without a limit, the whole folder serves every seed's split.
            train, val = Part(files, train.indices[kept]).alone(), val.alone()
        if (root / "test").is_dir():
            return {"train": train, "val": val, "test": _find_like(files, root / "test")}
        return {"train": train, "val": val, "test": val}

    def _fit_memory(self, parts: "dict[Split, Part]") -> bool:
        num_images = sum(len(source.paths) for source in _sources(parts))
        return num_images * 3 * self.image_size**2 <= self.memory_limit_gb * 1e9


class CIFAR10JPEGDataModule(ImageFolderDataModule):
    """CIFAR-10 as JPEG files, from the assets folder.

    50,000 images in ``train/<class>/``, of which 500 a class are held out for validation by
    default, and 10,000 in ``test/<class>/``; 32 x 32, labels in alphabetical order of the classes.

    Args:
        batch_size: Images in a batch of one process, at least 1.
        val_per_class: Images of each class held out for validation (a float is a fraction).
        max_train_per_class: Train on this many images of each class at most; None for all.
        augmentation: Of training images; None for none.
        drop_last: Leave out the last training batch of an epoch when it is not full.
        assets: The assets folder; None takes the environment variable ``LIT_COMPRESS_ASSETS``.
        seed: Of the held-out split, the order and the augmentation.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        batch_size: int = 128,
        val_per_class: int | float = 500,
        max_train_per_class: int | None = None,
        augmentation: Augmentation | None = CROP_AND_FLIP,
        drop_last: bool = False,
        assets: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root="",
            image_size=32,
            batch_size=batch_size,
            val_per_class=val_per_class,
            max_train_per_class=max_train_per_class,
            augmentation=augmentation,
            drop_last=drop_last,
            seed=seed,
        )
        self.assets = assets

    def find_root(self) -> Path:
        """Return the folder of the images, unpacked into the cache the first time.

        Raises:
            AssetsNotFoundError: If the assets folder does not hold them.
        """
        return cifar10_jpeg_dir(self.assets)


@dataclass(frozen=True)
class Part:
    """Some of the images of a list.

    Attributes:
        source: The list.
        indices: ``(n,)``, int64: which of them.
    """

    source: ImageFiles
    indices: Tensor

    @classmethod
    def whole(cls, source: ImageFiles) -> "Part":
        """All images of the list."""
        return cls(source, torch.arange(len(source.paths)))

    @property
    def labels(self) -> Tensor:
        """Labels of these images, ``(n,)``."""
        return self.source.labels[self.indices]

    def alone(self) -> "Part":
        """The same images as all of a list of their own."""
        return Part.whole(self.source.select(self.indices))


class DecodedOnDemand(Dataset[tuple[Tensor, Tensor]]):
    """Decodes an image each time it is asked for.

    Args:
        part: The images.
        image_size: Height and width given, in pixels.
    """

    def __init__(self, part: Part, image_size: int) -> None:
        self.part = part
        self.image_size = image_size

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.part.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image ``(3, image_size, image_size)`` uint8 and its label ``()`` int64."""
        place = int(self.part.indices[index])
        source = self.part.source
        image = torch.from_numpy(decode_image(source.paths[place], self.image_size))
        return image, source.labels[place]


@dataclass(frozen=True)
class Collate:
    """Stacks decoded images, augments and normalizes them as a batch.

    Args:
        augmentation: What is drawn for each batch; None for none.
        normalization: How bytes become floats.
    """

    augmentation: Augmentation | None
    normalization: Normalization

    def __call__(self, samples: list[tuple[Tensor, Tensor]]) -> Batch:
        """Return images ``(batch, 3, h, w)`` float32 and labels ``(batch,)`` int64."""
        images = torch.stack([image for image, _ in samples])
        if self.augmentation is not None:
            images = self.augmentation(images, torch.default_generator)
        return self.normalization(images), torch.stack([label for _, label in samples])


def _sources(parts: dict[Split, Part]) -> list[ImageFiles]:
    """Each list of images once."""
    return list({id(part.source): part.source for part in parts.values()}.values())


def _find_like(train: ImageFiles, folder: Path) -> Part:
    """The images in a folder that must hold the classes of the training folder."""
    files = find_images(folder)
    if files.class_names != train.class_names:
        odd = sorted(set(files.class_names) ^ set(train.class_names))
        raise ValueError(
            f"{folder} does not hold the same {len(train.class_names)} classes as the training "
            f"folder: {odd[0]!r} is in one of them only. Give both the same class folders."
        )
    return Part.whole(files)
