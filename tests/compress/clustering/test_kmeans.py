from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lit_compress.compress.clustering.kmeans import (
    _sums_by_sorting,
    cluster_means,
    inertia,
    kmeans,
)

INITS = ["kmeans++", "density", "linear"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clustered(values, k, init="kmeans++", **kwargs):
    return kmeans(values, k, init, generator=seeded(), **kwargs)


tensors = hnp.arrays(
    "float32",
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=12),
    elements=st.one_of(
        st.floats(-4, 4, width=32), st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0, 1e-30, 3e4])
    ),
).map(torch.from_numpy)


# --- What holds for all values --------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(tensors, st.integers(2, 20), st.sampled_from(INITS), st.sampled_from([0, 1, 100]))
def test_each_value_goes_to_its_nearest_centroid(values, k, init, num_iterations):
    centroids, indices = clustered(values, k, init, num_iterations=num_iterations)
    assert indices.shape == values.shape
    assert indices.dtype == torch.uint8
    assert centroids.dtype == values.dtype
    distances = (values.double().unsqueeze(-1) - centroids.double()).abs()
    own = distances.gather(-1, indices.long().unsqueeze(-1)).squeeze(-1)
    assert torch.equal(own, distances.amin(-1))


@settings(deadline=None, max_examples=150)
@given(tensors, st.integers(2, 20), st.sampled_from(INITS), st.booleans())
def test_centroids_are_sorted_distinct_and_all_used(values, k, init, keep_zero):
    centroids, indices = clustered(values, k, init, keep_zero=keep_zero)
    assert 1 <= len(centroids) <= k
    assert bool((centroids.diff() > 0).all())
    assert indices.unique().tolist() == list(range(len(centroids)))


@settings(deadline=None, max_examples=150)
@given(tensors, st.integers(2, 20), st.sampled_from(INITS))
def test_zero_keeps_exactly_the_zeros(values, k, init):
    centroids, indices = clustered(values, k, init, keep_zero=True)
    assert torch.equal(centroids[indices.int()] == 0, values == 0)
    live = values != 0
    others = centroids[centroids != 0].double()
    if live.any():
        away = (values[live].double().unsqueeze(-1) - others).abs().amin(-1)
        own = (values[live].double() - centroids[indices[live].int()].double()).abs()
        assert torch.equal(own, away)


@settings(deadline=None, max_examples=100)
@given(tensors, st.integers(2, 8), st.sampled_from(INITS), st.booleans())
def test_inertia_never_rises(values, k, init, keep_zero):
    inertias = [
        inertia(values, *clustered(values, k, init, num_iterations=n, keep_zero=keep_zero))
        for n in (0, 1, 2, 3, 10, 100)
    ]
    slack = 1e-6 * float(values.double().square().sum())  # centroids are rounded to float32
    assert all(after <= before + slack for before, after in pairwise(inertias))


@settings(deadline=None, max_examples=60)
@given(tensors, st.integers(2, 20), st.sampled_from(INITS), st.booleans())
def test_clustering_again_changes_nothing(values, k, init, keep_zero):
    centroids, indices = clustered(values, k, init, keep_zero=keep_zero)
    once = centroids[indices.int()]
    again, same = clustered(once, k, init, keep_zero=keep_zero)
    assert torch.equal(again, centroids)
    assert torch.equal(same, indices)


@settings(deadline=None, max_examples=60)
@given(tensors, st.integers(1, 5))
def test_means_of_equal_members_are_those_members(values, k):
    indices = torch.arange(values.numel()).remainder(k).to(torch.uint8)
    sizes = torch.bincount(indices, minlength=k)
    centroids = torch.zeros(k)
    for j in range(k):
        if sizes[j]:
            centroids[j] = values.flatten()[j]
    means = cluster_means(centroids[indices.int()], indices, sizes)
    assert torch.equal(means[sizes > 0].float(), centroids[sizes > 0])
    assert means[sizes == 0].isnan().all()


@settings(deadline=None, max_examples=40)
@given(tensors, st.integers(1, 5))
def test_sums_by_sorting_are_the_sums(values, k):
    flat = values.flatten().double()
    indices = (torch.arange(len(flat)) * 7).remainder(k).to(torch.uint8)
    sizes = torch.bincount(indices, minlength=k)
    expected = torch.stack([flat[indices == j].sum() for j in range(k)])
    assert torch.allclose(_sums_by_sorting(flat, indices, sizes), expected, atol=1e-9)


# --- Cases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_separate_groups_are_found(init):
    centres = torch.tensor([-5.0, -1.0, 0.5, 9.0])
    noise = torch.randn(4, 500, generator=seeded(1)) * 0.05
    values = centres[:, None] + noise
    centroids, indices = clustered(values, 4, init)
    assert torch.allclose(centroids, values.mean(1), atol=1e-5)
    assert torch.equal(indices, torch.arange(4, dtype=torch.uint8)[:, None].expand(4, 500))


def test_lloyd_beats_quantiles_and_uniform_steps_on_weights():
    values = torch.randn(20_000, generator=seeded())
    found = {init: inertia(values, *clustered(values, 16, init)) for init in INITS}
    steps = {
        init: inertia(values, *clustered(values, 16, init, num_iterations=0)) for init in INITS
    }
    assert all(found[init] < 0.9 * steps[init] for init in INITS)
    # The optimum for a normal distribution and 16 levels: 0.009497 (Max 1960, table I).
    assert min(found.values()) / len(values) == pytest.approx(0.0095, rel=0.05)


@pytest.mark.parametrize("init", INITS)
def test_fewer_distinct_values_than_clusters_stay_as_they_are(init):
    values = torch.tensor([[3.0, -1.0], [3.0, 0.25]])
    centroids, indices = clustered(values, 16, init)
    assert centroids.tolist() == [-1.0, 0.25, 3.0]
    assert torch.equal(centroids[indices.int()], values)


def test_a_tie_goes_to_the_lesser_centroid():
    values = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0])
    centroids, indices = clustered(values, 2, "linear", num_iterations=0)
    assert centroids.tolist() == [0.0, 2.0]
    assert indices.tolist() == [0, 0, 0, 1, 1]


def test_empty_clusters_move_to_the_values_that_are_worst_off():
    values = torch.cat([torch.linspace(0, 1, 50), torch.tensor([1000.0])])
    centroids, _ = clustered(values, 5, "linear")
    assert len(centroids) == 5  # evenly spaced, three of five would have no member
    assert centroids[-1] == 1000.0
    assert centroids[-2] < 1


def test_values_of_both_signs_are_told_from_zeros():
    values = torch.tensor([-1.0, 1.0, 0.0, -0.0])
    centroids, indices = clustered(values, 2, keep_zero=True)
    assert torch.equal(centroids[indices.int()] == 0, values == 0)


def test_zero_takes_no_centroid_where_there_are_no_zeros():
    values = torch.tensor([-2.0, -1.0, 1.0, 2.0])
    assert torch.equal(clustered(values, 4, keep_zero=True)[0], values)
    assert clustered(torch.zeros(3, 2), 4, keep_zero=True)[0].tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("keep_zero", [False, True])
def test_other_dtypes(dtype, keep_zero):
    values = torch.randn(64, 9, generator=seeded()).to(dtype)
    values[0] = 0
    centroids, indices = clustered(values, 8, keep_zero=keep_zero)
    assert centroids.dtype == dtype
    assert len(centroids) == 8
    distances = (values.double().unsqueeze(-1) - centroids.double()).abs()
    if not keep_zero:
        own = distances.gather(-1, indices.long().unsqueeze(-1)).squeeze(-1)
        assert torch.equal(own, distances.amin(-1))
    else:
        assert torch.equal(centroids[indices.int()] == 0, values == 0)


def test_the_seed_decides_and_torchs_own_generator_is_left_alone():
    values = torch.randn(2000)
    before = torch.get_rng_state()
    first, again = kmeans(values, 16, generator=seeded(3)), kmeans(values, 16, generator=seeded(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    starts = [kmeans(values, 16, generator=seeded(s), num_iterations=0)[0] for s in (3, 4)]
    assert not torch.equal(*starts)


def test_memory_layouts_do_not_matter():
    values = torch.randn(8, 4, 3, 3, generator=seeded())
    plain = clustered(values, 8)
    last = clustered(values.to(memory_format=torch.channels_last), 8)
    assert torch.equal(plain[0], last[0])
    assert torch.equal(plain[1], last[1])


def test_more_values_than_candidates_for_seeds():
    values = torch.randn(100_000, generator=seeded())
    centroids, indices = clustered(values, 256)
    assert len(centroids) == 256
    assert inertia(values, centroids, indices) / len(values) < 1e-4


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kwargs", "message"),
    [
        (torch.ones(3), {"num_clusters": 1}, "num_clusters is 1, expected a whole number from 2"),
        (torch.ones(3), {"num_clusters": 257}, "num_clusters is 257, expected .* to 256"),
        (torch.ones(3), {"num_clusters": 4.0}, "num_clusters is 4.0, expected a whole number"),
        (torch.ones(3), {"num_clusters": True}, "num_clusters is True, expected a whole number"),
        (torch.ones(3), {"num_clusters": 4, "init": "random"}, "init is 'random', expected one of"),
        (torch.ones(3), {"num_clusters": 4, "num_iterations": -1}, "num_iterations is -1"),
        (torch.ones(3), {"num_clusters": 4, "num_iterations": 1.5}, "num_iterations is 1.5"),
        (torch.ones(3).int(), {"num_clusters": 4}, "are torch.int32, expected floating point"),
        (torch.ones(0), {"num_clusters": 4}, "there are no values to cluster"),
        (torch.tensor([1.0, torch.nan]), {"num_clusters": 4}, "hold NaN or infinity"),
        (torch.tensor([1.0, torch.inf]), {"num_clusters": 4}, "hold NaN or infinity"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(values, kwargs, message):
    with pytest.raises(ValueError, match=message):
        kmeans(values, **kwargs)
