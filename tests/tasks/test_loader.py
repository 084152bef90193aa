"""Batches from memory: augmentation, order, sharding, resuming."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.tasks.loader import (
    ArrayLoader,
    Augmentation,
    Normalization,
    random_crop,
    random_flip,
)

GREY = Normalization((0.0,), (1.0,))


def _loader(num_images: int = 23, batch_size: int = 4, **kwargs) -> ArrayLoader:
    """A loader whose labels are the indices of the images."""
    images = torch.arange(num_images, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 6, 6)
    return ArrayLoader(images, torch.arange(num_images), batch_size, GREY, **kwargs)


def _labels(loader: ArrayLoader) -> list[list[int]]:
    return [labels.tolist() for _, labels in loader]


def _assert_same(first: list, second: list) -> None:
    assert len(first) == len(second)
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_every_crop_is_a_window_of_the_padded_image_and_all_places_occur():
    images = torch.randint(1, 255, (400, 2, 3, 3), dtype=torch.uint8)
    crops = random_crop(images, 1, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    places = set()
    for image, crop in zip(padded, crops, strict=True):
        matches = [
            (row, column)
            for row in range(3)
            for column in range(3)
            if torch.equal(image[:, row : row + 3, column : column + 3], crop)
        ]
        assert len(matches) == 1
        places.update(matches)
    assert len(places) == 9


def test_about_half_of_the_images_are_flipped_and_none_otherwise_changed():
    images = torch.randint(0, 255, (1000, 1, 2, 5), dtype=torch.uint8)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert bool((same | mirrored).all())
    assert 0.45 < mirrored.float().mean() < 0.55


def test_normalization_is_that_of_the_formula():
    images = torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.3])
    expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(Normalization((0.4, 0.5), (0.2, 0.3))(images), expected)


def test_images_and_labels_stay_together():
    for images, labels in _loader(shuffle=True):
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
        assert images.dtype == torch.float32


@settings(deadline=None, max_examples=60)
@given(
    num_images=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_ranks_share_the_images(num_images, batch_size, world_size, shuffle, drop_last):
    ranks = [
        _labels(
            _loader(
                num_images,
                batch_size,
                shuffle=shuffle,
                drop_last=drop_last,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    sizes = [[len(batch) for batch in batches] for batches in ranks]
    assert all(size == sizes[0] for size in sizes)  # as many batches, as long, on every rank
    given_out = [label for batches in ranks for batch in batches for label in batch]
    if drop_last:
        assert len(set(given_out)) == len(given_out)
        assert num_images - len(given_out) < batch_size * world_size
        assert all(length == batch_size for length in sizes[0])
    else:
        assert set(given_out) == set(range(num_images))
        assert len(given_out) - num_images < world_size


def test_length_is_the_number_of_batches():
    for kwargs in ({}, {"drop_last": True}, {"world_size": 3, "rank": 1}):
        loader = _loader(**kwargs)
        assert len(loader) == len(list(loader))


def test_order_changes_with_epoch_and_seed_and_repeats_for_the_same():
    first, second = _loader(shuffle=True), _loader(shuffle=True)
    epochs = [_labels(first) for _ in range(3)]
    assert epochs == [_labels(second) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != _labels(_loader(shuffle=True, seed=1))
    assert sorted(label for batch in epochs[0] for label in batch) == list(range(23))


def test_augmentation_differs_between_epochs_batches_and_ranks():
    images = torch.randint(0, 255, (1, 1, 8, 8), dtype=torch.uint8).expand(64, 1, 8, 8)
    labels = torch.zeros(64, dtype=torch.int64)

    def batches(rank: int) -> list[torch.Tensor]:
        loader = ArrayLoader(
            images, labels, 16, GREY, augmentation=Augmentation(2), rank=rank, world_size=2
        )
        return [batch for _ in range(2) for batch, _ in loader]

    seen = batches(0) + batches(1)
    assert len(seen) == 8
    for index, batch in enumerate(seen):
        assert not any(torch.equal(batch, other) for other in seen[:index])


def test_set_epoch_chooses_the_epoch_also_after_iter_was_called():
    expected = [_labels(loader) for loader in [_loader(shuffle=True)] for _ in range(3)]
    loader = _loader(shuffle=True)
    early = iter(loader)
    loader.set_epoch(2)
    assert [labels.tolist() for _, labels in early] == expected[2]
    loader.set_epoch(0)
    assert _labels(loader) == expected[0]
    assert _labels(loader) == expected[1]


def test_an_epoch_broken_off_is_not_gone_on_with():
    expected = [_labels(loader) for loader in [_loader(shuffle=True)] for _ in range(2)]
    loader = _loader(shuffle=True)
    batches = iter(loader)
    next(batches)
    assert _labels(loader) == expected[1]


@settings(deadline=None, max_examples=30)
@given(taken=st.integers(0, 17), announce=st.booleans())
def test_a_loader_goes_on_exactly_where_the_state_was_taken(taken, announce):
    kwargs = {"shuffle": True, "augmentation": Augmentation(1), "seed": 3}
    whole = _loader(**kwargs)
    expected = [batch for _ in range(3) for batch in whole]

    interrupted = _loader(**kwargs)
    stream = (batch for _ in range(3) for batch in interrupted)
    for _ in range(taken):
        next(stream)
    state = interrupted.state_dict()

    resumed = _loader(**kwargs)
    resumed.load_state_dict(state)
    if announce and taken % len(resumed):
        resumed.set_epoch(taken // len(resumed))
    rest = []
    while len(rest) < len(expected) - taken:
        rest += list(resumed)
    _assert_same(rest, expected[taken:])


def test_state_is_plain_numbers_and_fits_every_rank():
    source = _loader(rank=0, world_size=2, shuffle=True)
    next(iter(source))
    state = source.state_dict()
    assert all(isinstance(value, (int, bool)) for value in state.values())
    other = _loader(rank=1, world_size=2, shuffle=True)
    other.load_state_dict(state)
    assert _labels(other) == _labels(_loader(rank=1, world_size=2, shuffle=True))[1:]


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"batch_size": 5}, "batch_size=4.*batch_size=5"),
        ({"seed": 1}, "inside epoch 0 with seed=0, and this loader has seed=1"),
        ({"num_images": 22}, "num_images=23.*num_images=22"),
        ({"rank": 0, "world_size": 2}, "world_size=1.*world_size=2"),
        ({"drop_last": True}, "num_batches=6.*num_batches=5"),
        ({"shuffle": False}, "shuffle=True.*shuffle=False"),
    ],
)
def test_a_place_inside_an_epoch_is_refused_for_other_batches(changed, match):
    source = _loader(shuffle=True)
    next(iter(source))
    with pytest.raises(ValueError, match=match):
        _loader(**{"shuffle": True, **changed}).load_state_dict(source.state_dict())


def test_a_place_between_epochs_serves_any_loader():
    source = _loader(shuffle=True)
    list(source)
    other = _loader(batch_size=7, shuffle=True)
    other.load_state_dict(source.state_dict())
    expected = _loader(batch_size=7, shuffle=True)
    expected.set_epoch(1)
    assert _labels(other) == _labels(expected)


def test_a_foreign_state_is_refused():
    with pytest.raises(ValueError, match="came without batch_size, batches, epoch"):
        _loader().load_state_dict({"_num_yielded": 3})


IMAGES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
LABELS = torch.zeros(2, dtype=torch.int64)
RGB = Normalization((0.5,) * 3, (0.2,) * 3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ArrayLoader(IMAGES.float(), LABELS, 1, RGB), "images came as torch.float32"),
        (lambda: ArrayLoader(IMAGES[:0], LABELS[:0], 1, RGB), "at least one image"),
        (lambda: ArrayLoader(IMAGES, LABELS[:1], 1, RGB), r"labels came as .*\(1,\)"),
        (lambda: ArrayLoader(IMAGES, LABELS, 1, GREY), "3 channels and the normalization is for 1"),
        (lambda: ArrayLoader(IMAGES, LABELS, 0, RGB), "batch_size came as 0"),
        (lambda: ArrayLoader(IMAGES, LABELS, 1, RGB, rank=2, world_size=2), "rank came as 2 of 2"),
        (lambda: ArrayLoader(IMAGES, LABELS, 1, RGB, seed=-1), "seed came as -1"),
        (lambda: Normalization((0.5,), (0.2, 0.2)), "mean came with 1 values and std with 2"),
        (lambda: Normalization((0.5,), (0.0,)), "std came as"),
        (lambda: Augmentation(crop_padding=-1), "crop_padding came as -1"),
    ],
)
def test_values_out_of_range_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
