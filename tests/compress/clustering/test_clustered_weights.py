import copy
import io

import pytest
import torch
from torch import nn

from lit_compress.compress.clustering.clustered_weights import ClusteredWeights


def parameters(seed=0, sparse=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 8, 3, 3, generator=generator)
    if sparse:
        weight[weight.abs() < 0.5] = 0
    return {"conv": nn.Parameter(weight), "head": nn.Parameter(torch.randn(5, 40))}


def clustered(params, k=8, **kwargs):
    weights = ClusteredWeights(params, dict.fromkeys(params, k), **kwargs)
    return weights, weights.cluster()


def roundtrip(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def distinct(p):
    return len(torch.unique(p.detach()))


def test_parameters_get_few_values_and_keep_their_zeros():
    params = parameters()
    before = copy.deepcopy(params)
    weights, error = clustered(params)
    for name, p in params.items():
        assert distinct(p) == 8
        assert torch.equal(p == 0, before[name] == 0)
        changed = float((p - before[name]).double().square().sum())
        assert error.inertia[name] == pytest.approx(changed, rel=1e-6)
    squares = sum(float(p.double().square().sum()) for p in before.values())
    assert error.relative == pytest.approx(sum(error.inertia.values()) / squares, rel=1e-9)
    assert weights.is_clustered


def test_an_all_zero_parameter_has_no_error():
    _, error = clustered({"w": nn.Parameter(torch.zeros(4, 4))})
    assert error.relative == 0.0


def test_nothing_happens_before_the_clustering():
    params = parameters()
    before = copy.deepcopy(params)
    weights = ClusteredWeights(params, dict.fromkeys(params, 4))
    params["conv"].grad = torch.ones_like(params["conv"])
    weights.apply()
    weights.apply(["conv"])
    weights.tie_gradients()
    weights.apply_to_copy(params)
    assert not weights.is_clustered
    assert all(torch.equal(p, before[n]) for n, p in params.items())
    assert bool((params["conv"].grad == 1).all())


def test_gradients_are_the_means_of_their_clusters():
    params = {"w": nn.Parameter(torch.tensor([[0.0, 1.0, 1.1, 5.0, 5.2, 5.1]]))}
    weights, _ = clustered(params, 3)
    params["w"].grad = torch.tensor([[7.0, 1.0, 3.0, 3.0, 3.0, 6.0]])
    weights.tie_gradients()
    assert params["w"].grad.tolist() == [[0.0, 2.0, 2.0, 4.0, 4.0, 4.0]]
    without_zero = {"w": nn.Parameter(torch.tensor([[0.0, 1.0, 1.1, 5.0, 5.2, 5.1]]))}
    weights, _ = clustered(without_zero, 3, keep_zero=False)
    without_zero["w"].grad = torch.tensor([[7.0, 1.0, 3.0, 3.0, 3.0, 6.0]])
    weights.tie_gradients()
    assert without_zero["w"].grad[0, 0] == 7.0


def test_applying_is_the_mean_and_idempotent():
    params = parameters()
    weights, _ = clustered(params)
    indices = weights.clusters["head"].indices.long()
    params["head"].data += torch.randn(5, 40)
    expected = [float(params["head"].detach()[indices == j].double().mean()) for j in range(8)]
    weights.apply()
    assert distinct(params["head"]) == 8
    found = [float(params["head"].detach()[indices == j][0]) for j in range(8)]
    assert found == pytest.approx(expected, rel=1e-6)
    once = copy.deepcopy(params)
    for _ in range(3):
        weights.apply()
    assert all(torch.equal(p, once[n]) for n, p in params.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_stay_clustered_too(dtype):
    params = {"w": nn.Parameter(torch.randn(40, 30).to(dtype))}
    weights, _ = clustered(params, 16)
    for _ in range(5):
        params["w"].data += torch.randn(40, 30).to(dtype) * 0.1
        weights.apply()
        assert distinct(params["w"]) <= 16
    once = params["w"].detach().clone()
    weights.apply()
    assert torch.equal(once, params["w"])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_members_is_training_their_centroids(optimizer):
    """The same as an optimizer on the centroids with the mean gradients of their members."""
    options = {"lr": 0.05, "weight_decay": 0.1}
    options |= {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    params = {"w": nn.Parameter(torch.randn(30, 20))}
    weights, _ = clustered(params, 6, keep_zero=False)
    clusters = weights.clusters["w"]
    centroids = nn.Parameter(clusters.centroids.clone())
    sizes = torch.bincount(clusters.indices.flatten(), minlength=6)
    of_members, of_centroids = (
        optimizer(params.values(), **options),
        optimizer([centroids], **options),
    )
    for seed in range(10):
        x = torch.randn(20, 16, generator=torch.Generator().manual_seed(seed))
        of_members.zero_grad()
        (params["w"] @ x).tanh().sum().backward()
        weights.tie_gradients()
        of_members.step()
        weights.apply()
        of_centroids.zero_grad()
        (centroids[clusters.indices.int()] @ x).tanh().sum().backward()
        centroids.grad /= sizes  # autograd adds the members' gradients up
        of_centroids.step()
    assert torch.allclose(weights.clusters["w"].centroids, centroids, rtol=1e-4, atol=1e-5)


def test_values_that_are_not_trainable_stay():
    params = parameters()
    weights, _ = clustered(params, trainable=False)
    before = copy.deepcopy(params)
    params["conv"].grad = torch.ones_like(params["conv"])
    weights.tie_gradients()
    assert not params["conv"].grad.any()
    params["conv"].data *= 0.9
    weights.apply()
    assert all(torch.equal(p, before[n]) for n, p in params.items())


def test_sparse_gradients_are_left_to_the_projection():
    embedding = nn.Embedding(10, 4, sparse=True)
    weights, _ = clustered({"e": embedding.weight}, 4)
    embedding(torch.tensor([1, 2])).sum().backward()
    weights.tie_gradients()
    torch.optim.SGD([embedding.weight], lr=0.1).step()
    weights.apply()
    assert distinct(embedding.weight) <= 4


def test_copies_are_tied_by_name_whatever_their_dtype():
    params = parameters()
    weights, _ = clustered(params)
    copies = {n: torch.randn_like(p, dtype=torch.float64) for n, p in params.items()}
    copies |= {"other": torch.arange(5.0)}
    weights.apply_to_copy(copies)
    assert distinct(copies["head"]) == 8
    assert torch.equal(copies["conv"] == 0, params["conv"] == 0)
    assert copies["other"].tolist() == [0, 1, 2, 3, 4]


def test_memory_formats_are_kept():
    last = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    params = {"w": nn.Parameter(last.clone(memory_format=torch.preserve_format))}
    plain = {"w": nn.Parameter(last.contiguous())}
    clustered(params)
    clustered(plain)
    assert params["w"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(params["w"], plain["w"])


def test_a_cut_takes_the_clusters_along():
    params = parameters()
    weights, _ = clustered(params)
    keep = {0: torch.tensor([0, 3, 7]), 1: torch.tensor([1, 2])}
    expected = params["conv"].detach()[keep[0]][:, keep[1]].clone()
    params["conv"].data = expected.clone()
    weights.cut({"conv": keep, "other": keep})
    weights.apply()
    assert torch.equal(params["conv"], expected)
    params["conv"].data += torch.randn_like(expected)
    weights.apply()
    assert distinct(params["conv"]) <= 8
    assert torch.equal(params["conv"] == 0, expected == 0)


def test_clusters_without_members_after_a_cut_do_no_harm():
    params = {"w": nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))}
    weights, _ = clustered(params, 4)
    params["w"].data = params["w"].data[:1].clone()
    weights.cut({"w": {0: torch.tensor([0])}})
    weights.apply()
    assert params["w"].tolist() == [[1.0, 2.0]]
    assert weights.clusters["w"].centroids.tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("trainable", [True, False])
def test_state_goes_through_a_file_and_training_goes_on(trainable):
    params = parameters()
    weights, _ = clustered(params, 5, trainable=trainable)
    other = copy.deepcopy(params)
    restored = ClusteredWeights(other, dict.fromkeys(other, 5), trainable=trainable)
    restored.load_state_dict(roundtrip(weights.state_dict()))
    for name in params:
        noise = torch.randn_like(params[name])
        params[name].data += noise
        other[name].data += noise
    weights.apply()
    restored.apply()
    assert all(torch.equal(params[n], other[n]) for n in params)
    assert torch.equal(other["conv"] == 0, params["conv"] == 0)


def test_the_state_before_the_clustering_is_empty():
    params = parameters()
    weights = ClusteredWeights(params, dict.fromkeys(params, 5))
    restored = ClusteredWeights(params, dict.fromkeys(params, 5))
    restored.load_state_dict(roundtrip(weights.state_dict()))
    assert not restored.is_clustered


def test_all_processes_can_agree():
    ours, theirs = parameters(0), parameters(1)
    one, _ = clustered(theirs)
    weights = ClusteredWeights(ours, dict.fromkeys(ours, 8))
    weights.cluster(agree=lambda found: dict(one.clusters) if found else {})
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_state_of_other_parameters_is_refused():
    weights, _ = clustered(parameters())
    other = {"conv": nn.Parameter(torch.randn(3, 3))}
    with pytest.raises(ValueError, match=r"'conv' has shape \[12, 8, 3, 3\] in the checkpoint and"):
        ClusteredWeights(other, {"conv": 8}).load_state_dict(weights.state_dict())


def test_a_nan_weight_is_named_and_nothing_changes():
    params = parameters()
    params["head"].data[0, 0] = torch.nan
    before = params["conv"].detach().clone()
    with pytest.raises(ValueError, match="'head' cannot be clustered: .* NaN"):
        clustered(params)
    assert torch.equal(before, params["conv"])


def test_numbers_out_of_range_are_refused():
    params = parameters()
    with pytest.raises(ValueError, match=r"num_clusters\['head'\] is 1, expected"):
        ClusteredWeights(params, {"conv": 4, "head": 1})
