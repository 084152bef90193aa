"""Folders of image files, decoded into one array that is kept on disk."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lit_compress.tasks.assets import cache_dir, put_in_place

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_FILES_A_THREAD_TASK = 256
_CACHE_FORMAT = "1"  # changes whenever the same file would be decoded to other bytes


@dataclass(frozen=True)
class ImageFiles:
    """Image files and their labels, ordered by class and name.

    Attributes:
        paths: One file an image.
        labels: ``(num_images,)``, int64: index into ``class_names``.
        class_names: Names of the class folders, in alphabetical order.
    """

    paths: tuple[str, ...]
    labels: Tensor
    class_names: tuple[str, ...]

    def select(self, indices: Tensor) -> "ImageFiles":
        """Return the files at ``indices`` ``(n,)``, in that order."""
        paths = tuple(self.paths[index] for index in indices.tolist())
        return ImageFiles(paths, self.labels[indices], self.class_names)


def find_images(folder: Path) -> ImageFiles:
    """Find the images in ``folder/<class>/``, at any depth below the class folder.

    Args:
        folder: Holds one folder a class; files that are no images are passed over.

    Raises:
        FileNotFoundError: If the folder is not there.
        ValueError: If there is no class folder, or one holds no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give one that holds <class>/<image>.")
    class_names = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
    if not class_names:
        raise ValueError(f"{folder} holds no folder; put the images in one folder a class.")
    paths: list[str] = []
    labels: list[int] = []
    folder = folder.absolute()
    for label, name in enumerate(class_names):
        found = sorted(
            os.path.join(where, file)
            for where, _, files in os.walk(folder / name)
            for file in files
            if file.lower().endswith(_SUFFIXES)
        )
        if not found:
            raise ValueError(
                f"{folder / name} holds no image; images end in {', '.join(_SUFFIXES)}. "
                "Fill the folder or remove it."
            )
        paths += found
        labels += [label] * len(found)
    return ImageFiles(tuple(paths), torch.tensor(labels), class_names)


def decode_image(path: str, image_size: int) -> np.ndarray:
    """Decode one image to a square: the shorter side scaled, the middle of the longer one kept.

    Args:
        path: The file.
        image_size: Height and width given, in pixels.

    Returns:
        ``(3, image_size, image_size)``, uint8; not contiguous.

    Raises:
        ValueError: If the file is no image, or is truncated.
    """
    size = (image_size, image_size)
    try:
        with Image.open(path) as file:
            if file.size != size:
                file.draft("RGB", size)  # decodes a large JPEG at a half, quarter or eighth
            file.load()
            image = file if file.mode == "RGB" else file.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} cannot be decoded ({error}): it is truncated or no image. "
            "Fetch it again or remove it."
        ) from error
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    return np.array(image).transpose(2, 0, 1)


def decode_images(paths: Sequence[str], image_size: int) -> np.ndarray:
    """Decode many images with one thread a core.

    Args:
        paths: The files.
        image_size: Height and width of all, in pixels.

    Returns:
        ``(len(paths), 3, image_size, image_size)``, uint8.

    Raises:
        ValueError: If a file is no image, or is truncated.
    """
    images = np.empty((len(paths), 3, image_size, image_size), np.uint8)

    def decode_from(start: int) -> None:
        for index in range(start, min(start + _FILES_A_THREAD_TASK, len(paths))):
            images[index] = decode_image(paths[index], image_size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode_from, range(0, len(paths), _FILES_A_THREAD_TASK)):
            pass
    return images


def decoded_once(files: ImageFiles, image_size: int) -> Tensor:
    """Return the decoded images, from the cache if these very files were decoded before.

    A file counts as the same while its path, size and time of change are.

    Args:
        files: The images.
        image_size: Height and width of all, in pixels.

    Returns:
        ``(num_images, 3, image_size, image_size)``, uint8.

    Raises:
        ValueError: If a file is no image, or is truncated; nothing is left in the cache.
    """
    cached = cache_dir() / f"images-{image_size}-{_fingerprint(files.paths)}.npy"
    images = _read_cached(cached)
    if images is None:
        images = decode_images(files.paths, image_size)
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".images-") as scratch:
            finished = Path(scratch) / cached.name
            np.save(finished, images)
            put_in_place(finished, cached)
    return torch.from_numpy(images)


def _read_cached(cached: Path) -> np.ndarray | None:
    """The array in the cache, or None where there is none that can be read."""
    if not cached.is_file():
        return None
    try:
        return np.load(cached)  # type: ignore[no-any-return]
    except (ValueError, EOFError):  # damaged: decode again
        return None


def _fingerprint(paths: Sequence[str]) -> str:
    digest = hashlib.sha256(_CACHE_FORMAT.encode())
    for path in paths:
        stat = os.stat(path)
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]
