"""Finding, unpacking and reading prepared files."""

import io
import tarfile
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lit_compress.tasks import assets as rooms
from lit_compress.tasks.assets import (
    ASSETS_VARIABLE,
    AssetsNotFoundError,
    assets_dir,
    cache_dir,
    cifar10_jpeg_dir,
    load_weights,
    unpack_once,
    weights_path,
)
from lit_compress.tasks.folder_data import IMAGENET_MEAN, IMAGENET_STD
from lit_compress.tasks.image_files import decode_images, find_images
from lit_compress.tasks.loader import Normalization
from lit_compress.tasks.models import build_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An assets folder with nothing in it, named by the environment."""
    folder = tmp_path / "assets"
    (folder / "data").mkdir(parents=True)
    (folder / "weights").mkdir()
    monkeypatch.setenv(ASSETS_VARIABLE, str(folder))
    return folder


def _archive(path, names=("train/cat/0.jpg", "test/cat/0.jpg")):
    with tarfile.open(path, "w:xz") as tar:
        for name in names:
            content = name.encode() * 100
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_assets_dir_takes_the_argument_before_the_environment(folder, tmp_path):
    assert assets_dir() == folder
    assert assets_dir(tmp_path) == tmp_path


def test_assets_dir_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv(ASSETS_VARIABLE, raising=False)
    with pytest.raises(AssetsNotFoundError, match="Set the environment variable LIT_COMPRESS_ASSE"):
        assets_dir()
    with pytest.raises(FileNotFoundError, match="'.*gone', which is no folder"):
        assets_dir(tmp_path / "gone")


def test_cache_dir_follows_the_variables(monkeypatch, tmp_path):
    monkeypatch.delenv(rooms.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "lit-compress"
    monkeypatch.setenv(rooms.CACHE_VARIABLE, str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    assert cache_dir().is_dir()


def test_archive_is_unpacked_once(folder, cache, monkeypatch):
    _archive(folder / "data" / "cifar10-jpeg.tar.xz")
    unpacked = cifar10_jpeg_dir()
    assert (unpacked / "train" / "cat" / "0.jpg").read_bytes().startswith(b"train/cat")
    monkeypatch.setattr(tarfile, "open", None)  # would fail if it were read again
    assert cifar10_jpeg_dir() == unpacked
    assert [entry.name for entry in cache.iterdir()] == [unpacked.name]


def test_unpacked_folder_in_the_assets_is_taken_as_it_is(folder, cache):
    (folder / "data" / "cifar10-jpeg").mkdir()
    assert cifar10_jpeg_dir() == folder / "data" / "cifar10-jpeg"
    assert not list(cache.iterdir())


def test_missing_archive_says_where_it_belongs(folder, cache):
    with pytest.raises(AssetsNotFoundError, match=r"cifar10-jpeg.tar.xz is not there.*train/<cla"):
        cifar10_jpeg_dir()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_damaged_archive_is_refused_and_leaves_nothing(folder, cache, damage):
    archive = _archive(folder / "data" / "cifar10-jpeg.tar.xz", [f"{i}.jpg" for i in range(500)])
    content = archive.read_bytes()
    archive.write_bytes(
        {"truncated": content[: len(content) // 2], "foreign": b"no tar", "empty": b""}[damage]
    )
    with pytest.raises(ValueError, match=r"cannot be unpacked .*truncated or no tar archive"):
        cifar10_jpeg_dir()
    assert not list(cache.iterdir())


def test_paths_that_lead_out_of_the_archive_are_refused(tmp_path):
    archive = _archive(tmp_path / "evil.tar.xz", ["../evil.txt"])
    (tmp_path / "cache").mkdir()
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unpack_once(archive, tmp_path / "cache" / "target")
    assert not list(tmp_path.rglob("evil.txt"))


def test_two_that_unpack_at_once_both_get_the_folder(tmp_path):
    archive = _archive(tmp_path / "data.tar.xz", [f"{i}.jpg" for i in range(200)])
    (tmp_path / "cache").mkdir()
    target = tmp_path / "cache" / "target"
    barrier, got = threading.Barrier(4), []

    def unpack():
        barrier.wait()
        got.append(unpack_once(archive, target))

    threads = [threading.Thread(target=unpack) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [target] * 4
    assert len(list(target.iterdir())) == 200
    assert list((tmp_path / "cache").iterdir()) == [target]


def test_weights_are_found_by_path_and_by_name(folder, tmp_path):
    named = folder / "weights" / "net.pt"
    named.touch()
    assert weights_path("net") == weights_path("net.pt") == named
    other = tmp_path / "other.bin"
    other.touch()
    assert weights_path(str(other)) == other


def test_unknown_weights_are_answered_with_those_that_are_there(folder):
    (folder / "weights" / "net-a.pt").touch()
    with pytest.raises(AssetsNotFoundError, match=r"'net-b', .* which holds net-a\."):
        weights_path("net-b")


def _net(width=3):
    return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "top1": 88.5},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {
            "pytorch-lightning_version": "2.6.6",
            "state_dict": {
                "loss.weight": torch.ones(2),
                **{f"model.{key}": value for key, value in state.items()},
            },
        },
    ],
    ids=["plain", "with accuracy", "prefixed", "checkpoint with a loss"],
)
def test_weights_of_every_form_are_loaded(tmp_path, wrap):
    source, target = _net(), _net()
    torch.save(wrap(source.state_dict()), tmp_path / "net.pt")
    load_weights(target, tmp_path / "net.pt")
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: state.pop("1.bias"), "'1.bias' is missing"),
        (lambda state: state.update(extra=torch.ones(1)), "'extra' is unknown"),
        (
            lambda state: state.update({"0.bias": torch.ones(4)}),
            r"'0.bias' has shape \(4,\), expected \(3,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path, change, match):
    state = dict(_net().state_dict())
    change(state)
    torch.save(state, tmp_path / "net.pt")
    target = _net()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=f"do not fit Sequential: {match}"):
        load_weights(target, tmp_path / "net.pt")
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("content", ["truncated", "text", "empty", "module", "numbers", "tensor"])
def test_damaged_and_foreign_files_are_refused_and_kept(tmp_path, content):
    file = tmp_path / "net.pt"
    if content == "truncated":
        torch.save(_net(50).state_dict(), file)
        file.write_bytes(file.read_bytes()[:-400])
    elif content in ("text", "empty"):
        file.write_text("hello" if content == "text" else "")
    else:
        saved = {"module": _net(), "numbers": {"lr": 0.1}, "tensor": torch.ones(3)}[content]
        torch.save(saved, file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="cannot be read|holds no weights|holds a Tensor"):
        load_weights(_net(), file)
    assert file.read_bytes() == before


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .*gone.pt"):
        load_weights(_net(), tmp_path / "gone.pt")


TRAINED = [
    SimpleNamespace(file="resnet20-cifar10-jpeg", model="resnet20", kwargs={}, top1=88.51),
    SimpleNamespace(file="plain20-cifar10-jpeg", model="plain20", kwargs={}, top1=84.96),
    SimpleNamespace(
        file="mobilenetv1-0.5-cifar10-jpeg", model="mobilenet_v1", kwargs={"width": 0.5}, top1=84.87
    ),
]


@pytest.fixture(scope="module")
def fifth_of_the_test_images():
    files = find_images(cifar10_jpeg_dir() / "test")
    files = files.select(torch.arange(0, len(files.paths), 5))  # the same number of each class
    images = torch.from_numpy(decode_images(files.paths, 32))
    return Normalization(IMAGENET_MEAN, IMAGENET_STD)(images), files.labels


@pytest.mark.assets
@pytest.mark.parametrize("trained", TRAINED, ids=lambda trained: trained.file)
def test_trained_weights_give_their_accuracy(real_assets, trained, request):
    model = build_model(trained.model, 10, **trained.kwargs).eval()
    load_weights(model, weights_path(trained.file))
    images, labels = request.getfixturevalue("fifth_of_the_test_images")
    with torch.inference_mode():
        predicted = torch.cat([model(batch).argmax(1) for batch in images.split(250)])
    top1 = 100 * (predicted == labels).float().mean().item()
    assert top1 == pytest.approx(trained.top1, abs=2.5)
