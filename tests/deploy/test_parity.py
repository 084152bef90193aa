"""Sums over batches, shapes, classes, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.deploy.parity import Parity, ParityError, ParityTolerance, compare


def test_the_same_is_the_same():
    a = torch.randn(6, 5)
    parity = compare([((a,), (a,))])
    assert parity.cosine == pytest.approx(1)
    assert (parity.max_abs_error, parity.argmax_agreement) == (0, 1)
    assert (parity.num_examples, parity.num_positions) == (6, 6)


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_batches_count_as_one(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(sum(sizes), 3, generator=generator)
    b = torch.randn(sum(sizes), 3, generator=generator)
    pairs = [((x,), (y,)) for x, y in zip(a.split(sizes), b.split(sizes), strict=True)]
    parity = compare(pairs)
    whole = torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), 0)
    assert parity.cosine == pytest.approx(float(whole), abs=1e-9)
    assert parity.max_abs_error == pytest.approx(float((a - b).abs().max()))
    assert parity.argmax_agreement == pytest.approx(
        float((a.argmax(1) == b.argmax(1)).float().mean())
    )


def test_the_worst_output_counts():
    a, b = torch.randn(4, 3), torch.randn(4, 2)
    parity = compare([((a, b), (a, -b))])
    assert parity.cosine == pytest.approx(-1)
    assert parity.argmax_agreement == 0.5


def test_classes_are_the_second_dimension_or_the_last_of_three():
    maps = torch.zeros(1, 2, 3, 4)
    maps[0, 1] = 1
    swapped = maps.flip(1)
    assert compare([((maps,), (maps,))]).num_positions == 12
    assert compare([((maps,), (swapped,))]).argmax_agreement == 0
    tokens = torch.randn(2, 5, 7)
    assert compare([((tokens,), (tokens,))]).num_positions == 10


def test_one_number_an_example_has_no_argmax():
    a = torch.randn(4, 1)
    assert compare([((a,), (a,))]).argmax_agreement is None
    assert compare([((a[:, 0],), (a[:, 0],))]).argmax_agreement is None
    ParityTolerance(argmax_agreement=1).check(compare([((a,), (a,))]), "it")


def test_zeros_and_what_is_not_finite():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert compare([((zero,), (zero,))]).cosine == 1
    assert compare([((zero,), (one,))]).cosine == 0
    broken = one.clone()
    broken[0, 0] = math.nan
    parity = compare([((one,), (broken,)), ((one,), (one,))])
    assert math.isnan(parity.cosine)
    with pytest.raises(ParityError, match="cosine nan"):
        ParityTolerance(cosine=0).check(parity, "it")


def test_another_shape_or_number_of_outputs_is_refused():
    a = torch.randn(2, 3)
    with pytest.raises(ParityError, match=r"shapes \[\(2, 2\)\]; torch gives \[\(2, 3\)\]"):
        compare([((a,), (a[:, :2],))])
    with pytest.raises(ParityError, match=r"return tensors only"):
        compare([((a, a), (a,))])
    with pytest.raises(ValueError, match="no batch"):
        compare([])


def parity(cosine=1.0, agreement=1.0, positions=100, error=0.0):
    return Parity(cosine, 0.0, error, agreement, positions, positions)


def test_tolerance():
    tolerance = ParityTolerance(cosine=0.9, argmax_agreement=0.95)
    tolerance.check(parity(0.9, 0.95), "it")
    with pytest.raises(ParityError, match=r"net\.onnx .* cosine 0\.89.* at least 0\.9 and 0\.95"):
        tolerance.check(parity(0.89), "net.onnx")
    with pytest.raises(ParityError, match="argmax agreement 0.9400"):
        tolerance.check(parity(agreement=0.94), "it")
    tolerance.check(parity(error=0.02), "it")
    with pytest.raises(ParityError, match=r"\(2\.10 % of the largest output\); .*at most 2 %"):
        tolerance.check(parity(error=0.021), "it")


def test_the_largest_error_is_relative_to_the_largest_output_of_torch():
    a, b = torch.tensor([[4.0, -8.0]]), torch.tensor([[4.0, -7.0]])
    assert compare([((a,), (b,))]).max_relative_error == 1 / 8
    assert compare([((a,), (a,))]).max_relative_error == 0
    assert compare([((a * 0,), (a * 0,))]).max_relative_error == 0
    assert compare([((a * 0,), (b,))]).max_relative_error == float("inf")
    assert compare([((a,), (b * float("nan"),))]).max_relative_error == float("inf")


def test_one_tie_may_fall_the_other_way():
    tolerance = ParityTolerance(argmax_agreement=1)
    tolerance.check(parity(agreement=0.75, positions=4), "it")
    with pytest.raises(ParityError):
        tolerance.check(parity(agreement=0.5, positions=4), "it")


@pytest.mark.parametrize("value", [1.5, -0.1, "0.9", True, float("nan")])
def test_tolerance_of_the_wrong_kind(value):
    with pytest.raises(ValueError, match="cosine=.*from 0 to 1"):
        ParityTolerance(cosine=value)


def test_it_prints_as_a_table():
    text = str(parity(0.5, 0.25))
    assert "0.500000" in text
    assert "25.00 %" in text
