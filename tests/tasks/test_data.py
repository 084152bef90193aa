"""Data modules of images in memory."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lit_compress.tasks import CIFARDataModule, DigitsDataModule


def _trainer(rank=0, world_size=1, fn=TrainerFn.FITTING, overfit_batches=0.0):
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        state=SimpleNamespace(fn=fn),
        overfit_batches=overfit_batches,
    )


@pytest.fixture
def digits():
    data = DigitsDataModule()
    data.setup()
    return data


def test_digits_are_split_without_overlap_and_by_class(digits):
    sizes = {split: len(labels) for split, (_, labels) in digits.splits.items()}
    assert sum(sizes.values()) == 1797
    assert sizes["test"] == pytest.approx(0.2 * 1797, abs=5)
    assert sizes["val"] == pytest.approx(0.15 * 1797, abs=5)
    for _, labels in digits.splits.values():
        shares = torch.bincount(labels, minlength=10) / len(labels)
        assert bool(((shares - 0.1).abs() < 0.01).all())
    from sklearn.datasets import load_digits

    given = torch.cat([images for images, _ in digits.splits.values()]).flatten(1)
    original = torch.from_numpy(load_digits().images * (255 / 16)).round().to(torch.uint8)
    assert sorted(map(tuple, given.tolist())) == sorted(map(tuple, original.flatten(1).tolist()))


def test_digits_are_grey_normalized_8_pixel_images(digits):
    images = torch.cat([batch for batch, _ in digits.train_dataloader()])
    assert images.shape[1:] == (1, 8, 8)
    assert images.mean().abs() < 0.02
    assert (images.std() - 1).abs() < 0.02
    assert digits.num_classes == 10


def test_digits_split_depends_on_the_seed_alone(digits):
    for seed, same in ((0, True), (1, False)):
        other = DigitsDataModule(batch_size=7, seed=seed)
        other.setup()
        assert torch.equal(other.splits["test"][0], digits.splits["test"][0]) is same


def test_evaluation_loaders_keep_the_order(digits):
    for split, loader in (
        ("val", digits.val_dataloader()),
        ("test", digits.test_dataloader()),
        ("test", digits.predict_dataloader()),
    ):
        for _ in range(2):
            assert torch.equal(torch.cat([y for _, y in loader]), digits.splits[split][1])


def test_loaders_serve_the_process_of_the_trainer(digits):
    digits.trainer = _trainer(rank=1, world_size=3)
    loader = digits.train_dataloader()
    assert (loader.rank, loader.world_size) == (1, 3)
    digits.trainer = None


def test_overfitting_sees_the_same_batches_in_every_epoch(digits):
    digits.trainer = _trainer(overfit_batches=2)
    loader = digits.train_dataloader()
    first, second = (next(iter(loader))[1] for _ in range(2))
    assert torch.equal(first, second)
    digits.trainer = None


@pytest.mark.parametrize("loader_made_first", [True, False])
def test_place_is_restored_whether_or_not_the_loader_is_there(digits, loader_made_first):
    whole = [labels for _, labels in digits.train_dataloader()]
    batches = iter(digits.train_dataloader())
    for _ in range(3):
        next(batches)
    state = digits.state_dict()

    other = DigitsDataModule()
    other.setup("fit")
    if loader_made_first:
        loader = other.train_dataloader()
        other.load_state_dict(state)
    else:
        other.load_state_dict(state)
        loader = other.train_dataloader()
    rest = [labels for _, labels in loader]
    assert len(rest) == len(whole) - 3
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[3:], strict=True))
    # The place was for that fit alone.
    other.setup("fit")
    assert torch.equal(next(iter(other.train_dataloader()))[1], whole[0])


def test_testing_a_checkpoint_does_not_move_the_training_loader(digits):
    expected = next(iter(digits.train_dataloader()))[1]
    digits.trainer = _trainer(fn=TrainerFn.TESTING)
    digits.load_state_dict({"train_loader": {"epoch": 0, "batches": 2}})
    digits.trainer = None
    assert torch.equal(next(iter(digits.train_dataloader()))[1], expected)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DigitsDataModule(batch_size=0), "batch_size came as 0"),
        (lambda: DigitsDataModule(val_fraction=0), "val_fraction came as 0"),
        (lambda: DigitsDataModule(val_fraction=0.6, test_fraction=0.4), "test_fraction as 0.4"),
        (lambda: DigitsDataModule(crop_padding=-1), "crop_padding came as -1"),
        (lambda: DigitsDataModule(seed=-1), "seed came as -1"),
        (lambda: CIFARDataModule(num_classes=11), "num_classes came as 11; CIFAR has 10 or 100"),
        (lambda: CIFARDataModule(val_fraction=1.0), "val_fraction came as 1.0"),
    ],
)
def test_values_out_of_range_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def _fake_cifar(root, num_classes):
    """Write torchvision's folder with 6 training and 3 test images a class; return its labels."""
    folder = root / ("cifar-10-batches-py" if num_classes == 10 else "cifar-100-python")
    folder.mkdir(parents=True)
    key = "labels" if num_classes == 10 else "fine_labels"
    names = "label_names" if num_classes == 10 else "fine_label_names"
    train = [f"data_batch_{index}" for index in range(1, 6)] if num_classes == 10 else ["train"]
    test = ["test_batch"] if num_classes == 10 else ["test"]
    written = {}
    for part, files, each in (("train", train, 6), ("test", test, 3)):
        labels = np.arange(num_classes).repeat(each)
        images = np.random.default_rng(each).integers(
            0, 256, (len(labels), 3, 32, 32), dtype=np.uint8
        )
        written[part] = (images, labels)
        for index, file in enumerate(files):
            chosen = slice(index, None, len(files))
            entry = {"data": images[chosen].reshape(-1, 3072), key: labels[chosen].tolist()}
            (folder / file).write_bytes(pickle.dumps(entry))
    meta = {names: [f"class {label}" for label in range(num_classes)]}
    (folder / ("batches.meta" if num_classes == 10 else "meta")).write_bytes(pickle.dumps(meta))
    return written


@pytest.mark.parametrize("num_classes", [10, 100])
def test_cifar_as_torchvision_reads_it(tmp_path, monkeypatch, num_classes):
    written = _fake_cifar(tmp_path, num_classes)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = CIFARDataModule(num_classes, root=str(tmp_path), val_fraction=1 / 3, batch_size=16)
    data.prepare_data()
    data.setup("fit")
    assert data.num_classes == num_classes
    for split, each in (("train", 4), ("val", 2), ("test", 3)):
        assert torch.bincount(data.splits[split][1]).tolist() == [each] * num_classes
    images, labels = data.splits["test"]
    assert torch.equal(images, torch.from_numpy(written["test"][0]))
    assert labels.tolist() == written["test"][1].tolist()
    batch, _ = next(iter(data.train_dataloader()))
    assert batch.shape == (16, 3, 32, 32)


def test_missing_cifar_says_how_to_get_it(tmp_path):
    data = CIFARDataModule(root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .*Set download=True"):
        data.setup("fit")


@pytest.mark.parametrize("download", [True, False])
def test_cifar_is_fetched_only_when_asked(tmp_path, monkeypatch, download):
    asked = []
    monkeypatch.setattr(
        "torchvision.datasets.CIFAR10", lambda root, train, download: asked.append(download)
    )
    CIFARDataModule(root=str(tmp_path), download=download).prepare_data()
    assert asked == ([True] if download else [])
