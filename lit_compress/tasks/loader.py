"""Batches from images in memory, augmented a batch at a time and resumable at any batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Augmentation:
    """What is drawn again for every image of a training batch.

    Args:
        crop_padding: The image is padded with this many black pixels on each side and cut back at
            a random place; 0 leaves it alone. Source: He et al. 2016, section 4.2 (4 pixels).
        horizontal_flip: Mirror every second image, by chance.
    """

    crop_padding: int = 4
    horizontal_flip: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding came as {self.crop_padding}; give 0 or more pixels.")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return an augmented copy of images ``(batch, channels, height, width)``, any type."""
        if self.crop_padding > 0:
            images = random_crop(images, self.crop_padding, generator)
        if self.horizontal_flip:
            images = random_flip(images, generator)
        return images


@dataclass(frozen=True)
class Normalization:
    """Scales bytes to [0, 1], then each channel to ``(value - mean) / std``.

    Args:
        mean: One value a channel.
        std: One value a channel, above 0.

    Raises:
        ValueError: If they are of unequal length, or a ``std`` is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the values."""
        if len(self.mean) != len(self.std) or not self.std:
            raise ValueError(
                f"mean came with {len(self.mean)} values and std with {len(self.std)}; give each "
                "one value a channel."
            )
        if min(self.std) <= 0:
            raise ValueError(f"std came as {self.std}; give values above 0.")

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 ``(batch, channels, height, width)`` to float32 of the same shape."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        scale, shift = 1 / (255 * std), -mean / std
        return images.float().mul_(scale[:, None, None]).add_(shift[:, None, None])


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad with zeros and cut each image back to its size at a place of its own.

    Args:
        images: ``(batch, channels, height, width)``, any type.
        padding: Pixels added on each side, at least 1.
        generator: Gives the places, uniform over all ``(2 padding + 1) ** 2``.

    Returns:
        Images of the same shape and type.
    """
    batch, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    # A view of every possible cut: (batch, channels, row, column, height, width).
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    rows, columns = torch.randint(0, 2 * padding + 1, (2, batch), generator=generator)
    return windows[torch.arange(batch), :, rows, columns]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: ``(batch, channels, height, width)``, any type.
        generator: Gives the choices.

    Returns:
        Images of the same shape and type.
    """
    chosen = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


class ArrayLoader:
    """Gives batches of normalised images from memory, always the same for the same place in a run.

    Order depends on ``(seed, epoch)`` and augmentation on ``(seed, epoch, batch, rank)`` alone, so
    that a loader set to a place by :meth:`load_state_dict` gives what an uninterrupted one would.
    An epoch begins with every ``iter()`` and is one more than the last one begun, unless
    :meth:`set_epoch` says otherwise.

    Across processes each rank gets every ``world_size``-th image of the epoch's order. Where the
    number of images does not divide, the first ones of the order are given again, so that all
    ranks have equally many (without ``drop_last``), or the last ones are left out (with it).

    Args:
        images: ``(num_images, channels, height, width)``, uint8.
        labels: ``(num_images,)``, int64.
        batch_size: Images in a batch of one process, at least 1.
        normalization: How bytes become floats.
        shuffle: Draw a new order each epoch.
        drop_last: Leave out the last batch of an epoch when it is not full.
        augmentation: What is drawn for each batch; None gives the images as they are.
        seed: Of order and augmentation, at least 0.
        rank: This process, from 0.
        world_size: Number of processes.

    Raises:
        ValueError: If a shape, a type or a value is not as said.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        normalization: Normalization,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_arrays(images, labels, normalization)
        if batch_size < 1:
            raise ValueError(f"batch_size came as {batch_size}; give at least 1.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank came as {rank} of {world_size}; ranks count from 0.")
        if seed < 0:
            raise ValueError(f"seed came as {seed}; give 0 or more.")
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.normalization = normalization
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.augmentation = augmentation
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._given = (0, 0)  # epoch, and batches of it given so far
        self._next = (0, 0)  # epoch that the next iteration begins, and its first batch

    def __len__(self) -> int:
        """Return the batches of one epoch, the same on all ranks."""
        if self.drop_last:
            return len(self.images) // self.world_size // self.batch_size
        return math.ceil(math.ceil(len(self.images) / self.world_size) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Give batches: images ``(batch, channels, h, w)`` float32, labels ``(batch,)`` int64."""
        # As a generator this runs at the first batch, after Lightning, which calls iter() early,
        # has loaded the state and announced the epoch.
        epoch, first = self._next
        self._next = (epoch + 1, 0)
        order = self._order(epoch)
        for index in range(first, len(self)):
            self._given = (epoch, index + 1)
            yield self._batch(order, epoch, index)

    # Lightning announces each epoch by `loader.sampler.set_epoch(...)`; where it finds a sampler,
    # it asks for a batch sampler too.
    batch_sampler = None

    @property
    def sampler(self) -> "ArrayLoader":
        """The loader itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be of ``epoch``.

        A place inside this very epoch, set by :meth:`load_state_dict`, is kept.

        Args:
            epoch: Number of the epoch, from 0.
        """
        if self._next[0] != epoch:
            self._next = (epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the run and what it depends on, as plain numbers."""
        epoch, batches = self._given
        return {"epoch": epoch, "batches": batches, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration go on where ``state_dict`` was taken.

        Args:
            state_dict: From :meth:`state_dict` of a loader of any rank.

        Raises:
            ValueError: If the state lies inside an epoch and was taken with other data, batch
                size, seed or number of processes, for which its place means nothing.
        """
        identity = self._identity()
        missing = {"epoch", "batches", *identity} - state_dict.keys()
        if missing:
            raise ValueError(
                f"The loader's state came without {', '.join(sorted(missing))}; give the state "
                "that an ArrayLoader saved."
            )
        epoch, batches = state_dict["epoch"], state_dict["batches"]
        if 0 < batches < state_dict["num_batches"]:
            for name, value in identity.items():
                if state_dict[name] != value:
                    raise ValueError(
                        f"The checkpoint was taken inside epoch {epoch} with {name}="
                        f"{state_dict[name]}, and this loader has {name}={value}, so it cannot go "
                        "on from there. Use the same value, or a checkpoint from an epoch's end."
                    )
            self._next = (epoch, batches)
        else:
            self._next = (epoch + 1, 0) if batches else (epoch, 0)
        self._given = (epoch, batches)

    def _identity(self) -> dict[str, Any]:
        return {
            "num_images": len(self.images),
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "num_batches": len(self),
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def _order(self, epoch: int) -> Tensor:
        """Indices of this rank's images in the epoch's order, ``(images a rank,)``."""
        count = len(self.images)
        if self.shuffle:
            order = torch.randperm(count, generator=_generator(self.seed, epoch))
        else:
            order = torch.arange(count)
        if not self.drop_last:
            padded = math.ceil(count / self.world_size) * self.world_size
            order = order[torch.arange(padded) % count]
        return order[self.rank :: self.world_size]

    def _batch(self, order: Tensor, epoch: int, index: int) -> Batch:
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        images = self.images[chosen]
        if self.augmentation is not None:
            generator = _generator(self.seed, epoch, index, self.rank)
            images = self.augmentation(images, generator)
        return self.normalization(images), self.labels[chosen]


def _generator(*place: int) -> torch.Generator:
    """A generator for this place in the run, independent of those for all other places."""
    mixed = np.random.SeedSequence(place).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


def _check_arrays(images: Tensor, labels: Tensor, normalization: Normalization) -> None:
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise ValueError(
            f"images came as {images.dtype} of shape {tuple(images.shape)}; give uint8 of shape "
            "(num_images, channels, height, width), with at least one image."
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels came as {labels.dtype} of shape {tuple(labels.shape)}; give int64 of shape "
            f"({len(images)},), one for each image."
        )
    channels, expected = images.shape[1], len(normalization.mean)
    if channels != expected:
        raise ValueError(
            f"images came with {channels} channels and the normalization is for {expected}; "
            "give one mean and one std a channel."
        )
