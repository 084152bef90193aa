"""Find prepared data and trained weights, and read them."""

import lzma
import os
import tarfile
import tempfile
from pathlib import Path

from torch import nn

from lit_compress.compress import weight_files

ASSETS_VARIABLE = "LIT_COMPRESS_ASSETS"
CACHE_VARIABLE = "LIT_COMPRESS_CACHE"


class AssetsNotFoundError(FileNotFoundError):
    """The assets folder, or a file in it, is not there."""


def assets_dir(path: str | Path | None = None) -> Path:
    """Return the folder that holds ``data/`` and ``weights/``.

    Args:
        path: The folder; None takes the environment variable ``LIT_COMPRESS_ASSETS``.

    Returns:
        The folder, which exists.

    Raises:
        AssetsNotFoundError: If neither names a folder that exists.
    """
    named = path if path is not None else os.environ.get(ASSETS_VARIABLE)
    if not named:
        raise AssetsNotFoundError(
            f"No assets folder was named. Set the environment variable {ASSETS_VARIABLE} to a "
            "folder that holds data/ and weights/."
        )
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise AssetsNotFoundError(
            f"The assets folder came as {str(named)!r}, which is no folder. Set {ASSETS_VARIABLE} "
            "to a folder that holds data/ and weights/."
        )
    return folder


def cache_dir() -> Path:
    """Return the folder for unpacked and decoded data, made if it is not there.

    It is ``LIT_COMPRESS_CACHE``, else ``lit-compress`` in ``XDG_CACHE_HOME``, else
    ``~/.cache/lit-compress``.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        folder = Path(named).expanduser()
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(base) if base else Path.home() / ".cache") / "lit-compress"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cifar10_jpeg_dir(assets: str | Path | None = None) -> Path:
    """Return CIFAR-10 as JPEG files in ``train/<class>/`` and ``test/<class>/``.

    Reads ``data/cifar10-jpeg/`` of the assets folder if it is there, else unpacks
    ``data/cifar10-jpeg.tar.xz`` into the cache, once for each content of the archive.

    Args:
        assets: The assets folder; None takes ``LIT_COMPRESS_ASSETS``.

    Raises:
        AssetsNotFoundError: If there is neither the folder nor the archive.
        ValueError: If the archive is truncated or is no archive; nothing is left in the cache.
    """
    data = assets_dir(assets) / "data"
    if (data / "cifar10-jpeg").is_dir():
        return data / "cifar10-jpeg"
    archive = data / "cifar10-jpeg.tar.xz"
    if not archive.is_file():
        raise AssetsNotFoundError(
            f"{archive} is not there, nor the folder {data / 'cifar10-jpeg'}. Put CIFAR-10 there "
            "as train/<class>/*.jpg and test/<class>/*.jpg."
        )
    stat = archive.stat()
    # Size and time stand for the content: a new archive is unpacked again.
    return unpack_once(archive, cache_dir() / f"cifar10-jpeg-{stat.st_size}-{stat.st_mtime_ns}")


def unpack_once(archive: Path, target: Path) -> Path:
    """Unpack ``archive`` to ``target`` unless ``target`` is there already.

    The files appear under ``target`` all at once, by one rename, so that a run that is stopped
    leaves no half a data set and two processes may do this at the same time.

    Args:
        archive: A tar file, compressed or not.
        target: The folder to make; its parent exists.

    Returns:
        ``target``.

    Raises:
        ValueError: If the archive is truncated, foreign, or holds paths that lead out of it.
    """
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        unpacked = Path(scratch) / "unpacked"
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{archive} cannot be unpacked ({reason}): it is truncated or no tar "
                "archive. Fetch it again."
            ) from error
        put_in_place(unpacked, target)
    return target


def put_in_place(finished: Path, target: Path) -> None:
    """Rename ``finished`` to ``target``; keep ``target`` where another process was faster.

    Args:
        finished: A file or a folder, whole, on the file system of ``target``.
        target: Its final name.

    Raises:
        OSError: If the rename fails and no other process put ``target`` there.
    """
    try:
        finished.rename(target)
    except OSError:  # a folder that is not empty cannot be renamed over
        if not target.exists():
            raise


def weights_path(name: str, assets: str | Path | None = None) -> Path:
    """Return the file of trained weights with this name.

    Args:
        name: A path to a file, or the name of a file in ``weights/`` of the assets folder, with or
            without ``.pt``, such as ``"resnet20-cifar10-jpeg"``.
        assets: The assets folder; None takes ``LIT_COMPRESS_ASSETS``.

    Raises:
        AssetsNotFoundError: If there is no such file; the files that are there are named.
    """
    direct = Path(name).expanduser()
    if direct.is_file():
        return direct
    folder = assets_dir(assets) / "weights"
    for candidate in (folder / name, folder / f"{name}.pt"):
        if candidate.is_file():
            return candidate
    known = sorted(file.stem for file in folder.glob("*.pt")) if folder.is_dir() else []
    raise AssetsNotFoundError(
        f"weights came as {name!r}, which is neither a file nor in {folder}, "
        f"which holds {', '.join(known) or 'no .pt file'}."
    )


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights in ``path`` into ``model``, every one of them.

    Reads a plain state dict, a dict with a ``state_dict`` entry, or a Lightning checkpoint, whose
    prefix is stripped.

    Args:
        model: The network. It is changed only if all weights fit.
        path: The file.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If the file is truncated or foreign, or if a weight is missing, unknown or of
            another shape; the first such name is given.
    """
    fix = "Give the weights of this very architecture."
    weight_files.load_weights(model, weight_files.read_weights(path), path, fix)
