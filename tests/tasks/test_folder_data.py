"""Data modules over folders of image files."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lit_compress.tasks import ArrayLoader, Augmentation, CIFAR10JPEGDataModule, image_files
from lit_compress.tasks import ImageFolderDataModule as ImageFolder
from lit_compress.tasks.image_files import decode_image, decoded_once, find_images


@pytest.fixture
def root(tmp_path, make_images, cache):
    """A folder with train only: 10 cats, 6 dogs."""
    make_images(tmp_path / "root" / "train", {"cat": 10, "dog": 6})
    return tmp_path / "root"


def _set_up(root, **kwargs):
    data = ImageFolder(str(root), **{"image_size": 8, "batch_size": 4, **kwargs})
    data.prepare_data()
    data.setup()
    return data


def _rows(images):
    return sorted(map(tuple, images.flatten(1).tolist()))


def test_without_val_and_test_a_part_of_train_serves_and_a_message_says_so(root, caplog):
    with caplog.at_level("INFO"):
        data = _set_up(root, val_per_class=2)
    assert caplog.text.count("no folder 'test': testing on the validation images") == 1
    assert torch.bincount(data.splits["train"][1]).tolist() == [8, 4]
    assert torch.bincount(data.splits["val"][1]).tolist() == [2, 2]
    assert torch.equal(data.splits["test"][0], data.splits["val"][0])
    everything = decoded_once(find_images(root / "train"), 8)
    both = torch.cat([data.splits["train"][0], data.splits["val"][0]])
    assert _rows(both) == _rows(everything)
    assert data.class_names == ("cat", "dog")


def test_own_val_and_test_folders_are_used(root, make_images, cache):
    make_images(root / "val", {"cat": 3, "dog": 2})
    make_images(root / "test", {"cat": 1, "dog": 5})
    data = _set_up(root)
    counts = {name: torch.bincount(labels).tolist() for name, (_, labels) in data.splits.items()}
    assert counts == {"train": [10, 6], "val": [3, 2], "test": [1, 5]}


def test_split_depends_on_the_seed_alone(root):
    held = [_set_up(root, val_per_class=2, seed=seed).splits["val"][0] for seed in (0, 0, 1)]
    assert torch.equal(held[0], held[1])
    assert not torch.equal(held[0], held[2])


def test_limit_leaves_the_validation_images_alone_and_decodes_only_what_is_used(root, cache):
    whole = _set_up(root, val_per_class=2)
    limited = _set_up(root, val_per_class=2, max_train_per_class=3)
    assert torch.bincount(limited.splits["train"][1]).tolist() == [3, 3]
    assert torch.equal(limited.splits["val"][0], whole.splits["val"][0])
    assert set(_rows(limited.splits["train"][0])) <= set(_rows(whole.splits["train"][0]))
    sizes = sorted(len(np.load(file)) for file in cache.glob("*.npy"))
    assert sizes == [4, 6, 16]


def test_second_start_decodes_nothing(root, monkeypatch):
    first = _set_up(root)
    monkeypatch.setattr(image_files, "decode_image", None)  # would fail if it were called
    second = _set_up(root)
    assert torch.equal(first.splits["train"][0], second.splits["train"][0])


def test_changed_file_is_decoded_again(root, cache):
    before = _set_up(root).splits
    Image.new("RGB", (9, 9), (1, 2, 3)).save(root / "train" / "cat" / "000.png")
    after = _set_up(root).splits
    black = torch.tensor([1, 2, 3], dtype=torch.uint8)
    found = [(images[:, :, 0, 0] == black).all(1).any() for images, _ in after.values()]
    assert any(found)
    assert not any((images[:, :, 0, 0] == black).all(1).any() for images, _ in before.values())


def test_damaged_cache_is_written_anew(root, cache):
    first = _set_up(root).splits["train"][0]
    for file in cache.glob("*.npy"):
        file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(_set_up(root).splits["train"][0], first)
    assert all(np.load(file).shape[1:] == (3, 8, 8) for file in cache.glob("*.npy"))


def test_beyond_the_memory_limit_a_dataloader_gives_the_same_images(root, cache):
    memory = _set_up(root, augmentation=None)
    streamed = _set_up(root, augmentation=None, memory_limit_gb=0)
    assert not streamed.splits
    assert isinstance(memory.train_dataloader(), ArrayLoader)
    assert isinstance(streamed.train_dataloader(), DataLoader)
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        pairs = []
        for data in (memory, streamed):
            images, labels = map(torch.cat, zip(*getattr(data, name)(), strict=True))
            rows = map(tuple, images.flatten(1).tolist())
            pairs.append(sorted(zip(rows, labels.tolist(), strict=True)))
        assert pairs[0] == pairs[1]
    assert streamed.state_dict() == {}


def test_dataloader_augments_and_drops_the_last_batch(root):
    data = _set_up(root, memory_limit_gb=0, augmentation=Augmentation(2), drop_last=True)
    batches = list(data.train_dataloader())
    assert [len(labels) for _, labels in batches] == [4, 4, 4]
    evaluated = torch.cat([images for images, _ in data.val_dataloader()])
    assert torch.equal(evaluated, torch.cat([images for images, _ in data.val_dataloader()]))


@pytest.mark.parametrize("size", [(20, 10), (10, 20), (7, 3)])
def test_images_of_any_size_become_squares_of_their_middle(tmp_path, size):
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[size[1] // 2, size[0] // 2] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    image = decode_image(str(tmp_path / "image.png"), 5)
    assert image.shape == (3, 5, 5)
    assert image[:, 2, 2].min() == image.max() > 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    file = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    grey = Image.new("RGB", (4, 4), (120, 120, 120))
    (grey.quantize(4) if mode == "P" else grey.convert(mode)).save(file)
    assert np.abs(decode_image(str(file), 4).astype(int) - 120).max() <= 3


def test_large_jpeg_decoded_at_a_fraction_is_the_same_picture(tmp_path):
    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(60)), -1)
    Image.fromarray(pixels).save(tmp_path / "image.jpg", quality=95)
    small = decode_image(str(tmp_path / "image.jpg"), 16)
    expected = np.array(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BOX))
    assert np.abs(small.astype(int) - expected.transpose(2, 0, 1).astype(int)).max() <= 8


@pytest.mark.parametrize("content", ["truncated", "text"])
def test_damaged_image_is_named_and_nothing_is_cached(root, make_images, cache, content):
    make_images(root / "val", {"cat": 1, "dog": 1}, size=(64, 64), suffix=".jpg")
    file = root / "val" / "dog" / "000.jpg"
    file.write_bytes(file.read_bytes()[:700] if content == "truncated" else b"hello")
    with pytest.raises(ValueError, match=r"dog/000.jpg cannot be decoded .*Fetch it again"):
        decoded_once(find_images(root / "val"), 8)
    assert not list(cache.iterdir())


def test_files_that_are_no_images_are_passed_over(root):
    (root / "train" / "cat" / "notes.txt").write_text("x")
    (root / "train" / "README").write_text("x")
    assert len(find_images(root / "train").paths) == 16


def test_wrong_folders_are_refused(root, tmp_path, make_images):
    with pytest.raises(FileNotFoundError, match="gone/train is no folder"):
        _set_up(tmp_path / "gone")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty/train holds no folder"):
        _set_up(tmp_path / "empty")
    (tmp_path / "empty" / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match="cat holds no image"):
        _set_up(tmp_path / "empty")
    make_images(root / "val", {"cat": 1, "doge": 1})
    with pytest.raises(ValueError, match=r"val does not hold the same 2 classes.*'dog' is in one"):
        _set_up(root)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"image_size": 0}, "image_size came as 0"),
        ({"val_per_class": 0}, "val_per_class came as 0"),
        ({"val_per_class": 1.0}, "val_per_class came as 1.0"),
        ({"max_train_per_class": 0}, "max_train_per_class came as 0"),
        ({"memory_limit_gb": -1.0}, "memory_limit_gb came as -1.0"),
        ({"num_workers": -1}, "num_workers came as -1"),
        ({"mean": (0.5,)}, "mean came with 1 values and std with 3"),
    ],
)
def test_values_out_of_range_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        ImageFolder("root", **kwargs)


def test_cifar10_jpeg_reads_the_assets_folder(tmp_path, make_images, cache):
    folder = tmp_path / "assets" / "data" / "cifar10-jpeg"
    make_images(folder / "train", {"cat": 6, "dog": 6}, size=(32, 32), suffix=".jpg")
    make_images(folder / "test", {"cat": 2, "dog": 2}, size=(32, 32), suffix=".jpg")
    data = CIFAR10JPEGDataModule(batch_size=4, val_per_class=2, assets=str(tmp_path / "assets"))
    data.prepare_data()
    data.setup("fit")
    assert {name: len(labels) for name, (_, labels) in data.splits.items()} == {
        "train": 8,
        "val": 4,
        "test": 4,
    }
    images, _ = next(iter(data.test_dataloader()))
    pixels = data.splits["test"][0] / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(images, (pixels - mean[:, None, None]) / std[:, None, None])


@pytest.mark.assets
def test_real_cifar10_jpeg_has_5000_held_out(real_assets):
    data = CIFAR10JPEGDataModule()
    data.setup("fit")
    assert {name: len(labels) for name, (_, labels) in data.splits.items()} == {
        "train": 45_000,
        "val": 5_000,
        "test": 10_000,
    }
    assert torch.bincount(data.splits["val"][1]).tolist() == [500] * 10
    assert data.class_names[0] == "airplane"
