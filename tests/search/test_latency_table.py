"""Times of layers at a few sizes, and the latency of every plan read off them."""

import copy
import json
import pickle
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.compress.channels.cut import cut_channels
from lit_compress.compress.channels.groups import ChannelAxis, ChannelGroup, ChannelGroups
from lit_compress.compress.channels.plan import ChannelPlan, choose_channels
from lit_compress.compress.channels.tracing import find_channel_groups
from lit_compress.search import latency_table
from lit_compress.search.latency_grids import LayerLatency, RestLatency
from lit_compress.search.latency_table import LatencyTable
from lit_compress.search.timed_layers import layer_calls, sizes_between
from tests.compress.channels.hand_made_groups import conv_net


class Clock:
    """Says times by rule: a layer's grows with its weight, a network's with all parameters."""

    def __init__(self, noise: float = 0.0, overhead: float = 5.0) -> None:
        self.layers: list[nn.Module] = []
        self.networks: list[nn.Module] = []
        self.overhead = overhead
        self._random = random.Random(0)
        self._noise = noise

    def run(self, x):
        def call(network):
            self._running = network
            return network(x)

        return call

    def __call__(self, call, x):
        call(x)
        if isinstance(call, nn.Module):
            assert not call.training
            self.layers.append(call)
            return self.layer_ms(call) * self._disturbance()
        assert not torch.is_grad_enabled()
        self.networks.append(self._running)
        return self.network_ms(self._running) * self._disturbance()

    def _disturbance(self):
        return 1 + self._noise * self._random.random()

    def layer_ms(self, layer):
        return 1 + layer.weight.numel() / 64

    def network_ms(self, network):
        return self.overhead + sum(p.numel() for p in network.parameters())

    @property
    def num_timed(self):
        return len(self.layers) + len(self.networks)


def measured(model, x, groups=None, clock=None, **kwargs):
    """The table of a model by the clock's rule."""
    clock = clock or Clock()
    if groups is None:
        groups = find_channel_groups(model, lambda m: m(x))
    return LatencyTable.measure(groups, model, clock.run(x), time_call=clock, **kwargs)


def chain():
    """Convolutions of every kind, and a linear layer behind a flatten."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),  # depthwise
        nn.Conv2d(16, 32, 3, padding=1, groups=16),  # depthwise, two outputs for each input
        nn.Conv2d(32, 24, 1, groups=4),
        nn.ConvTranspose2d(24, 16, 2, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
        nn.Linear(10, 3),
    )


def images(size=4):
    return torch.zeros(2, 1, size, size)


def all_kept(table):
    return torch.tensor([[group.num_channels for group in table.groups.groups]])


def slim_copy(model, groups, plan):
    slim = copy.deepcopy(model)
    cut_channels(slim, groups, choose_channels(groups, plan, torch.zeros(groups.num_channels)))
    return slim


# --- Sizes and layers -----------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 2048), st.integers(1, 40), st.integers(2, 9))
def test_sizes_rise_by_units_to_the_full_size(multiple, unit, num_points):
    full = multiple * unit
    sizes = sizes_between(full, unit, num_points)
    assert sizes[-1] == full
    assert list(sizes) == sorted(set(sizes))
    assert 1 <= len(sizes) <= num_points
    assert all(size > 0 and size % unit == 0 for size in sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_layer_alone_is_as_the_network_calls_it(dtype, layout):
    model = chain()[:7].to(dtype).to(memory_format=layout)
    x = images().to(dtype).to(memory_format=layout)
    inputs, outputs = {}, {}

    def note(module, args, y):
        inputs[module], outputs[module] = args[0], y

    handles = [module.register_forward_hook(note) for module in model]
    calls = layer_calls(model, lambda network: network(x))
    for handle in handles:
        handle.remove()
    for name, call in calls:
        layer = model.get_submodule(name)
        alone, alone_x = call.at(*layer.weight.shape[:2])
        assert repr(alone) == repr(layer)
        assert (alone_x.shape, alone_x.dtype) == (inputs[layer].shape, dtype)
        assert alone(alone_x).shape == outputs[layer].shape
        assert call.num_outputs == outputs[layer].numel()
        if call.channels_last:
            assert layout is torch.channels_last
            assert alone_x.is_contiguous(memory_format=layout)
    assert any(call.channels_last for _, call in calls) is (layout is torch.channels_last)


def test_autocast_decides_on_the_dtype():
    def run(network):
        with torch.autocast("cpu", torch.bfloat16):
            return network(torch.zeros(2, 4))

    ((_, call),) = layer_calls(nn.Sequential(nn.Linear(4, 4)), run)
    layer, x = call.at(4, 2)
    assert x.dtype == layer.weight.dtype == torch.bfloat16
    assert x.shape == (2, 2)


# --- The table ------------------------------------------------------------------------------------


def test_at_the_sizes_timed_it_says_what_was_timed():
    clock, model = Clock(), chain()
    table = measured(model, images(), clock=clock)
    assert [layer.name for layer in table.layers] == ["0", "3", "4", "5", "6", "8", "9"]
    for layer in table.layers:
        weight = model.get_submodule(layer.name).weight
        kernel = weight[0, 0].numel()
        assert tuple(sizes[-1] for sizes in layer.sizes) == weight.shape[:2]
        for i, first in enumerate(layer.sizes[0]):
            for j, second in enumerate(layer.sizes[1]):
                assert float(layer.ms[i, j]) == 1 + first * second * kernel / 64
    kinds = {type(layer) for layer in clock.layers}
    assert kinds == {nn.Conv2d, nn.ConvTranspose2d, nn.Linear}


def test_the_dense_network_takes_what_it_was_measured_to_take():
    clock, model = Clock(), chain()
    table = measured(model, images(), clock=clock)
    assert table.dense_ms == pytest.approx(clock.network_ms(model), rel=1e-12)
    assert float(table(all_kept(table))[0]) == table.dense_ms
    assert table.of_plan(ChannelPlan({}, {})) == table.dense_ms


def test_layers_that_take_longer_alone_are_scaled_to_the_whole():
    clock = Clock(overhead=0)
    clock.network_ms = lambda network: sum(p.numel() for p in network.parameters()) / 1e3
    table = measured(chain(), images(), clock=clock)
    assert table.dense_ms == pytest.approx(clock.network_ms(chain()), rel=1e-12)
    assert table.rest.ms[-1] == 0


def test_uniformly_cut_networks_take_what_they_were_measured_to_take():
    torch.manual_seed(0)
    model, clock = nn.Sequential(*chain()[:3], nn.Conv2d(16, 8, 3), nn.Conv2d(8, 1, 1)), Clock()
    clock.layer_ms = lambda layer: layer.weight.numel() / 64
    table = measured(model, images(), clock=clock, num_points=2)
    half = {group.name: group.num_channels // 2 for group in table.groups.groups}
    plan = ChannelPlan(half, {group.name: group.num_channels for group in table.groups.groups})
    slim = slim_copy(model, table.groups, plan)
    known = [sum(p.numel() for p in network.parameters()) for network in clock.networks]
    assert known == [sum(p.numel() for p in network.parameters()) for network in (model, slim)]
    assert table.of_plan(plan) == pytest.approx(clock.network_ms(slim), rel=1e-12)


def test_noise_makes_nothing_smaller_slower():
    table = measured(chain(), images(), clock=Clock(noise=30.0))
    for layer in table.layers:
        assert bool((layer.ms.diff(dim=0) >= 0).all())
        assert bool((layer.ms.diff(dim=1) >= 0).all())
    assert list(table.rest.ms) == sorted(table.rest.ms)
    assert list(table.rest.outputs) == sorted(set(table.rest.outputs))
    assert table.rest.ms[0] >= 0


NOISY = measured(chain(), images(), clock=Clock(noise=3.0))
KEPT = st.tuples(*(st.integers(1, g.num_channels // g.num_blocks) for g in NOISY.groups.groups))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(KEPT, KEPT), min_size=1, max_size=8))
def test_more_channels_never_cost_less_however_noisy_the_times(pairs):
    blocks = torch.tensor([group.num_blocks for group in NOISY.groups.groups])
    a, b = torch.tensor(pairs).unbind(1)
    low, high = torch.minimum(a, b) * blocks, torch.maximum(a, b) * blocks
    cheaper, dearer = NOISY(low), NOISY(high)
    assert bool((cheaper <= dearer * (1 + 1e-12)).all())
    assert bool((cheaper > 0).all())
    assert bool((dearer <= NOISY.dense_ms * (1 + 1e-12)).all())
    one_by_one = torch.cat([NOISY(row[None]) for row in low])
    torch.testing.assert_close(cheaper, one_by_one, rtol=1e-12, atol=0)
    torch.testing.assert_close(cheaper, NOISY(low.double()), rtol=0, atol=0)


def hand_made(rest=None, calls=1):
    """One linear layer of 4 x 3, both dimensions cut by groups, timed at 2 x 2 sizes."""
    groups = ChannelGroups(
        (ChannelGroup("a", 4), ChannelGroup("b", 3)),
        axes := (
            ChannelAxis("l.weight", 0, torch.arange(4), "out"),
            ChannelAxis("l.weight", 1, torch.arange(4, 7), "in"),
        ),
    )
    ms = torch.tensor([[1.0, 3.0], [5.0, 11.0]], dtype=torch.float64)
    layer = LayerLatency("l", calls, axes, ((2, 4), (1, 3)), ms, 0, 10.0)
    return LatencyTable(groups, (layer,), rest or RestLatency([40.0], [0.5]), "a device")


def test_between_the_sizes_it_is_bilinear_and_below_them_flat():
    table = hand_made()
    kept = torch.tensor([[2, 1], [2, 3], [4, 1], [4, 3], [3, 1], [2, 2], [3, 2], [1, 1], [1, 2]])
    expected = [1.5, 3.5, 5.5, 11.5, 3.5, 2.5, 5.5, 1.5, 2.5]
    assert table(kept).tolist() == expected
    assert table(kept).dtype == torch.float64
    assert hand_made(calls=3)(kept)[3] == 33.5


def test_the_rest_goes_with_what_the_layers_make():
    table = hand_made(rest=RestLatency([20.0, 40.0], [1.0, 7.0]))
    kept = torch.tensor([[4, 1], [3, 1], [2, 1], [1, 1]])
    assert table(kept).tolist() == [5 + 7, 3 + 4, 1 + 1, 1 + 1]


def test_it_prints_full_and_half():
    text = str(hand_made(calls=2))
    assert text.splitlines()[0] == "Latency on a device"
    cells = [line.split() for line in text.splitlines()]
    assert ["l", "2", "22.0000", "2.0000"] in cells
    assert ["rest", "0.5000", "0.5000"] in cells
    assert ["total", "22.5000", "2.5000"] in cells


# --- Which layers count ---------------------------------------------------------------------------


class Twice(nn.Module):
    """A convolution that is called twice, once on smaller images, and one of the same shape."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.twin = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.twin(self.shared(self.shared(input=self.stem(x))))
        return self.head(self.shared(x[..., ::2, ::2]).mean((2, 3)))


def test_a_layer_called_twice_counts_twice_and_equal_layers_are_timed_once():
    clock = Clock(overhead=1e3)
    table = measured(Twice(), images(), clock=clock)
    counted = [(layer.name, layer.calls) for layer in table.layers]
    assert counted == [("stem", 1), ("shared", 2), ("twin", 1), ("shared", 1), ("head", 1)]
    assert len({id(layer) for layer in clock.layers}) == len(clock.layers)
    one, twin = table.layers[1], table.layers[2]
    assert torch.equal(one.ms, twin.ms)
    grids = {"stem": 4, "shared": 16, "smaller": 16, "head": 4}
    assert len(clock.layers) == sum(grids.values())
    ms, _ = table._grids(all_kept(table))
    assert float(ms[0, 1]) == 2 * float(ms[0, 2])


class Attention(nn.Module):
    """One head with linear layers only, over a residual stream."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x):
        x = self.embed(x)
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.head(x + self.out(weights @ self.v(x)))


def test_attention_of_linear_layers():
    clock = Clock(overhead=1e3)
    table = measured(Attention(), torch.randn(2, 5, 3), clock=clock)
    assert {layer.name for layer in table.layers} == {"embed", "q", "k", "v", "out", "head"}
    least = torch.tensor([[group.num_blocks for group in table.groups.groups]])
    assert float(table(least)[0]) < table.dense_ms
    assert all(layer.in_features <= 8 for layer in clock.layers)


def test_weights_shared_by_two_layers_are_cut_in_both():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[2].weight = model[1].weight
    table = measured(model, torch.randn(2, 3), clock=Clock(overhead=1e3))
    tied, twin = table.layers[1:3]
    assert tied.sizes == twin.sizes
    assert len(twin.sizes[0]) > 1


def test_layers_without_a_weight_of_their_own_count_in_the_rest():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    nn.utils.parametrizations.weight_norm(model[1])
    table = measured(model, images())
    assert [layer.name for layer in table.layers] == ["0", "3"]


def test_a_network_that_cannot_be_cut_has_one_latency():
    model, clock = nn.Sequential(nn.Linear(3, 2)), Clock()
    table = measured(model, torch.zeros(2, 3), clock=clock)
    assert table(torch.zeros(3, 0)).tolist() == [clock.network_ms(model)] * 3
    assert clock.num_timed == 2


# --- The cache ------------------------------------------------------------------------------------


def test_what_the_cache_knows_is_not_timed_again(tmp_path):
    path = tmp_path / "folder" / "times.json"
    first, second = Clock(noise=1.0), Clock(noise=1.0)
    a = measured(chain(), images(), clock=first, cache=path)
    b = measured(chain(), images(), clock=second, cache=str(path))
    assert first.num_timed > 0
    assert second.num_timed == 0
    kept = torch.stack([all_kept(a)[0], torch.tensor([g.num_blocks for g in a.groups.groups])])
    assert a(kept).tolist() == b(kept).tolist()
    assert str(a) == str(b)
    assert [file.name for file in path.parent.iterdir()] == [path.name]

    larger = Clock()
    measured(chain()[:7], images(size=8), clock=larger, cache=path)
    assert larger.num_timed > 0, "other inputs are other calls"
    assert measured(chain(), images(), cache=path).dense_ms == a.dense_ms


def test_another_device_is_timed_anew_beside_the_first(tmp_path, monkeypatch):
    path = tmp_path / "times.json"
    measured(chain(), images(), cache=path)
    before = json.loads(path.read_text())["ms"]
    monkeypatch.setattr(latency_table, "device_name", lambda device: "another machine")
    clock = Clock(overhead=77.0)
    table = measured(chain(), images(), clock=clock, cache=path)
    after = json.loads(path.read_text())["ms"]
    assert clock.num_timed > 0
    assert table.device == "another machine"
    assert set(after) == {*before, "another machine"}
    assert all(after[device] == times for device, times in before.items())


def test_what_others_wrote_meanwhile_stays(tmp_path):
    path = tmp_path / "times.json"

    class Meanwhile(Clock):
        def __call__(self, call, x):
            if not self.layers:
                measured(nn.Sequential(nn.Linear(5, 4)), torch.zeros(1, 5), cache=path)
            return super().__call__(call, x)

    measured(chain(), images(), clock=Meanwhile(), cache=path)
    again = Clock()
    measured(nn.Sequential(nn.Linear(5, 4)), torch.zeros(1, 5), clock=again, cache=path)
    assert again.num_timed == 0


def test_an_interruption_loses_little(tmp_path):
    path = tmp_path / "times.json"

    class Interrupted(Clock):
        def __call__(self, call, x):
            if isinstance(call, nn.Linear):
                raise KeyboardInterrupt
            return super().__call__(call, x)

    first, second, whole = Interrupted(), Clock(), Clock()
    with pytest.raises(KeyboardInterrupt):
        measured(chain(), images(), clock=first, cache=path)
    measured(chain(), images(), clock=second, cache=path)
    measured(chain(), images(), clock=whole)
    assert len(first.layers) + len(second.layers) == len(whole.layers)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": "lit-comp', "Unterminated string"),
        ("[1]", "expected an object with the format"),
        ('{"format": "other", "ms": {}}', "expected an object with the format"),
        ('{"format": "lit-compress latency 1"}', "expected the times of each device"),
        ('{"format": "lit-compress latency 1", "ms": {"d": 1}}', "expected times by layer"),
        ('{"format": "lit-compress latency 1", "ms": {"d": {"l": "1"}}}', "time of 'l' is '1'"),
        ('{"format": "lit-compress latency 1", "ms": {"d": {"l": NaN}}}', "time of 'l' is nan"),
    ],
)
def test_a_damaged_cache_is_refused_and_left_alone(tmp_path, text, reason):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"times\.json cannot be read .*{reason}.*Mend or move"):
        measured(chain(), images(), cache=path)
    assert path.read_text() == text


# --- Refusals, and the real clock -----------------------------------------------------------------


def test_refusals():
    model, groups = conv_net()
    x = torch.zeros(1, 1, 6, 6)
    with pytest.raises(ValueError, match="num_points is 1, expected at least 2"):
        measured(model, x, groups, num_points=1)
    with pytest.raises(
        ValueError, match="Sequential raised RuntimeError when it was run .*one batch"
    ):
        measured(model, torch.zeros(1, 2, 6, 6), groups)
    with pytest.raises(ValueError, match="ReLU calls no convolution and no linear layer"):
        measured(nn.ReLU(), x, ChannelGroups((), ()))
    with pytest.raises(ValueError, match="hold the tensor '3.weight' and the model has none"):
        measured(model[:2], x, groups)
    other = nn.Sequential(*model)
    other[0] = nn.Conv2d(1, 5, 3, padding=1)
    other[1], other[3] = nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3, stride=2, padding=1)
    with pytest.raises(ValueError, match="know '0.weight' with 6 indices in dimension 0"):
        measured(other, x, groups)
    table = measured(model, x, groups)
    with pytest.raises(ValueError, match=r"kept has the shape \(2,\), expected \[num_plans, 2\]"):
        table(torch.tensor([6, 4]))
    with pytest.raises(ValueError, match="a group 'x' and the model has none"):
        table.of_plan(ChannelPlan({"x": 1}, {"x": 2}))
    with pytest.raises(ValueError, match="the latency table has no layers"):
        LatencyTable(groups, (), RestLatency([0.0], [1.0]), "a device")
    layer = replace(table.layers[0], sizes=((2, 5), (1,)))
    with pytest.raises(ValueError, match="'0' was timed up to 5 indices in dimension 0 .* has 6"):
        replace(table, layers=(layer,))


def test_a_real_measurement_leaves_the_network_as_it_was():
    model, groups = conv_net()
    model.train()
    model[1].eval()
    x = torch.randn(2, 1, 6, 6)
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    table = LatencyTable.measure(groups, model, lambda m: m(x + torch.rand(1)), num_points=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[n]) for n, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert 0 < float(table(torch.tensor([[1, 1]]))[0]) <= table.dense_ms * (1 + 1e-12) < 1e3
    assert "thread" in table.device
    assert torch.__version__ in table.device
    again = pickle.loads(pickle.dumps(table))  # as it goes to the other processes of a run
    every = torch.cartesian_prod(*(torch.arange(1, g.num_channels + 1) for g in groups.groups))
    assert torch.equal(again(every), table(every))
