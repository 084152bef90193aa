"""Networks written in many ways: what is found can be cut, and what cannot be is skipped."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_compress.compress.channels.cut import cut_channels
from tests.compress.cut_checks import groups_when_cut, random_keep


class Net(nn.Module):
    """A network from its layers and a function of them and the input."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def images(channels=3, pixels=6):
    return torch.rand(2, channels, pixels, pixels)


def conv(inputs, outputs, **kwargs):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **kwargs)


def widths(groups):
    return {group.name: group.num_channels for group in groups.groups}


def blocks(groups):
    return {group.name: group.num_blocks for group in groups.groups}


def left(groups):
    return {layer.layer: layer.reason for layer in groups.left_alone}


# --- Convolutions ---------------------------------------------------------------------------------


def test_a_chain():
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 4))
    groups = groups_when_cut(net, images())
    assert widths(groups) == {"0": 8, "3": 6}
    assert left(groups) == {"5": "reaches the model's output"}


def test_a_residual_sum_ties_its_operands():
    def forward(net, x):
        x = net.stem(x)
        x = F.relu(x + net.b(F.relu(net.a(x))))
        return net.head(x)

    net = Net(forward, stem=conv(3, 8), a=conv(8, 6), b=conv(6, 8), head=conv(8, 2))
    assert widths(groups_when_cut(net, images())) == {"stem": 8, "a": 6}


@pytest.mark.parametrize("add", ["+=", "add_", "out"])
def test_sums_in_place(add):
    def forward(net, x):
        x, y = net.a(x), net.b(x)
        if add == "+=":
            x += y
        elif add == "add_":
            x.add_(y)
        else:
            x = torch.add(x, y, out=x)
        return net.head(F.relu(x, inplace=True))

    net = Net(forward, a=conv(3, 8), b=conv(3, 8), head=conv(8, 2))
    if add == "out":  # which autograd does not take
        net.requires_grad_(False)
    assert widths(groups_when_cut(net, images())) == {"a": 8}


def test_a_concatenation_keeps_its_parts_apart():
    def forward(net, x):
        return net.head(torch.cat([net.a(x), x, F.relu(net.b(x))], 1))

    net = Net(forward, a=conv(3, 4), b=conv(3, 6), head=conv(13, 2))
    groups = groups_when_cut(net, images())
    assert widths(groups) == {"a": 4, "b": 6}
    axis = next(axis for axis in groups.axes if axis.tensor == "head.weight")
    assert axis.channels.tolist() == [0, 1, 2, 3, -1, -1, -1, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("multiplier", [1, 3])
def test_a_depthwise_convolution_follows_its_input(multiplier):
    net = nn.Sequential(
        conv(3, 4), conv(4, 4 * multiplier, groups=4), nn.BatchNorm2d(4 * multiplier),
        conv(4 * multiplier, 2),
    )  # fmt: skip
    assert widths(groups_when_cut(net, images())) == {"0": 4}


@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_transposed_depthwise_convolution_follows_its_input(multiplier):
    up = nn.ConvTranspose2d(4, 4 * multiplier, 2, stride=2, groups=4)
    net = nn.Sequential(conv(3, 4), up, conv(4 * multiplier, 2))
    assert widths(groups_when_cut(net, images())) == {"0": 4}
    assert left(groups_when_cut(net, images())) == {"2": "reaches the model's output"}


def test_a_grouped_convolution_makes_blocks():
    net = nn.Sequential(conv(3, 8), conv(8, 12, groups=2), conv(12, 2))
    groups = groups_when_cut(net, images())
    assert blocks(groups) == {"0": 1, "1": 2}
    assert widths(groups) == {"0": 4, "1": 12}  # the same of both halves are read by one filter


@pytest.mark.parametrize("num_groups", [1, 2])
def test_transposed_convolutions(num_groups):
    up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=num_groups)
    net = nn.Sequential(conv(3, 8), up, nn.ReLU(), conv(12, 2))
    assert list(widths(groups_when_cut(net, images()))) == ["0", "1"]


def test_one_dimension_and_three():
    net = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.MaxPool1d(2), nn.Conv1d(8, 6, 3),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip
    assert widths(groups_when_cut(net, torch.rand(2, 3, 16))) == {"0": 8, "3": 6}
    net = nn.Sequential(
        nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.MaxPool3d(2), nn.Conv3d(8, 6, 1),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip
    assert widths(groups_when_cut(net, torch.rand(2, 3, 6, 6, 6))) == {"0": 8, "3": 6}


def test_flattened_pixels_belong_to_their_channel():
    net = nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 8), nn.Linear(8, 2))
    groups = groups_when_cut(net, images())
    axis = next(axis for axis in groups.axes if axis.tensor == "3.weight" and axis.dim == 1)
    assert axis.channels.tolist() == [c for c in range(4) for _ in range(36)]


def test_a_channel_shuffle():
    def forward(net, x):
        x = net.a(x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return net.b(x)

    groups = groups_when_cut(Net(forward, a=conv(3, 8), b=conv(8, 2)), images())
    assert widths(groups) == {"a": 4}  # of both halves the same


def test_a_padded_shortcut_only_frees_the_channels_in_the_middle():
    def forward(net, x):
        x = net.stem(x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return net.head(F.relu(shortcut + net.a(x)))

    net = Net(forward, stem=conv(3, 8), a=conv(8, 12, stride=2), head=conv(12, 2))
    groups = groups_when_cut(net, images())
    assert widths(groups) == {"stem": 8}
    axis = next(axis for axis in groups.axes if axis.tensor == "a.weight" and axis.dim == 0)
    assert axis.channels.tolist() == [-1, -1, *range(8), -1, -1]


def test_upsampling_and_pooling():
    def forward(net, x):
        x = net.a(x)
        x = F.interpolate(F.max_pool2d(x, 2), scale_factor=2) + F.avg_pool2d(x, 3, 1, 1)
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return net.b(F.interpolate(x, scale_factor=2, mode="bilinear"))

    assert widths(groups_when_cut(Net(forward, a=conv(3, 8), b=conv(8, 2)), images())) == {"a": 8}


# --- Norms, gates, noise --------------------------------------------------------------------------


def test_a_group_norm_makes_blocks():
    net = nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), nn.ReLU(), conv(8, 2))
    groups = groups_when_cut(net, images(), leave=["0"])
    assert blocks(groups) == {"0": 4}
    keep = torch.ones(8, dtype=torch.bool)
    keep[:2] = False
    with pytest.raises(ValueError, match="4 blocks that must keep the same number"):
        groups.check(keep)


@pytest.mark.parametrize("affine", [False, True])
def test_an_instance_norm_follows(affine):
    net = nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=affine), nn.ReLU(), conv(8, 2))
    assert widths(groups_when_cut(net, images())) == {"0": 8}


def test_a_layer_norm_follows():
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
    assert widths(groups_when_cut(net, torch.rand(2, 4), leave=["0"])) == {"0": 8}
    net = nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8), nn.PReLU(8), nn.Linear(8, 2))
    groups = groups_when_cut(net, torch.rand(2, 4), leave=["0"])
    assert {"1.weight", "2.weight"} <= {axis.tensor for axis in groups.axes}


def test_squeeze_and_excitation():
    def forward(net, x):
        x = net.stem(x)
        gate = net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return net.head(x * gate).mean((2, 3))

    net = Net(
        forward, stem=conv(3, 8), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1), head=conv(8, 2)
    )
    assert widths(groups_when_cut(net, images())) == {"stem": 8, "down": 4}


@pytest.mark.parametrize("dropout", [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout()])
def test_noise_in_training_mode(dropout):
    net = nn.Sequential(conv(3, 8), dropout, conv(8, 2))
    assert widths(groups_when_cut(net, images())) == {"0": 8}


@pytest.mark.parametrize("gate", ["glu", "chunk", "split"])
def test_gated_halves_lose_the_same(gate):
    def forward(net, x):
        x = net.a(x)
        if gate == "glu":
            x = F.glu(x, 1)
        else:
            a, b = x.chunk(2, 1) if gate == "chunk" else x.split(x.shape[1] // 2, 1)
            x = a * b.sigmoid()
        return net.b(x)

    groups = groups_when_cut(Net(forward, a=conv(3, 16), b=conv(8, 2)), images())
    assert widths(groups) == {"a": 8}
    axis = next(axis for axis in groups.axes if axis.tensor == "a.weight")
    assert axis.channels.tolist() == [*range(8), *range(8)]


def test_halves_that_go_different_ways_are_blocks():
    def forward(net, x):
        a, b = net.a(x).chunk(2, 1)
        return net.b(a) + net.c(b)

    net = Net(forward, a=conv(3, 16), b=conv(8, 2), c=conv(8, 2))
    assert blocks(groups_when_cut(net, images())) == {"a": 2}


def test_maximum_and_mean_over_channels_as_a_spatial_gate():
    def forward(net, x):
        x = net.a(x).relu()
        gate = net.gate(torch.cat([x.amax(1, True), x.sum(1, True)], 1)).sigmoid()
        return net.b(x * gate)

    net = Net(forward, a=conv(3, 8), gate=conv(2, 1), b=conv(8, 2))
    assert widths(groups_when_cut(net, images())) == {"a": 8}


# --- Weights without their module -----------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change
        self.first = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.second = nn.Parameter(torch.randn(2, 8))

    def forward(self, x):
        x = F.conv2d(x, self.change(self.first)) * self.scale
        return F.linear(x.mean((2, 3)), self.second)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w,
        lambda w: 2 * w.contiguous().view_as(w),
        lambda w: w - w.mean((1, 2, 3), keepdim=True),
        lambda w: w / (w.norm(2, (1, 2, 3), keepdim=True) + 1e-5),
        lambda w: torch.cat([w[:4], w[4:]]),
    ],
    ids=["plain", "scaled", "centred", "normalised", "in pieces"],
)
def test_weights_used_as_functions_arguments(change):
    net = Functional(change)
    groups = groups_when_cut(net, images())
    assert widths(groups) in ({"first": 8}, {"(root)": 8}, {})
    if not groups.groups:
        assert "taken by number" in left(groups)["first"]
    else:
        assert {axis.tensor for axis in groups.axes} == {"first", "scale", "second"}


def test_a_parametrized_weight():
    net = nn.Sequential(conv(3, 8), conv(8, 6), nn.Conv2d(6, 2, 1))
    nn.utils.parametrizations.weight_norm(net[1])
    # Without channels that it reads, what is normalised is another weight: "0" is left out.
    groups = groups_when_cut(net, images(), leave=["0", "1.parametrizations.weight"])
    assert sorted(widths(groups).values()) == [6, 8]
    slim = copy.deepcopy(net)
    cut_channels(slim, groups, random_keep(groups))
    assert slim[1].weight.shape == (3, 4, 3, 3)
    assert (slim[1].out_channels, slim[1].in_channels) == (3, 4)


def test_a_module_that_is_used_twice():
    def forward(net, x):
        x = net.stem(x)
        return net.head(net.same(F.relu(net.same(x))))

    net = Net(forward, stem=conv(3, 8), same=conv(8, 8), head=conv(8, 2))
    assert widths(groups_when_cut(net, images())) == {"stem": 8}


def test_frozen_weights_are_cut_too():
    net = nn.Sequential(conv(3, 8).requires_grad_(False), nn.ReLU(), conv(8, 2))
    assert widths(groups_when_cut(net, images())) == {"0": 8}


def test_an_embedding_whose_weight_makes_the_output():
    def forward(net, tokens):
        return F.linear(net.mix(net.embedding(tokens)), net.embedding.weight)

    net = Net(forward, embedding=nn.Embedding(11, 8), mix=nn.Linear(8, 8))
    groups = groups_when_cut(net, torch.arange(10).view(2, 5))
    assert widths(groups) == {"embedding": 8}


def test_a_buffer_along_the_channels_is_cut():
    net = Net(lambda n, x: n.b(n.a(x) * n.scale), a=conv(3, 8), b=conv(8, 2))
    net.register_buffer("scale", torch.rand(8, 1, 1))
    assert "scale" in {axis.tensor for axis in groups_when_cut(net, images()).axes}


def test_a_learned_token_is_cut():
    def forward(net, x):
        token = net.token.expand(len(x), -1, -1)
        return net.head(torch.cat([token, net.stem(x)], 1)[:, 0])

    net = Net(forward, stem=nn.Linear(4, 8), head=nn.Linear(8, 2))
    net.token = nn.Parameter(torch.rand(1, 1, 8))
    net.register_buffer("unused", torch.rand(8))
    groups = groups_when_cut(net, torch.rand(2, 3, 4))
    assert {axis.tensor for axis in groups.axes if axis.role == "scale"} == {"token"}


# --- Products and attention -----------------------------------------------------------------------


def projections(width=8, inner=12, **more):
    names = ("q", "k", "v")
    return {name: nn.Linear(width, inner) for name in names} | {"o": nn.Linear(inner, 4)} | more


@pytest.mark.parametrize("how", ["matmul", "einsum", "bmm", "sdpa"])
def test_attention_without_heads(how):
    def forward(net, x):
        q, k, v = net.q(x), net.k(x), net.v(x)
        if how == "sdpa":
            return net.o(F.scaled_dot_product_attention(q, k, v, scale=1.0))
        if how == "einsum":
            return net.o(torch.einsum("bts,bsd->btd", torch.einsum("btd,bsd->bts", q, k), v))
        if how == "bmm":
            return net.o(torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v))
        return net.o((q @ k.mT).softmax(-1) @ v)

    groups = groups_when_cut(Net(forward, **projections()), torch.rand(2, 5, 8))
    if how != "sdpa":
        assert widths(groups) == {"q": 12, "v": 12}


@pytest.mark.parametrize("how", ["matmul", "sdpa"])
def test_heads_are_balanced(how):
    def forward(net, x):
        q, k, v = (p(x).unflatten(-1, (3, -1)).transpose(1, 2) for p in (net.q, net.k, net.v))
        if how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:
            y = (q @ k.mT).softmax(-1) @ v
        return net.o(y.transpose(1, 2).flatten(2))

    groups = groups_when_cut(Net(forward, **projections()), torch.rand(2, 5, 8))
    assert widths(groups) == {"q": 12, "v": 12}
    assert blocks(groups) == {"q": 3, "v": 3}


def test_shared_keys_and_values_are_left_alone():
    def forward(net, x):
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (net.q, net.k, net.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return net.o(y.transpose(1, 2).flatten(2))

    layers = projections(inner=16) | {"k": nn.Linear(8, 8), "v": nn.Linear(8, 8)}
    groups = groups_when_cut(Net(forward, **layers), torch.rand(2, 5, 8))
    assert widths(groups) == {}
    assert set(left(groups)) == {"q", "k", "v", "o"}


# --- What cannot be cut ---------------------------------------------------------------------------


def test_an_operator_without_a_rule_is_named():
    net = Net(lambda n, x: n.b(torch.fft.fft(n.a(x)).real), a=conv(3, 8), b=conv(8, 2))
    reason = left(groups_when_cut(net, images()))["a"]
    assert reason == "is used by aten._fft_r2c.default, for which there is no rule"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda x: x[:, :4].repeat(1, 2, 1, 1), "taken by number"),
        (lambda x: x * x[:, :1], "taken by number"),
        (lambda x: x.flip(1), "change places in flip"),
        (lambda x: x + torch.arange(8.0).view(8, 1, 1), "meets a tensor of fixed size in add"),
        (lambda x: x[:, torch.arange(7, -1, -1)], "no rule"),
        (lambda x: F.pixel_shuffle(x, 2).repeat(1, 4, 1, 1), "no rule"),
        (lambda x: torch.cat(x.split([3, 5], 1), 1), "split at fixed places"),
        (lambda x: x + x.argmax(1, True), "mixed in argmax"),
    ],
)
def test_what_depends_on_the_number_of_channels_is_left_alone(spoil, reason):
    net = Net(lambda n, x: n.b(spoil(n.a(x))), a=conv(3, 8), b=conv(8, 2))
    groups = groups_when_cut(net, images())
    assert groups.groups == ()
    assert reason in left(groups)["a"]


def test_a_layer_whose_use_is_not_understood_is_named():
    net = Net(lambda n, x: n.b(n.a(x), x), a=nn.Linear(4, 8), b=nn.Bilinear(8, 4, 2))
    groups = groups_when_cut(net, torch.rand(2, 4))
    assert "no rule" in left(groups)["a"]
    assert "b" in left(groups)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_left_alone(kind):
    def forward(net, x):
        return net.head(net.rnn(net.stem(x))[0])

    net = Net(forward, stem=nn.Linear(4, 8), rnn=kind(8, 6, batch_first=True), head=nn.Linear(6, 2))
    groups = groups_when_cut(net, torch.rand(2, 5, 4))
    assert "rnn" in left(groups)
    assert set(widths(groups)) <= {"stem"}


def test_a_layer_that_the_forward_pass_does_not_reach():
    net = Net(lambda n, x: n.b(n.a(x)), a=conv(3, 8), b=conv(8, 2), idle=conv(8, 8))
    groups = groups_when_cut(net, images())
    assert left(groups)["idle"] == "was not reached by the forward pass"
    assert widths(groups) == {"a": 8}


def test_a_number_of_channels_in_the_code_is_found_by_trial():
    net = Net(lambda n, x: n.b(n.a(x).reshape(2, 8, 36).unflatten(2, (6, 6))), a=conv(3, 8),
              b=conv(8, 4), c=conv(8, 8))  # fmt: skip
    groups = groups_when_cut(net, images())
    assert groups.groups == ()
    assert "the model does not run without some of them: shape '[2, 8, 36]'" in left(groups)["a"]


def test_only_the_group_that_fails_the_trial_is_left_alone():
    def forward(net, x):
        return net.head(net.b(net.a(x)).reshape(2, 6, -1).unflatten(2, (6, 6)))

    net = Net(forward, a=conv(3, 8), b=conv(8, 6), head=conv(6, 2))
    groups = groups_when_cut(net, images())
    assert widths(groups) == {"a": 8}
    assert set(left(groups)) == {"b", "head"}
