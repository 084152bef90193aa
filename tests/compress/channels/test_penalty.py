import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_compress.compress.channels.penalty import ChannelPenalty, add_penalty
from tests.compress.channels.hand_made_groups import conv_net

KEEP = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
GONE = {"0": [1, 4], "3": [2]}


@pytest.fixture
def model():
    torch.manual_seed(0)
    network, groups = conv_net(bias=True)
    network(torch.randn(4, 1, 6, 6)).square().sum().backward()
    return network, groups


def pulled(model, groups, **arguments):
    """What the penalty adds to each gradient."""
    named = dict(model.named_parameters())
    before = {n: p.grad.clone() for n, p in named.items()}
    add_penalty(named, groups, KEEP, **arguments)
    return {n: p.grad - before[n] for n, p in named.items()}


@pytest.mark.parametrize("kind", ["l2", "group_lasso"])
def test_it_is_the_gradient_of_the_penalty(model, kind):
    network, groups = model
    added = pulled(network, groups, strength=0.3, kind=kind)
    total = 0.0
    for layer, gone in (("0", GONE["0"]), ("1", GONE["0"]), ("3", GONE["3"])):
        for parameter in network.get_submodule(layer).parameters():
            rows = parameter[gone].flatten(1) if parameter.dim() > 1 else parameter[gone][:, None]
            # The square root of zero has no gradient; the pull on zero is zero.
            norms = (rows.square().sum(1) + 1e-30).sqrt()
            total = total + (rows.square().sum() / 2 if kind == "l2" else norms.sum())
    network.zero_grad()
    (0.3 * total).backward()
    for name, parameter in network.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(added[name], expected, atol=1e-4, rtol=1e-3)


def test_only_the_channels_that_go_are_pulled(model):
    added = pulled(*model, strength=1.0)
    for name, layer in (("0.weight", "0"), ("1.weight", "0"), ("3.weight", "3")):
        moved = added[name].flatten(1) if added[name].dim() > 1 else added[name][:, None]
        assert moved.abs().sum(1).nonzero().flatten().tolist() == GONE[layer]
    assert not added["6.weight"].any()
    assert not added["6.bias"].any()


def test_nothing_is_pulled_where_nothing_goes_or_nothing_is_trained(model):
    network, groups = model
    named = dict(network.named_parameters())
    before = {n: p.grad.clone() for n, p in named.items()}
    add_penalty(named, groups, torch.ones(10, dtype=torch.bool), 1.0)
    add_penalty({}, groups, KEEP, 1.0)
    assert all(torch.equal(before[n], p.grad) for n, p in named.items())
    network.zero_grad()
    add_penalty(named, groups, KEEP, 1.0)
    assert all(p.grad is None for p in network.parameters())


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.floats(1e-3, 10))
def test_the_pull_grows_from_nothing_to_its_strength(now, begin, length, strength):
    penalty, cut = ChannelPenalty(strength), begin + length
    value = penalty.strength_at(now, begin, cut)
    assert 0 <= value <= strength
    assert value <= penalty.strength_at(now + 1, begin, cut)
    if now <= begin:
        assert value == 0
    if now >= cut and now > begin:
        assert value == strength


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0}, "strength is 0, expected a positive number"),
        ({"strength": float("nan")}, "strength is nan, expected a positive number"),
        ({"strength": "1"}, "strength is '1', expected a positive number"),
        ({"strength": 1.0, "kind": "l1"}, "kind is 'l1', expected 'l2' or 'group_lasso'"),
        ({"strength": 1.0, "begin": -1}, "begin is -1, expected a number of steps of at least 0"),
        ({"strength": 1.0, "begin": 2.0}, "For step 2 write begin=2"),
    ],
    ids=str,
)
def test_what_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChannelPenalty(**arguments)
