import copy
import io

import pytest
import torch
from torch import nn

from lit_compress.compress.channels.cut import cut_channels
from lit_compress.compress.channels.groups import (
    ChannelAxis,
    ChannelGroup,
    ChannelGroups,
    ChannelWidth,
    LeftAlone,
    take,
)
from lit_compress.compress.channels.tracing import find_channel_groups
from tests.compress.cut_checks import random_keep, tensors_of

GROUPS = ChannelGroups(
    (ChannelGroup("a", 4, 2), ChannelGroup("b", 3)),
    (
        ChannelAxis("a.weight", 0, torch.tensor([0, 1, 2, 3]), "out"),
        ChannelAxis("b.weight", 0, torch.tensor([4, 5, 6]), "out"),
        ChannelAxis("b.weight", 1, torch.tensor([-1, 0, 1, 2, 3]), "in"),
        ChannelAxis("c.weight", 1, torch.tensor([4, 4, 5, 5, 6, 6]), "in"),
    ),
    (LeftAlone("c", "reaches the model's output"),),
    (ChannelWidth("", "width", "b.weight", 0, 3),),
)
KEEP = torch.tensor([True, False, False, True, False, True, True])


def listed(kept):
    return {name: {dim: i.tolist() for dim, i in by_dim.items()} for name, by_dim in kept.items()}


def test_names_and_places():
    assert GROUPS.num_channels == 7
    assert GROUPS["b"] == ChannelGroup("b", 3)
    assert GROUPS.span("b") == slice(4, 7)
    assert [axis.tensor for axis in GROUPS.axes_of("a")] == ["a.weight", "b.weight"]
    with pytest.raises(KeyError, match=r"no group 'c'; there are \['a', 'b'\]"):
        GROUPS["c"]
    assert str(GROUPS) == "2 groups, 7 channels; skipped:\n  c: reaches the model's output"


def test_what_a_choice_leaves():
    assert GROUPS.num_kept(KEEP) == {"a": 2, "b": 2}
    assert listed(GROUPS.kept_indices(KEEP)) == {
        "a.weight": {0: [0, 3]},
        "b.weight": {0: [1, 2], 1: [0, 1, 4]},
        "c.weight": {1: [2, 3, 4, 5]},
    }
    assert GROUPS.kept_indices(torch.ones(7, dtype=torch.bool)) == {}


def test_what_is_left_is_numbered_anew():
    after = GROUPS.after(KEEP)
    assert after.groups == (ChannelGroup("a", 2, 2), ChannelGroup("b", 2))
    assert [axis.channels.tolist() for axis in after.axes] == [
        [0, 1], [2, 3], [-1, 0, 1], [2, 2, 3, 3]
    ]  # fmt: skip
    assert after.left_alone == GROUPS.left_alone
    assert after.widths == GROUPS.widths


def test_two_cuts_are_one():
    first, second = KEEP, torch.tensor([True, True, True, False])
    both = first.clone()
    both[6] = False
    twice = GROUPS.after(first).after(second)
    once = GROUPS.after(both)
    assert twice.groups == once.groups
    for left, right in zip(twice.axes, once.axes, strict=True):
        assert torch.equal(left.channels, right.channels)


def test_sizes():
    assert GROUPS.axis_sizes({"a": 2, "b": 1}) == {
        ("a.weight", 0): 2,
        ("b.weight", 0): 1,
        ("b.weight", 1): 3,
        ("c.weight", 1): 2,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: k[:6], r"shape \(6,\), expected one bool for each of the 7 channels"),
        (lambda k: k.long(), r"keep is torch.int64"),
        (lambda k: k & (torch.arange(7) < 4), "no channel of group 'b' would be left of 3"),
        (lambda k: k | (torch.arange(7) == 1), r"group 'a' has 2 blocks .* would keep \[2, 1\]"),
    ],
)
def test_impossible_choices_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GROUPS.kept_indices(change(KEEP))
    with pytest.raises(ValueError, match=message):
        GROUPS.after(change(KEEP))


def test_the_way_through_a_checkpoint():
    file = io.BytesIO()
    torch.save(GROUPS.state_dict(), file)
    file.seek(0)
    groups = ChannelGroups.from_state_dict(torch.load(file, weights_only=True))
    assert groups.groups == GROUPS.groups
    assert groups.left_alone == GROUPS.left_alone
    assert groups.widths == GROUPS.widths
    for left, right in zip(groups.axes, GROUPS.axes, strict=True):
        assert (left.tensor, left.dim, left.role) == (right.tensor, right.dim, right.role)
        assert torch.equal(left.channels, right.channels)
        assert left.channels.dtype == torch.int64


def test_taking_a_part():
    tensor = torch.arange(24.0).view(2, 3, 4).requires_grad_()
    part = take(tensor, {0: torch.tensor([1]), 2: torch.tensor([0, 3])})
    assert part.tolist() == [[[12.0, 15.0], [16.0, 19.0], [20.0, 23.0]]]
    assert not part.requires_grad
    whole = take(tensor, {})
    assert torch.equal(whole, tensor)
    assert whole.data_ptr() != tensor.data_ptr()


def test_taking_keeps_the_memory_format():
    tensor = torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last)
    part = take(tensor, {0: torch.tensor([0, 2])})
    assert part.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(part, tensor[[0, 2]])
    assert take(torch.rand(4, 3, 2, 2).mT, {1: torch.tensor([1])}).is_contiguous()


# --- Cutting a model by them ----------------------------------------------------------------------


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(2, 8),
        nn.PReLU(8), nn.ConvTranspose2d(8, 6, 2), nn.Flatten(), nn.Linear(6 * 25, 10),
        nn.LayerNorm(10), nn.Linear(10, 2),
    )  # fmt: skip


def found(model):
    return find_channel_groups(model, lambda m: m(torch.rand(2, 3, 8, 8)))


def test_objects_values_and_gradients_of_what_stays():
    model = net()
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    groups = found(model)
    keep = random_keep(groups)
    kept = groups.kept_indices(keep)
    before = {n: (t, t.detach().clone(), t.grad) for n, t in tensors_of(model).items()}
    cut_channels(model, groups, keep)
    for name, tensor in tensors_of(model).items():
        same, values, gradient = before[name]
        assert tensor is same
        assert torch.equal(tensor, take(values, kept.get(name, {})))
        if gradient is not None:
            assert torch.equal(tensor.grad, take(gradient, kept.get(name, {})))
    model(torch.rand(2, 3, 8, 8)).sum().backward()


def test_attributes_follow():
    model = net()
    groups = found(model)
    cut_channels(model, groups, random_keep(groups))
    first, norm, depthwise, group_norm, prelu, up, _, linear, layer_norm, head = model
    assert (first.in_channels, first.out_channels) == (3, 4)
    assert norm.num_features == 4
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (4, 4, 4)
    assert (group_norm.num_channels, prelu.num_parameters) == (4, 4)
    assert (up.in_channels, up.out_channels) == (4, 3)
    assert (linear.in_features, linear.out_features) == (75, 5)
    assert layer_norm.normalized_shape == (5,)
    assert (head.in_features, head.out_features) == (5, 2)
    assert "BatchNorm2d(4, " in repr(model)


def test_groups_of_another_model_are_refused_and_nothing_changes():
    groups = found(net())
    other = nn.Sequential(*net()[:5], nn.ConvTranspose2d(8, 5, 2), *net()[6:])
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"'5.weight' has 6 indices along dimension 1 .* and 5"):
        cut_channels(other, groups, random_keep(groups))
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match=r"along dimension 0 there and None here"):
        cut_channels(nn.Sequential(), groups, random_keep(groups))


def test_the_groups_after_a_cut_are_those_of_the_slim_model():
    model = net()
    groups = found(model)
    after = cut_channels(model, groups, random_keep(groups))
    again = found(model)
    assert after.groups == again.groups
    ours = {(a.tensor, a.dim): a.channels.tolist() for a in after.axes}
    assert ours == {(a.tensor, a.dim): a.channels.tolist() for a in again.axes}
