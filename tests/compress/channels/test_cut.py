import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.compress.channels.cut import (
    begin_autograd_anew,
    cut_channels,
    cut_optimizer_state,
    misfit,
)
from lit_compress.compress.channels.groups import take
from tests.compress.channels.hand_made_groups import conv_net, cut, groups_of


def keeping(draw_first, draw_second):
    keep = torch.zeros(10, dtype=torch.bool)
    keep[list(draw_first)] = True
    keep[[6 + i for i in draw_second]] = True
    return keep


choices = st.builds(
    keeping,
    st.sets(st.integers(0, 5), min_size=1),
    st.sets(st.integers(0, 3), min_size=1),
)


# --- The model ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(choices, st.booleans(), st.booleans())
def test_a_cut_is_the_model_with_the_other_channels_at_zero(keep, bias, norm):
    torch.manual_seed(0)
    model, groups = conv_net(bias=bias, norm=norm)
    model.eval()
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for name, dim in (("3.weight", 1), ("6.weight", 1)):
            axis = next(a for a in groups.axes if (a.tensor, a.dim) == (name, dim))
            gone = (~keep[axis.channels]).nonzero().flatten()
            silent.get_parameter(name).index_fill_(dim, gone, 0)
    left = cut_channels(model, groups, keep)
    images = torch.randn(2, 1, 6, 6)
    torch.testing.assert_close(model(images), silent(images))
    assert left.num_channels == int(keep.sum())
    assert misfit(model, left) is None
    assert (model[0].out_channels, model[3].in_channels) == (int(keep[:6].sum()),) * 2
    assert model[3].out_channels == int(keep[6:].sum())
    assert model[6].in_features == 9 * int(keep[6:].sum())


@settings(deadline=None, max_examples=25)
@given(choices, choices)
def test_two_cuts_are_one(first, second):
    torch.manual_seed(0)
    model, groups = conv_net(bias=True)
    other = copy.deepcopy(model)
    both = first & second
    if not (both[:6].any() and both[6:].any()):
        return
    left = cut_channels(model, groups, first)
    left = cut_channels(model, left, both[first])
    once = cut_channels(other, groups, both)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=1))
    assert all(torch.equal(a.channels, b.channels) for a, b in zip(left.axes, once.axes, strict=1))


KEEP = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1, 0], dtype=torch.bool)


def test_parameters_stay_the_same_objects_with_their_bits_gradients_and_layout():
    model, groups = conv_net(bias=True)
    model.to(memory_format=torch.channels_last)
    expected = cut(model, groups, KEEP)
    model(torch.randn(2, 1, 6, 6)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    objects = {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
    model[3].weight.requires_grad_(False)
    cut_channels(model, groups, KEEP)
    assert objects == {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
    kept = groups.kept_indices(KEEP)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))
        assert torch.equal(parameter.grad, take(gradients[name], kept.get(name, {})))
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[3].weight.requires_grad
    assert model[0].weight.requires_grad


def test_layers_say_their_new_sizes():
    layers = nn.ModuleDict(
        {
            "depthwise": nn.Conv2d(6, 12, 3, groups=6),
            "grouped": nn.Conv2d(6, 6, 3, groups=2),
            "transposed": nn.ConvTranspose2d(6, 4, 3),
            "linear": nn.Linear(6, 6),
            "bilinear": nn.Bilinear(3, 6, 2),
            "norm": nn.BatchNorm2d(6, affine=False),
            "layer_norm": nn.LayerNorm(6),
            "rms_norm": nn.RMSNorm(6),
            "group_norm": nn.GroupNorm(2, 6),
            "prelu": nn.PReLU(6),
            "embedding": nn.Embedding(5, 6),
        }
    )
    channels = list(range(6))
    groups = groups_of(
        {"a": 6},
        ("depthwise.weight", 0, [c for c in channels for _ in range(2)], "scale"),
        ("depthwise.bias", 0, [c for c in channels for _ in range(2)], "scale"),
        ("grouped.weight", 0, channels, "out"),
        ("transposed.weight", 0, channels, "in"),
        ("linear.weight", 0, channels, "out"),
        ("linear.weight", 1, channels, "in"),
        ("bilinear.weight", 2, channels, "in"),
        ("norm.running_mean", 0, channels, "scale"),
        ("norm.running_var", 0, channels, "scale"),
        *((f"{n}_norm.weight", 0, channels, "scale") for n in ("layer", "rms", "group")),
        ("prelu.weight", 0, channels, "scale"),
        ("embedding.weight", 1, channels, "out"),
    )
    cut_channels(layers, groups, torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.bool))
    depthwise = layers["depthwise"]
    assert (depthwise.in_channels, depthwise.groups, depthwise.out_channels) == (4, 4, 8)
    assert (layers["grouped"].out_channels, layers["grouped"].groups) == (4, 2)
    assert (layers["transposed"].in_channels, layers["transposed"].out_channels) == (4, 4)
    assert (layers["linear"].in_features, layers["linear"].out_features) == (4, 4)
    assert layers["bilinear"].in2_features == 4
    assert layers["norm"].num_features == 4
    assert layers["layer_norm"].normalized_shape == layers["rms_norm"].normalized_shape == (4,)
    assert layers["group_norm"].num_channels == layers["prelu"].num_parameters == 4
    assert layers["embedding"].embedding_dim == 4


def test_every_layer_that_shares_a_weight_says_its_size():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    groups = groups_of({"0": 4}, ("0.weight", 0, range(4), "out"), ("0.weight", 1, range(4), "in"))
    cut_channels(model, groups, torch.tensor([True, False, True, True]))
    assert first.weight is second.weight
    assert {(m.in_features, m.out_features) for m in (first, second)} == {(3, 3)}


def test_groups_of_another_model_change_nothing():
    model, groups = conv_net()
    model[3] = nn.Conv2d(7, 4, 3)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    message = "groups are of another model: '3.weight' has 6 indices along dimension 1 there and 7"
    with pytest.raises(ValueError, match=message):
        cut_channels(model, groups, KEEP)
    model[3] = nn.Identity()
    with pytest.raises(ValueError, match="'3.weight' has 6 indices .* and None here"):
        cut_channels(model, groups, KEEP)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_choices_that_no_model_could_have():
    model, groups = conv_net()
    before = model[0].weight
    with pytest.raises(ValueError, match="no channel of group '0' would be left of 6"):
        cut_channels(model, groups, torch.tensor([False] * 6 + [True] * 4))
    with pytest.raises(ValueError, match="expected one bool for each of the 10 channels"):
        cut_channels(model, groups, torch.ones(10))
    assert model[0].weight is before
    assert before.shape[0] == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autograd_learns_the_new_shape_while_an_old_graph_lives(dtype):
    model, groups = conv_net(norm=False)
    model.to(dtype)
    images = torch.randn(2, 1, 6, 6, dtype=dtype)
    alive = model(images).sum()
    alive.backward(retain_graph=True)
    cut_channels(model, groups, KEEP)
    values = {n: (p.clone(), p.grad.clone()) for n, p in model.named_parameters()}
    begin_autograd_anew(model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name][0])
        assert torch.equal(parameter.grad, values[name][1])
    model(images).sum().backward()
    assert model[3].weight.grad.shape == model[3].weight.shape == (2, 3, 3, 3)
    assert alive.requires_grad


# --- The optimizer --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: torch.optim.Rprop(p, lr=0.1),
    ],
    ids=["sgd", "adam", "adafactor", "rprop"],
)
def test_state_is_cut_with_its_parameters(kind):
    model, groups = conv_net(bias=True)
    optimizer = kind(model.parameters())
    for _ in range(2):
        model(torch.randn(2, 1, 6, 6)).square().sum().backward()
        optimizer.step()
    named = dict(model.named_parameters())
    shapes = {n: p.shape for n, p in named.items()}
    before = {n: dict(optimizer.state[p]) for n, p in named.items()}
    kept = groups.kept_indices(KEEP)
    cut_channels(model, groups, KEEP)
    cut_optimizer_state(optimizer, named, kept, shapes)
    for name, parameter in named.items():
        for key, value in optimizer.state[parameter].items():
            old = torch.as_tensor(before[name][key])
            if old.dim() == 0:
                assert torch.equal(torch.as_tensor(value), old)
                continue
            indices = {d: i for d, i in kept.get(name, {}).items() if old.shape[d] > 1}
            assert torch.equal(value, take(old, indices)), (name, key)
            assert all(v in (1, s) for v, s in zip(value.shape, parameter.shape, strict=True))
    model(torch.randn(2, 1, 6, 6)).square().sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_parameters_without_state_are_passed_over():
    model, groups = conv_net()
    optimizer = torch.optim.Adam(model[3].parameters())
    named = dict(model.named_parameters())
    shapes = {n: p.shape for n, p in named.items()}
    kept = groups.kept_indices(KEEP)
    cut_channels(model, groups, KEEP)
    cut_optimizer_state(optimizer, named, kept, shapes)
    assert not optimizer.state
