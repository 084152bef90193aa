import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.compress.channels.importance import (
    ACTIVATION_STATISTICS,
    IMPORTANCES,
    channel_importance,
)
from lit_compress.compress.channels.statistics import (
    first_order,
    measure_activations,
    measure_taylor,
)
from tests.compress.channels.hand_made_groups import conv_net, groups_of

WEIGHT_KINDS = ["l1", "l2", "lamp"]
UNMEASURED = [k for k in IMPORTANCES if k != "taylor" and k not in ACTIVATION_STATISTICS]


def forward(model, batch):
    return model(batch)


def linear_pair(rows):
    """A linear layer with these weights whose outputs another one reads."""
    model = nn.Sequential(nn.Linear(len(rows[0]), len(rows)), nn.ReLU(), nn.Linear(len(rows), 2))
    model[0].weight.data = torch.tensor(rows)
    channels = range(len(rows))
    groups = groups_of(
        {"0": len(rows)},
        ("0.weight", 0, channels, "out"),
        ("0.bias", 0, channels, "out"),
        ("2.weight", 1, channels, "in"),
    )
    return model, groups


# --- Weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("l1", [7.0, 0.0, 1.0]),
        ("l2", [5.0, 0.0, 1.0]),
        ("lamp", [1.0, 0.0, 1 / 26]),
        ("fpgm", [5 + math.hypot(3, 5), 5 + 1, math.hypot(3, 5) + 1]),
    ],
)
def test_scores_by_hand(kind, expected):
    model, groups = linear_pair([[3.0, 4.0], [0.0, 0.0], [0.0, -1.0]])
    scores = channel_importance(model, groups, kind, normalize="none")
    torch.testing.assert_close(scores, torch.tensor(expected))


def test_a_group_score_counts_what_reads_the_channel():
    model, groups = linear_pair([[3.0, 4.0], [0.0, 0.0], [0.0, -1.0]])
    model[2].weight.data = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    scores = channel_importance(model, groups, "group", normalize="none")
    torch.testing.assert_close(scores, torch.tensor([13.0, 0.5, 2.5]))


def test_normalization_by_hand():
    model, groups = linear_pair([[3.0, 4.0], [0.0, 0.0], [0.0, -1.0]])
    by_mean = channel_importance(model, groups, "l2", normalize="mean")
    by_max = channel_importance(model, groups, "l2", normalize="max")
    torch.testing.assert_close(by_mean, torch.tensor([2.5, 0.0, 0.5]))
    torch.testing.assert_close(by_max, torch.tensor([1.0, 0.0, 0.2]))
    assert torch.equal(channel_importance(model, groups, "l2"), by_mean)


def test_coupled_layers_count_alike_whatever_their_scale():
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(1, 2))
    model[0].weight.data = torch.tensor([[1.0], [3.0]])
    model[1].weight.data = torch.tensor([[300.0], [100.0]])
    groups = groups_of({"sum": 2}, ("0.weight", 0, [0, 1], "out"), ("1.weight", 0, [0, 1], "out"))
    # Relative scores (.5, 1.5) and (1.5, .5) average to 1; the layers' means are 2 and 200.
    scores = channel_importance(model, groups, "l1", normalize="none")
    torch.testing.assert_close(scores, torch.tensor([101.0, 101.0]))


def test_depthwise_weights_count_and_norms_and_biases_do_not():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, groups=2))
    model[0].weight.data = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    model[1].weight.data = torch.tensor([100.0, 1.0])
    model[2].weight.data = torch.tensor([3.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 3, 3) / 9
    names = ["1.weight", "1.bias", "1.running_mean", "2.weight", "2.bias"]
    groups = groups_of(
        {"0": 2},
        ("0.weight", 0, [0, 1], "out"),
        ("0.bias", 0, [0, 1], "out"),
        *[(name, 0, [0, 1], "scale") for name in names],
    )
    scores = channel_importance(model, groups, "l1", normalize="none")
    torch.testing.assert_close(scores, torch.tensor([2.0, 2.0]))


def test_one_axis_may_serve_several_groups_and_none():
    """Outputs are split: indices 0, 1 and 4 to one group, 2 and 3 to another, 5 to none."""
    model = nn.Sequential(nn.Linear(1, 6, bias=False))
    model[0].weight.data = torch.tensor([[1.0], [2.0], [10.0], [30.0], [3.0], [99.0]])
    groups = groups_of({"a": 3, "b": 2}, ("0.weight", 0, [0, 1, 3, 4, 2, -1], "out"))
    scores = channel_importance(model, groups, "l1", normalize="mean")
    torch.testing.assert_close(scores, torch.tensor([0.5, 1.0, 1.5, 0.5, 1.5]))
    # LAMP and the geometric median look only at the channel's own group.
    lamp = channel_importance(model, groups, "lamp")
    torch.testing.assert_close(lamp, torch.tensor([1 / 14, 4 / 13, 1.0, 0.1, 1.0]))
    fpgm = channel_importance(model, groups, "fpgm", normalize="none")
    torch.testing.assert_close(fpgm, torch.tensor([3.0, 2.0, 3.0, 20.0, 20.0]))


def test_channels_that_hold_several_indices():
    """Indices i and i + 2 belong to channel i, as behind a flatten."""
    model = nn.Sequential(nn.Linear(1, 4, bias=False))
    model[0].weight.data = torch.tensor([[3.0], [1.0], [4.0], [1.0]])
    groups = groups_of({"0": 2}, ("0.weight", 0, [0, 1, 0, 1], "out"))
    l1, l2, fpgm = (
        channel_importance(model, groups, kind, normalize="none") for kind in ("l1", "l2", "fpgm")
    )
    torch.testing.assert_close(l1, torch.tensor([7.0, 2.0]))
    torch.testing.assert_close(l2, torch.tensor([5.0, math.sqrt(2)]))
    torch.testing.assert_close(fpgm, torch.full((2,), math.hypot(2, 3)))


def test_transposed_convolutions_make_channels_along_dimension_1():
    model = nn.Sequential(nn.ConvTranspose2d(3, 2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 0.0], [2.0, 5.0], [2.0, 0.0]]).view(3, 2, 1, 1)
    groups = groups_of({"0": 2}, ("0.weight", 1, [0, 1], "out"))
    scores = channel_importance(model, groups, "l2", normalize="none")
    torch.testing.assert_close(scores, torch.tensor([3.0, 5.0]))


def test_bn_scale_is_gamma_and_falls_back_to_l2():
    model, groups = conv_net()
    model[1].weight.data = torch.tensor([-3.0, 1.0, 2.0, 0.0, 0.5, 0.25])
    scores = channel_importance(model, groups, "bn_scale", normalize="none")
    torch.testing.assert_close(scores[:6], model[1].weight.detach().abs())
    torch.testing.assert_close(scores[6:], model[3].weight.detach().flatten(1).norm(dim=1))


@pytest.mark.parametrize("kind", UNMEASURED)
def test_groups_with_only_scales_or_nothing_do_not_crash(kind):
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].weight.data = torch.tensor([1.0, 2.0, 3.0])
    groups = groups_of({"norm": 3, "nothing": 2}, ("0.weight", 0, [0, 1, 2], "scale"))
    scores = channel_importance(model, groups, kind)
    assert torch.isfinite(scores).all()
    if kind in ("l1", "l2", "bn_scale"):
        torch.testing.assert_close(scores, torch.tensor([0.5, 1.0, 1.5, 1.0, 1.0]))


@pytest.mark.parametrize("kind", ["l1", "l2", "lamp", "bn_scale", "fpgm"])
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_default_scores_do_not_depend_on_the_scale_of_a_layer(kind, factor, seed):
    torch.manual_seed(seed)
    model, groups = conv_net()
    model[1].weight.data.uniform_(0.1, 1.0)
    before = channel_importance(model, groups, kind)
    for parameter in model[0].weight, model[1].weight:
        parameter.data *= factor
    torch.testing.assert_close(
        channel_importance(model, groups, kind), before, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@given(seed=st.integers(0, 999), channel=st.integers(0, 9))
@settings(deadline=None, max_examples=15)
def test_a_channel_without_weights_scores_lowest(kind, seed, channel):
    torch.manual_seed(seed)
    model, groups = conv_net()
    layer, index, span = (
        (0, channel, slice(0, 6)) if channel < 6 else (3, channel - 6, slice(6, 10))
    )
    model[layer].weight.data[index] = 0.0
    scores = channel_importance(model, groups, kind)
    assert scores[channel] == 0.0
    assert (scores[span] > 0).sum() == span.stop - span.start - 1


@given(st.lists(st.just(0.0) | st.floats(0.125, 10.0, width=32), min_size=1, max_size=12))
@settings(deadline=None, max_examples=50)
def test_lamp_is_its_definition_and_keeps_the_order(norms):
    model = nn.Sequential(nn.Linear(1, len(norms), bias=False))
    model[0].weight.data = torch.tensor(norms).unsqueeze(1)
    groups = groups_of({"0": len(norms)}, ("0.weight", 0, range(len(norms)), "out"))
    scores = channel_importance(model, groups, "lamp").tolist()
    for norm, score in zip(norms, scores, strict=True):
        rest = sum(float(other) ** 2 for other in norms if other >= norm)
        assert score == pytest.approx(norm**2 / rest if norm**2 > 0 else 0.0, rel=1e-4, abs=1e-6)
    assert scores[norms.index(max(norms))] == max(scores)


def test_random_is_fixed_by_its_seed():
    model, groups = conv_net()
    scores = channel_importance(model, groups, "random", seed=1)
    assert torch.equal(scores, channel_importance(model, groups, "random", seed=1))
    assert not torch.equal(scores, channel_importance(model, groups, "random", seed=2))
    assert scores.min() >= 0
    assert scores.max() < 1


def test_a_function_may_score():
    model, groups = conv_net()
    scores = channel_importance(model, groups, lambda m, g: torch.arange(g.num_channels))
    assert torch.equal(scores, torch.arange(10.0))


@pytest.mark.parametrize("kind", UNMEASURED)
def test_scores_are_float32_one_a_channel_and_leave_the_model_alone(kind):
    model, groups = conv_net()
    model.to(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scores = channel_importance(model, groups, kind)
    assert scores.dtype == torch.float32
    assert scores.shape == (10,)
    assert not scores.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- Gradients ------------------------------------------------------------------------------------


def test_first_order_by_hand():
    model, groups = linear_pair([[3.0, 4.0], [1.0, 1.0]])
    model[0].bias.data = torch.tensor([2.0, -1.0])
    gradients = {
        "0.weight": torch.tensor([[1.0, -1.0], [0.5, 0.0]]),
        "0.bias": torch.tensor([1.0, 3.0]),
        "2.weight": torch.full((2, 2), 100.0),  # read, not made: does not count
    }
    total = first_order(model, groups, gradients)
    torch.testing.assert_close(total, torch.tensor([3.0 - 4.0 + 2.0, 0.5 - 3.0]))
    torch.testing.assert_close(first_order(model, groups, {}), torch.zeros(2))


def test_taylor_is_the_loss_change_of_a_linear_model_and_touches_nothing():
    """Where the loss is linear in the channel, first order is exact: compare with removing it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    model[0].weight.requires_grad_(False)  # a frozen layer counts too
    channels = range(4)
    groups = groups_of(
        {"0": 4},
        ("0.weight", 0, channels, "out"),
        ("0.bias", 0, channels, "out"),
        ("2.weight", 1, channels, "in"),
    )
    batches = [torch.randn(5, 3), torch.randn(5, 3)]
    scores = measure_taylor(model, groups, batches, lambda batch: model(batch).mean())
    expected = torch.zeros(4)
    for batch in batches:
        hidden = model[0](batch).detach()
        expected += (hidden * model[2].weight.detach()[0]).mean(0).square() / 2
    torch.testing.assert_close(scores, expected)
    assert model.training
    assert model[1].training
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(channel_importance(model, groups, "taylor", measured=scores), scores)


def test_taylor_of_a_channel_that_makes_nothing_is_lowest():
    torch.manual_seed(0)
    model, groups = conv_net()
    model[0].weight.data[2] = model[1].bias.data[2] = 0.0
    batch = torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    scores = measure_taylor(
        model, groups, [batch], lambda b: nn.functional.cross_entropy(model(b[0]), b[1])
    )
    others = torch.arange(6) != 2
    assert scores[2] == 0.0
    assert (scores[:6][others] > 0).all()


# --- Activations ----------------------------------------------------------------------------------


def test_activations_by_hand():
    model, groups = linear_pair([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    model[0].bias.data.zero_()
    batches = [torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[-2.0, -1.0]])]
    nonzero = measure_activations(model, groups, batches, forward, "nonzero")
    magnitude = measure_activations(model, groups, batches, forward, "magnitude")
    torch.testing.assert_close(nonzero, torch.tensor([2 / 3, 1 / 3, 1 / 3]))
    torch.testing.assert_close(magnitude, torch.tensor([4 / 3, 2 / 3, 2 / 3]))
    scores = channel_importance(model, groups, "apoz", measured=nonzero, normalize="none")
    assert torch.equal(scores, nonzero)


def test_contributions_by_hand():
    model, groups = linear_pair([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    model[0].bias.data.zero_()
    model[2].weight.data = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    batches = [torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[-2.0, -1.0]])]
    shares = measure_activations(model, groups, batches, forward, "contribution")
    # variances 14/9, 8/9, 8/9 times the squared weights 1, 1, 4 that read them
    torch.testing.assert_close(shares, torch.tensor([14 / 54, 8 / 54, 32 / 54]))


def test_a_constant_channel_contributes_nothing():
    model, groups = conv_net()
    model[1].weight.data[2] = 0.0
    model[1].bias.data[2] = 5.0
    model.eval()
    shares = measure_activations(model, groups, [torch.rand(4, 1, 6, 6)], forward, "contribution")
    assert shares[2] == pytest.approx(0.0, abs=1e-6)
    assert (shares >= 0).all()


def test_a_dead_channel_has_the_lowest_apoz_and_positions_of_a_flatten_are_averaged():
    torch.manual_seed(0)
    model, groups = conv_net()
    model[1].bias.data[3] = -100.0
    model[3].weight.data[1] = 0.0
    model[3].weight.data[2] = 1.0
    images = torch.rand(4, 1, 6, 6)
    nonzero = measure_activations(model, groups, [images], forward, "nonzero")
    assert nonzero[3] == 0.0
    assert nonzero[7] == 0.0
    assert nonzero[8] > 0.9
    assert ((nonzero >= 0) & (nonzero <= 1)).all()
    model.eval()
    seen = (model[:5](images) != 0).float().mean((0, 2, 3))
    torch.testing.assert_close(nonzero[6:], seen)


def test_several_readers_of_a_concatenation_are_averaged():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
            self.both, self.only_a = nn.Linear(2, 1), nn.Linear(1, 1)
            self.a.weight.data.fill_(2.0)
            self.b.weight.data.fill_(3.0)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            return self.both(torch.cat([b, a], 1)) + self.only_a(10 * a)

    groups = groups_of(
        {"a": 1, "b": 1},
        ("a.weight", 0, [0], "out"),
        ("b.weight", 0, [1], "out"),
        ("both.weight", 1, [1, 0], "in"),
        ("only_a.weight", 1, [0], "in"),
    )
    magnitude = measure_activations(Net(), groups, [torch.ones(2, 1)], forward, "magnitude")
    torch.testing.assert_close(magnitude, torch.tensor([(2.0 + 20.0) / 2, 3.0]))


def test_a_transposed_convolution_reads_along_dimension_0():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ConvTranspose2d(2, 1, 2))
    model[0].weight.data = torch.tensor([1.0, -4.0]).view(2, 1, 1, 1)
    groups = groups_of({"0": 2}, ("0.weight", 0, [0, 1], "out"), ("1.weight", 0, [0, 1], "in"))
    images = torch.ones(1, 1, 2, 2)
    magnitude = measure_activations(model, groups, [images], forward, "magnitude")
    torch.testing.assert_close(magnitude, torch.tensor([1.0, 4.0]))
    unbatched = measure_activations(model, groups, [images[0]], forward, "magnitude")
    torch.testing.assert_close(unbatched, magnitude)


def test_attention_reads_along_the_last_dimension():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(1, 4, bias=False)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.embed.weight.data = torch.tensor([[1.0], [0.0], [2.0], [3.0]])

        def forward(self, x):
            x = self.embed(x)
            return self.attention(query=x, key=x, value=x)[0]

    groups = groups_of(
        {"embed": 4},
        ("embed.weight", 0, range(4), "out"),
        ("attention.in_proj_weight", 1, range(4), "in"),
    )
    magnitude = measure_activations(Net(), groups, [torch.ones(2, 3, 1)], forward, "magnitude")
    torch.testing.assert_close(magnitude, torch.tensor([1.0, 0.0, 2.0, 3.0]))


def test_groups_that_no_layer_reads_are_scored_by_l2():
    model, _ = linear_pair([[3.0, 4.0], [0.0, 1.0]])
    groups = groups_of({"0": 2}, ("0.weight", 0, [0, 1], "out"))
    nonzero = measure_activations(model, groups, [torch.ones(1, 2)], forward, "nonzero")
    assert nonzero.isnan().all()
    scores = channel_importance(model, groups, "apoz", measured=nonzero, normalize="none")
    torch.testing.assert_close(scores, torch.tensor([5.0, 1.0]))


def test_hooks_and_modes_are_put_back_when_a_batch_fails():
    model, groups = conv_net()
    model[1].eval()
    with pytest.raises(RuntimeError):
        measure_activations(model, groups, [torch.rand(1, 5, 6, 6)], forward, "nonzero")
    assert [m.training for m in (model, model[0], model[1])] == [True, True, False]
    assert all(not m._forward_pre_hooks for m in model.modules())


# --- Refusals -------------------------------------------------------------------------------------


def test_unknown_kinds_and_normalizations_are_refused():
    model, groups = conv_net()
    with pytest.raises(ValueError, match=r"importance is 'l3', expected a function or one of l1"):
        channel_importance(model, groups, "l3")
    with pytest.raises(ValueError, match=r"normalize is 'sum', expected 'none'"):
        channel_importance(model, groups, "l1", normalize="sum")
    with pytest.raises(ValueError, match=r"statistic is 'max', expected one of nonzero"):
        measure_activations(model, groups, [], forward, "max")


def test_what_was_measured_must_fit():
    model, groups = conv_net()
    with pytest.raises(ValueError, match=r"'taylor' needs calibration batches.*measure_taylor"):
        channel_importance(model, groups, "taylor")
    with pytest.raises(ValueError, match=r"'apoz' needs calibration batches.*measure_activations"):
        channel_importance(model, groups, "apoz")
    with pytest.raises(ValueError, match=r"'l1' needs no calibration batches; leave measured out"):
        channel_importance(model, groups, "l1", measured=torch.zeros(10))
    with pytest.raises(ValueError, match=r"measured has shape \(9,\), expected.* 10 channels"):
        channel_importance(model, groups, "apoz", measured=torch.zeros(9))


@pytest.mark.parametrize("kind", [k for k in UNMEASURED if k != "random"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(kind, value):
    model, groups = conv_net()
    model[3].weight.data[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"'3.weight' holds NaN or infinity.*cannot be ranked"):
        channel_importance(model, groups, kind)


def test_groups_of_another_model_are_refused():
    model, _ = conv_net()
    missing = groups_of({"9": 6}, ("9.weight", 0, range(6), "out"))
    with pytest.raises(ValueError, match=r"the groups hold '9.weight', which Sequential does not"):
        channel_importance(model, missing)
    other = groups_of({"0": 5}, ("0.weight", 0, range(5), "out"))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(6, 1, 3, 3\).* expect 5 indices"):
        channel_importance(model, other)


def test_functions_must_give_one_finite_score_a_channel():
    model, groups = conv_net()
    with pytest.raises(ValueError, match=r"gave \(3,\), expected a tensor with one score for each"):
        channel_importance(model, groups, lambda m, g: torch.zeros(3))
    with pytest.raises(ValueError, match=r"gave scores that hold NaN or infinity"):
        channel_importance(model, groups, lambda m, g: torch.full((10,), torch.nan))


def test_bad_calibration_is_refused():
    model, groups = conv_net()
    with pytest.raises(ValueError, match="batches is empty"):
        measure_activations(model, groups, [], forward, "nonzero")
    with pytest.raises(ValueError, match="batches is empty"):
        measure_taylor(model, groups, [], lambda batch: model(batch).sum())
    bad = torch.full((1, 1, 6, 6), torch.nan)
    with pytest.raises(ValueError, match=r"the input of '3' holds NaN or infinity"):
        measure_activations(model, groups, [bad], forward, "nonzero")
    with pytest.raises(ValueError, match=r"loss_fn gave no scalar tensor.*but float"):
        measure_taylor(model, groups, [torch.rand(1, 1, 6, 6)], lambda b: model(b).sum().item())
    with pytest.raises(ValueError, match=r"the gradient of '0.weight' holds NaN or infinity"):
        first_order(model, groups, {"0.weight": torch.full((6, 1, 3, 3), torch.nan)})
