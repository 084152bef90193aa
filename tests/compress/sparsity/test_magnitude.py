import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.compress.sparsity.magnitude import (
    allocate_zeros,
    apportion,
    check_sparsity,
    heuristic_sparsities,
    keep_largest,
    kth_smallest,
    magnitude_masks,
    pack_mask,
    unpack_mask,
)
from lit_compress.compress.sparsity.patterns import Block, NofM

sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=8).map(
    lambda ns: {f"layer{i}": n for i, n in enumerate(ns)}
)
targets = st.floats(0.0, 0.999)
# Few different values, so that ties abound.
tied_scores = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=60)


@given(sizes, targets, st.sampled_from(["uniform", "heuristic"]))
def test_the_total_is_exact_for_every_rule(sizes, sparsity, rule):
    zeros = allocate_zeros(sizes, sparsity, rule)
    assert sum(zeros.values()) == round(sparsity * sum(sizes.values()))
    assert all(0 <= zeros[n] <= sizes[n] for n in sizes)


@given(sizes, targets)
def test_uniform_is_within_one_unit_in_every_layer(sizes, sparsity):
    zeros = allocate_zeros(sizes, sparsity, "uniform")
    assert all(abs(zeros[n] - sparsity * sizes[n]) <= 1 for n in sizes)


@given(sizes, targets)
def test_global_is_one_number(sizes, sparsity):
    assert allocate_zeros(sizes, sparsity, "global") == round(sparsity * sum(sizes.values()))


@given(sizes, targets)
def test_a_mapping_fixes_every_layer(sizes, sparsity):
    zeros = allocate_zeros(sizes, dict.fromkeys(sizes, sparsity), "uniform")
    assert zeros == {n: round(sparsity * size) for n, size in sizes.items()}


@given(sizes, targets)
def test_heuristic_meets_the_total_below_its_cap(sizes, sparsity):
    ratios = heuristic_sparsities(sizes, sparsity)
    reached = sum(ratios[n] * sizes[n] for n in sizes)
    assert reached == pytest.approx(sparsity * sum(sizes.values()), rel=1e-9, abs=1e-9)
    assert all(0.0 <= r < 1.0 for r in ratios.values())
    if any(size > 1 for size in sizes.values()):
        cap = 1.0 - (1.0 - sparsity) / 3.0
        multi = [n for n in sizes if sizes[n] > 1]
        assert all(ratios[n] <= cap + 1e-12 for n in multi)
        by_size = sorted(multi, key=lambda n: sizes[n])
        assert all(ratios[a] <= ratios[b] + 1e-12 for a, b in itertools.pairwise(by_size))


def test_heuristic_is_pocketflows_formula_where_nothing_is_clipped():
    sizes = {"a": 100, "b": 1000, "c": 10000}
    alpha = 0.5 * 11100 / sum(n * math.log(n) for n in sizes.values())
    assert heuristic_sparsities(sizes, 0.5) == pytest.approx(
        {n: alpha * math.log(size) for n, size in sizes.items()}
    )


def test_heuristic_clips_where_pocketflows_formula_passes_one():
    sizes = {"a": 10, "b": 10, "c": 100000}
    alpha = 0.95 * 100020 / sum(n * math.log(n) for n in sizes.values())
    assert alpha * math.log(10) < 0.95 < alpha * math.log(100000)
    sizes = {"a": 1000, "b": 1200}
    assert max(heuristic_sparsities(sizes, 0.98).values()) < 1.0


@given(st.lists(st.floats(0, 50), min_size=1, max_size=10), st.data())
def test_apportion_adds_up_and_respects_caps(shares, data):
    caps = [data.draw(st.integers(0, 60)) for _ in shares]
    total = data.draw(st.integers(0, sum(caps)))
    counts = apportion(total, shares, caps)
    assert sum(counts) == total
    assert all(0 <= c <= cap for c, cap in zip(counts, caps, strict=True))


@pytest.mark.parametrize("total", [-1, 7])
def test_apportion_refuses_totals_out_of_reach(total):
    with pytest.raises(ValueError, match=f"total is {total}, expected"):
        apportion(total, [1.0, 2.0], [3, 3])


@given(tied_scores, st.data())
def test_keep_largest_removes_exactly_the_smallest(values, data):
    removed = data.draw(st.integers(0, len(values)))
    kept = keep_largest(torch.tensor(values), removed)
    assert int((~kept).sum()) == removed
    gone = [v for v, k in zip(values, kept.tolist(), strict=True) if not k]
    stay = [v for v, k in zip(values, kept.tolist(), strict=True) if k]
    assert not gone or not stay or max(gone) <= min(stay)


def test_ties_are_broken_by_order():
    assert keep_largest(torch.ones(5), 2).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("removed", [-1, 4])
def test_keep_largest_refuses_impossible_counts(removed):
    with pytest.raises(ValueError, match=f"num_removed is {removed}, expected"):
        keep_largest(torch.ones(3), removed)


def test_what_must_stay_is_never_removed():
    scores = torch.tensor([1.0, torch.inf, torch.inf])
    with pytest.raises(ValueError, match="the pattern allows only 1 of 3"):
        keep_largest(scores, 2)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**31),
    st.floats(0, 1),
    st.sampled_from(["normal", "tied", "sorted", "periodic", "heavy"]),
)
def test_kth_smallest_is_exact_on_large_tensors(seed, position, kind):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(200_000, generator=generator).abs()
    if kind == "tied":
        values = (values * 3).floor()
    elif kind == "sorted":
        values = values.sort().values
    elif kind == "periodic":  # the sample sees only the smallest values
        values[::101] *= 1e-3
    elif kind == "heavy":
        values = values.pow(9)
    k = 1 + round(position * (len(values) - 1))
    assert kth_smallest(values, k) == values.sort().values[k - 1]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), targets, st.booleans(), st.integers(0, 2**31))
def test_masks_have_the_exact_count(rows, cols, sparsity, across, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "a": torch.randn(rows, cols, 3, 3, generator=generator).round(decimals=1),
        "b": torch.randn(cols, rows, generator=generator).round(decimals=1),
    }
    sizes = {n: w.numel() for n, w in weights.items()}
    rule = "global" if across else "uniform"
    masks = magnitude_masks(weights, allocate_zeros(sizes, sparsity, rule))
    zeros = sum(int((~m).sum()) for m in masks.values())
    assert zeros == round(sparsity * sum(sizes.values()))
    assert all(masks[n].shape == weights[n].shape for n in weights)
    if across:
        gone = torch.cat([w.abs()[~masks[n]] for n, w in weights.items()])
        stay = torch.cat([w.abs()[masks[n]] for n, w in weights.items()])
        assert not len(gone) or not len(stay) or gone.max() <= stay.min()


def test_half_precision_weights_are_ranked():
    weight = torch.tensor([[4.0, -1.0, 2.0, -3.0]], dtype=torch.bfloat16)
    assert magnitude_masks({"w": weight}, 2)["w"].tolist() == [[True, False, False, True]]


def test_patterns_count_in_their_own_units():
    weight = {"w": torch.randn(8, 8)}
    mask = magnitude_masks(weight, {"w": 5}, Block(4, 1))["w"]
    assert int((~mask).sum()) == 20
    mask = magnitude_masks(weight, 32, NofM(2, 4))["w"]
    assert (mask.view(8, 2, 4).sum(-1) == 2).all()


def test_nan_weights_are_refused_by_name():
    weights = {"good": torch.ones(3), "bad": torch.tensor([1.0, torch.nan])}
    with pytest.raises(ValueError, match="'bad' holds NaN.*resume from an earlier checkpoint"):
        magnitude_masks(weights, 1)


@given(st.lists(st.booleans(), min_size=0, max_size=70))
def test_packed_masks_come_back(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_mask(mask)
    assert packed.numel() == -(-len(bits) // 8)
    assert torch.equal(unpack_mask(packed, mask.shape), mask)


def test_a_packed_mask_of_another_shape_is_refused():
    packed = pack_mask(torch.ones(9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"for shape \(4, 5\) is 3 bytes of uint8; came \(2,\)"):
        unpack_mask(packed, torch.Size((4, 5)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, "A layer without weights computes nothing"),
        (-0.1, r"expected a share of zeros in \[0, 1\)"),
        (90, r"For 90 % write 0\.9"),
        (math.nan, r"expected a share of zeros"),
        ("0.5", r"expected a number in \[0, 1\)"),
        (True, r"expected a number in \[0, 1\)"),
    ],
)
def test_no_sparsities(value, message):
    with pytest.raises(ValueError, match=message):
        check_sparsity("final_sparsity", value)


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="rule is 'best', expected"):
        allocate_zeros({"a": 3}, 0.5, "best")
