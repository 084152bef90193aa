import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.compress.channels.normal_equations import NormalEquations
from lit_compress.compress.channels.output_samples import input_patches, sample_positions
from lit_compress.compress.channels.reconstruction import gather_equations, reconstruct
from lit_compress.tasks.models import digits_cnn
from tests.compress.channels.hand_made_groups import conv_net, cut, groups_of


def forward(model, batch):
    return model(batch)


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Normal equations -----------------------------------------------------------------------------


@given(
    st.integers(0, 999),
    st.integers(1, 6),
    st.integers(1, 4),
    st.booleans(),
    st.data(),
)
@settings(deadline=None, max_examples=40)
def test_every_sub_block_is_the_least_squares_solution(seed, num_inputs, num_outputs, bias, data):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, num_inputs, generator=generator, dtype=torch.float64) + 0.5
    y = torch.randn(60, num_outputs, generator=generator, dtype=torch.float64) - 2.0
    equations = NormalEquations(num_inputs, num_outputs)
    for part in range(0, 60, 25):
        equations.add(x[part : part + 25], y[part : part + 25])
    some = st.lists(st.integers(0, 99), min_size=1, max_size=6)
    inputs = torch.tensor(sorted({i % num_inputs for i in data.draw(some)}))
    outputs = torch.tensor(sorted({i % num_outputs for i in data.draw(some)}))

    start = torch.zeros(len(outputs), len(inputs), dtype=torch.float64)
    offset = torch.zeros(len(outputs), dtype=torch.float64) if bias else None
    weight, constant = equations.solve(start, offset, inputs=inputs, outputs=outputs, ridge=0.0)

    design = x[:, inputs]
    if bias:
        design = torch.cat([design, torch.ones(60, 1, dtype=torch.float64)], 1)
    direct = torch.linalg.lstsq(design, y[:, outputs]).solution
    torch.testing.assert_close(weight, direct[: len(inputs)].T, rtol=1e-6, atol=1e-8)
    if bias:
        torch.testing.assert_close(constant, direct[-1], rtol=1e-6, atol=1e-8)
    else:
        assert constant is None
    residual = (y[:, outputs] - design @ direct).square().sum()
    variance = (y[:, outputs] - y[:, outputs].mean(0)).square().sum()
    error = equations.error(weight, constant, inputs=inputs, outputs=outputs)
    assert error == pytest.approx(float(residual / variance), rel=1e-6)


@given(st.integers(0, 999), st.integers(1, 12), st.floats(0.0, 10.0), st.booleans())
@settings(deadline=None, max_examples=40)
def test_no_solution_fits_worse_than_the_weights_there_were(seed, num_samples, ridge, bias):
    """Also with fewer samples than inputs and inputs that are always 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 8, generator=generator)
    x[:, 3] = 0.0
    y = torch.randn(num_samples, 2, generator=generator)
    start = torch.randn(2, 8, generator=generator)
    offset = torch.randn(2, generator=generator) if bias else None
    equations = NormalEquations(8, 2)
    equations.add(x, y)
    weight, constant = equations.solve(start, offset, ridge=ridge)

    def squares(w, b):
        return float((y - nn.functional.linear(x, w, b)).double().square().sum())

    assert squares(weight, constant) <= squares(start, offset) * (1 + 1e-4) + 1e-4
    # What the samples say nothing about stays: here, an input that is always 0.
    torch.testing.assert_close(weight[:, 3], start[:, 3])


def test_inputs_that_are_always_zero_leave_the_weights_alone():
    equations = NormalEquations(2, 1)
    equations.add(torch.zeros(4, 2), torch.full((4, 1), 3.0))
    weight, bias = equations.solve(torch.tensor([[1.0, 2.0]]), torch.zeros(1))
    assert weight.tolist() == [[1.0, 2.0]]
    assert bias.tolist() == [3.0]


def test_a_strong_ridge_stays_near_the_weights_there_are():
    x = images(50, 3)
    equations = NormalEquations(3, 1)
    equations.add(x, x.sum(1, keepdim=True))
    start = torch.tensor([[5.0, 5.0, 5.0]])
    near, _ = equations.solve(start, None, ridge=1e6)
    free, _ = equations.solve(start, None, ridge=0.0)
    torch.testing.assert_close(near, start, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(free, torch.ones(1, 3))


def test_bad_samples_and_arguments_are_refused():
    with pytest.raises(ValueError, match="num_inputs is 0, expected at least 1"):
        NormalEquations(0, 1)
    equations = NormalEquations(2, 1)
    with pytest.raises(ValueError, match="there are no samples yet"):
        equations.solve(torch.zeros(1, 2), None)
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 1\), expected \(4, 2\) and \(4, 1\)"):
        equations.add(torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="the samples hold NaN or infinity"):
        equations.add(torch.full((4, 2), torch.inf), torch.zeros(4, 1))
    equations.add(torch.ones(4, 2), torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"ridge is -1.0, expected at least 0"):
        equations.solve(torch.zeros(1, 2), None, ridge=-1.0)
    with pytest.raises(ValueError, match=r"weight has shape \(1, 2\), expected \(1, 1\)"):
        equations.solve(torch.zeros(1, 2), None, inputs=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(1,\)"):
        equations.error(torch.zeros(1, 2), torch.zeros(3))


# --- Samples --------------------------------------------------------------------------------------

LAYERS = [
    (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 7, 5)),
    (nn.Conv2d(3, 4, (3, 2), stride=(2, 3), dilation=2, padding=(2, 1)), (2, 3, 9, 11)),
    (nn.Conv2d(3, 4, 4, padding="same", dilation=2), (2, 3, 7, 7)),
    (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 4, 4)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False), (2, 3, 6, 6)),
    (nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"), (2, 3, 6, 6)),
    (nn.Conv2d(3, 4, 1, stride=2), (2, 3, 5, 5)),
    (nn.Conv2d(3, 4, 3), (3, 6, 6)),  # one image without a batch dimension
    (nn.Conv1d(3, 4, 5, padding=2, stride=2), (2, 3, 13)),
    (nn.Conv3d(3, 4, (1, 2, 3), padding=(0, 1, 1)), (2, 3, 4, 4, 4)),
    (nn.Linear(3, 4), (5, 3)),
    (nn.Linear(3, 4), (3,)),
    (nn.Linear(3, 4, bias=False), (2, 6, 5, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("num_points", [1, 7, 1000])
def test_patches_times_weights_are_the_sampled_outputs(layer, shape, num_points):
    x = images(*shape)
    with torch.no_grad():
        y = layer(x)
    rows = y if y.dim() > 1 else y.unsqueeze(0)
    if not isinstance(layer, nn.Linear):
        rows = (y if y.dim() == x.dim() == len(layer.kernel_size) + 2 else y.unsqueeze(0)).movedim(
            1, -1
        )
    positions = sample_positions(rows.shape, num_points, torch.Generator().manual_seed(1))
    patches = input_patches(layer, x, positions)
    computed = nn.functional.linear(patches, layer.weight.flatten(1), layer.bias)
    torch.testing.assert_close(computed, rows[tuple(positions)], rtol=1e-4, atol=1e-5)
    per_image = min(num_points, rows[0, ..., 0].numel())
    assert positions.shape[1] == len(rows) * per_image
    assert len(set(map(tuple, positions.T.tolist()))) == positions.shape[1]


# --- Reconstruction -------------------------------------------------------------------------------


def redundant_net(consumer):
    """One layer makes 4 channels, 2 and 3 being combinations of 0 and 1; another reads them."""
    make = nn.Linear if isinstance(consumer, nn.Linear) else (lambda i, o: nn.Conv2d(i, o, 1))
    model = nn.Sequential(make(2, 4), consumer)
    with torch.no_grad():
        for tensor in model[0].parameters():
            tensor[2] = tensor[0] - 2 * tensor[1]
            tensor[3] = 0.5 * tensor[1]
    channels = range(4)
    groups = groups_of(
        {"0": 4},
        ("0.weight", 0, channels, "out"),
        ("0.bias", 0, channels, "out"),
        ("1.weight", 1, channels, "in"),
    )
    return model, groups


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize(
    "consumer",
    [
        nn.Conv2d(4, 3, 3),
        nn.Conv2d(4, 3, 3, bias=False),
        nn.Conv2d(4, 3, 3, stride=2, padding=1, padding_mode="replicate"),
        nn.Conv2d(4, 3, 2, dilation=2, stride=2),
        nn.Conv2d(4, 3, 3, padding=1, bias=False),
        nn.Linear(4, 3),
        nn.Linear(4, 3, bias=False),
    ],
    ids=str,
)
def test_removed_combinations_of_kept_channels_are_made_up_for_exactly(consumer, sequential):
    torch.manual_seed(0)
    dense, groups = redundant_net(copy.deepcopy(consumer))
    keep = torch.tensor([True, True, False, False])
    slim = cut(dense, groups, keep)
    shape = (40, 2) if isinstance(consumer, nn.Linear) else (40, 2, 8, 8)
    batches = [images(*shape, seed=1), images(*shape, seed=2)]
    parameters = list(slim.parameters())
    result = reconstruct(
        slim, dense, groups, keep, batches, forward, sequential=sequential, ridge=0.0
    )
    fresh = images(*shape, seed=3)
    torch.testing.assert_close(slim(fresh), dense(fresh), rtol=1e-3, atol=1e-4)
    assert [layer.layer for layer in result.layers] == ["1"]
    assert result.layers[0].error_after < 1e-6 < 1e-2 < result.layers[0].error_before
    assert all(a is b for a, b in zip(slim.parameters(), parameters, strict=True))


@given(st.integers(0, 999), st.booleans(), st.booleans(), st.sampled_from([0.0, 1e-4, 1.0]))
@settings(deadline=None, max_examples=15)
def test_no_layer_ends_up_worse_on_the_calibration_samples(seed, bias, sequential, ridge):
    torch.manual_seed(seed)
    dense, groups = conv_net(bias=bias)
    keep = torch.rand(10) > 0.5
    keep[[0, 6]] = True
    slim = cut(dense, groups, keep)
    result = reconstruct(
        slim,
        dense,
        groups,
        keep,
        [images(8, 1, 6, 6, seed=seed)],
        forward,
        sequential=sequential,
        ridge=ridge,
    )
    removed = {"3": not bool(keep[:6].all()), "6": not bool(keep[6:].all())}
    assert [layer.layer for layer in result.layers] == [name for name in removed if removed[name]]
    for layer in result.layers:
        assert layer.error_after <= layer.error_before * (1 + 1e-4) + 1e-6


def test_errors_are_those_of_the_layer_itself():
    """All positions sampled: the errors are what the layers' outputs say, before and after."""
    torch.manual_seed(0)
    dense, groups = conv_net(bias=True)
    dense.eval()
    keep = torch.ones(10, dtype=torch.bool)
    keep[[1, 4]] = False
    slim = cut(dense, groups, keep)
    batch = images(16, 1, 6, 6)

    def error():
        with torch.no_grad():
            wanted, came = dense[:4](batch), slim[:4](batch)
        centred = wanted - wanted.mean((0, 2, 3), keepdim=True)
        return float((wanted - came).square().sum() / centred.square().sum())

    before = error()
    (layer,) = reconstruct(slim, dense, groups, keep, [batch], forward, num_points=9).layers
    assert layer.num_samples == 16 * 9
    assert layer.error_before == pytest.approx(before, rel=1e-3)
    assert layer.error_after == pytest.approx(error(), rel=1e-3)
    assert layer.error_after < layer.error_before


def test_a_layer_behind_others_sees_what_they_became():
    """Sequentially, the second layer makes up for what the first could not."""
    torch.manual_seed(1)
    dense, groups = conv_net(bias=True)
    keep = torch.tensor([True, False, True, False, True, False, True, True, False, True])
    batch = images(128, 1, 6, 6)
    dense.eval()
    errors = {}
    for name in "none", "cached", "sequential":
        slim = cut(dense, groups, keep)
        if name != "none":
            sequential = name == "sequential"
            reconstruct(slim, dense, groups, keep, [batch], forward, sequential=sequential)
        with torch.no_grad():
            errors[name] = float((slim(batch) - dense(batch)).square().mean())
    assert errors["sequential"] < errors["cached"] < errors["none"]


def digits_net():
    """The digits CNN with batch norm statistics of its own, and its groups."""
    torch.manual_seed(0)
    model = digits_cnn(width=8)
    model(images(64, 1, 8, 8, seed=5))
    spans = {"0": range(8), "3": range(8, 24), "6": range(24, 56)}
    readers = {"0": "3.weight", "3": "6.weight", "6": "11.weight"}
    axes = []
    for name, channels in spans.items():
        norm = int(name) + 1
        axes.append((f"{name}.weight", 0, channels, "out"))
        axes += [
            (f"{norm}.{tensor}", 0, channels, "scale")
            for tensor in ("weight", "bias", "running_mean", "running_var")
        ]
        axes.append((readers[name], 1, channels, "in"))
    return model, groups_of({name: len(c) for name, c in spans.items()}, *axes)


def test_a_digits_net_comes_nearer_to_the_dense_one_on_new_images():
    dense, groups = digits_net()
    assert str(dense[11]).startswith("Linear")
    keep = torch.arange(groups.num_channels) % 2 == 0
    slim = cut(dense, groups, keep)
    batches = [images(64, 1, 8, 8, seed=s) for s in range(6)]
    fresh = images(64, 1, 8, 8, seed=99)

    def error():
        with torch.no_grad():
            return float((slim.eval()(fresh) - dense.eval()(fresh)).square().mean())

    before = error()
    dense.train()
    slim.train()
    state = copy.deepcopy(dense.state_dict())
    result = reconstruct(slim, dense, groups, keep, batches, forward)
    assert [layer.layer for layer in result.layers] == ["3", "6", "11"]
    assert dense.training
    assert slim.training
    assert slim[1].training
    assert all(torch.equal(v, state[k]) for k, v in dense.state_dict().items())
    assert all(not m._forward_hooks for net in (dense, slim) for m in net.modules())
    assert error() < 0.5 * before


def test_equations_gathered_once_solve_every_choice():
    dense, groups = digits_net()
    batches = [images(64, 1, 8, 8, seed=s) for s in range(3)]
    equations = gather_equations(["3", "6", "11"], dense, batches, forward)
    assert {n: e.num_samples for n, e in equations.items()} == {"3": 1920, "6": 768, "11": 192}
    for step in (2, 3):
        keep = torch.arange(groups.num_channels) % step == 0
        slim = cut(dense, groups, keep)
        reconstruct(slim, dense, groups, keep, batches, forward, sequential=False)
        raw = cut(dense, groups, keep)[3].weight
        inputs = torch.arange(72).view(8, 9)[keep[:8]].flatten()
        weight, _ = equations["3"].solve(
            raw.flatten(1), None, inputs=inputs, outputs=keep[8:24].nonzero().flatten()
        )
        torch.testing.assert_close(weight.view_as(raw), slim[3].weight)


def test_a_small_bound_on_memory_only_takes_more_passes():
    dense, groups = digits_net()
    keep = torch.arange(groups.num_channels) % 2 == 0
    batches = [images(32, 1, 8, 8)]
    passes = {}
    results = {}
    for max_bytes in (1, 2**30):
        runs = []

        def counting(model, batch, runs=runs):
            runs.append(model)
            return model(batch)

        slim = cut(dense, groups, keep)
        reconstruct(
            slim, dense, groups, keep, batches, counting, sequential=False, max_bytes=max_bytes
        )
        passes[max_bytes] = len(runs)
        results[max_bytes] = slim
    assert passes == {1: 1 + 3, 2**30: 1 + 1}  # the first finds the order
    # Other positions are drawn where one layer is gathered at a time, so only the first agrees.
    torch.testing.assert_close(results[1][3].weight, results[2**30][3].weight)


def test_the_same_seed_gives_the_same_weights():
    dense, groups = digits_net()
    keep = torch.arange(groups.num_channels) % 2 == 0
    batches = [images(32, 1, 8, 8)]
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        slim = cut(dense, groups, keep)
        reconstruct(slim, dense, groups, keep, batches, forward, num_points=4, seed=seed)
        states.append(slim[6].weight)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


class Odd(nn.Module):
    """Readers of the first layer: one twice called, the others each a reason to be skipped."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 2, 1)
        self.grouped = nn.Conv2d(4, 2, 1, groups=2)
        self.tied = nn.Conv2d(4, 2, 1)
        self.other = nn.Conv2d(4, 2, 1)
        self.other.weight = self.tied.weight
        self.unused = nn.Conv2d(4, 2, 1)
        self.wrapped = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 2, 1))

    def forward(self, x):
        x = self.first(x)
        y = self.twice(x) + self.twice(x.relu())
        return y, self.up(x), self.tied(x), self.other(x), self.wrapped(x)


def test_what_cannot_be_solved_is_left_alone_with_the_reason():
    torch.manual_seed(0)
    dense = Odd()
    axes = [(f"{n}.weight", 1, range(4), "in") for n in ("twice", "tied", "other", "unused")]
    axes += [
        ("up.weight", 0, range(4), "in"),
        ("grouped.weight", 1, [0, 1], "in"),
        ("wrapped.parametrizations.weight.original1", 1, range(4), "in"),
        ("first.weight", 0, range(4), "out"),
        ("first.bias", 0, range(4), "out"),
    ]
    groups = groups_of({"first": 4}, *axes)
    keep = torch.tensor([True, False, True, True])
    slim = Odd()
    slim.load_state_dict(dense.state_dict())
    for name, kept in groups.kept_indices(keep).items():
        if name != "other.weight":  # the tied one
            layer, _, short = name.rpartition(".")
            parameter = getattr(slim.get_submodule(layer), short)
            for dim, indices in kept.items():
                parameter.data = parameter.data.index_select(dim, indices)
    result = reconstruct(slim, dense, groups, keep, [images(16, 1, 4, 4)], forward)
    assert [(layer.layer, layer.num_samples) for layer in result.layers] == [("twice", 2 * 16 * 10)]
    assert {left.layer: left.reason for left in result.left_alone} == {
        "tied": "its weight is shared: tied.weight, other.weight",
        "other": "its weight is shared: tied.weight, other.weight",
        "up": "ConvTranspose2d is no convolution or linear layer",
        "grouped": "is a grouped convolution",
        "wrapped.parametrizations.weight.original1": (
            "is no weight of a convolution or linear layer"
        ),
        "unused": "its forward is not called",
    }
    text = str(result)
    assert "twice" in text
    assert "grouped: is a grouped convolution" in text


def test_nothing_removed_is_nothing_to_do():
    dense, groups = conv_net()
    slim = copy.deepcopy(dense)
    keep = torch.ones(10, dtype=torch.bool)
    result = reconstruct(slim, dense, groups, keep, [images(2, 1, 6, 6)], forward)
    assert result.layers == () == result.left_alone


def test_bad_input_is_refused():
    dense, groups = conv_net()
    keep = torch.tensor([True, False] * 5)
    slim = cut(dense, groups, keep)
    with pytest.raises(ValueError, match="batches is empty"):
        reconstruct(slim, dense, groups, keep, [], forward)
    with pytest.raises(ValueError, match="batches is empty"):
        gather_equations(["3"], dense, [], forward)
    with pytest.raises(ValueError, match=r"batches is an iterator.*give a list or a DataLoader"):
        reconstruct(slim, dense, groups, keep, iter([images(2, 1, 6, 6)]), forward)
    with pytest.raises(ValueError, match="num_points is 0, expected at least 1"):
        reconstruct(slim, dense, groups, keep, [images(2, 1, 6, 6)], forward, num_points=0)
    with pytest.raises(ValueError, match=r"slim model has shape \(4, 6, 3, 3\) at 3.weight, exp"):
        reconstruct(dense, dense, groups, keep, [images(2, 1, 6, 6)], forward)
    bad = torch.full((2, 1, 6, 6), torch.nan)
    with pytest.raises(ValueError, match=r"layer '3', on a calibration batch: .*NaN or infinity"):
        reconstruct(slim, dense, groups, keep, [bad], forward)
    assert all(not m._forward_hooks for net in (dense, slim) for m in net.modules())
