import numpy as np
import pytest

from lit_compress.compress.channels.ties import Ties, reshape, support


def atoms(ties, *shape):
    return ties.new(int(np.prod(shape))).reshape(shape)


def same(ties, left, right):
    return np.array_equal(ties.roots(left), ties.roots(right))


def test_ties_are_transitive():
    ties = Ties()
    a, b, c = (ties.new(5) for _ in range(3))
    ties.tie(a, b)
    ties.tie(c, b)
    assert same(ties, a, c)
    assert len(np.unique(ties.roots(np.concatenate([a, b, c])))) == 5


def test_ties_within_one_array():
    ties = Ties()
    a = ties.new(6)
    ties.tie(a[:5], a[1:])
    assert np.unique(ties.roots(a)).size == 1


def test_many_atoms():
    ties = Ties()
    a, b = ties.new(3000), ties.new(3000)
    ties.tie(a[::-1], b)
    assert same(ties, a[::-1], b)
    assert same(ties, ties.new(2), np.array([6000, 6001]))


@pytest.mark.parametrize("first", ["pin", "tie"])
def test_a_pin_holds_for_all_that_is_tied(first):
    ties = Ties()
    a, b = ties.new(3), ties.new(3)
    if first == "pin":
        ties.pin(b[1:2], "because")
        ties.tie(a, b)
    else:
        ties.tie(a, b)
        ties.pin(b[1:2], "because")
    assert ties.pinned == {int(ties.roots(a[1:2])[0]): "because"}


def test_the_first_reason_stays():
    ties = Ties()
    a = ties.new(1)
    ties.pin(a, "first")
    ties.pin(a, "second")
    assert list(ties.pinned.values()) == ["first"]


def test_what_meets_index_by_index_is_tied():
    ties = Ties()
    a, b = atoms(ties, 1, 4, 1), atoms(ties, 1, 4, 1)
    ties.match((a,), (b,), ((2, 4, 3), (2, 4, 3)), "add")
    assert same(ties, a, b)
    assert not ties.pinned


def test_what_meets_a_tensor_of_fixed_size_is_pinned():
    ties = Ties()
    a, b = atoms(ties, 1, 4), atoms(ties, 1, 4)
    ties.match((a,), (), ((2, 4), (2, 4)), "add")
    ties.match((), (b,), ((2, 1), (2, 4)), "add")  # broadcast: no size to agree with
    assert len(ties.pinned) == 4
    assert set(ties.pinned.values()) == {"meets a tensor of fixed size in add"}


def test_channels_that_cross_are_pinned():
    ties = Ties()
    a, b = atoms(ties, 3, 4), atoms(ties, 1, 4)
    ties.match((a,), (b,), ((3, 4), (3, 4)), "mul")
    assert len(ties.pinned) == 16


def test_a_merged_dimension_repeats_its_channel():
    ties = Ties()
    a = atoms(ties, 1, 3, 1, 1)
    (flat,) = reshape((a,), (2, 3, 2, 2), (2, 12), ties)
    assert flat.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]]
    assert not ties.bonds
    (back,) = reshape((flat,), (2, 12), (2, 3, 2, 2), ties)
    assert np.array_equal(back, a)


def test_a_split_dimension_makes_blocks():
    ties = Ties()
    a = atoms(ties, 1, 6)
    (heads,) = reshape((a,), (5, 6), (5, 2, 3), ties)
    assert heads.tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert [rows.tolist() for rows in ties.bonds] == [[[0, 1, 2], [3, 4, 5]]]


def test_two_kinds_of_channels_in_one_dimension_are_pinned():
    ties = Ties()
    a, b = atoms(ties, 3, 1), atoms(ties, 1, 4)
    assert reshape((a, b), (3, 4), (12,), ties) == ()
    assert len(ties.pinned) == 7


def test_support():
    assert support(np.zeros((1, 3, 1, 2), dtype=np.int64)) == (1, 3)
    assert support(np.zeros((), dtype=np.int64)) == ()
