import copy
import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_compress.measure.complexity import (
    count_macs,
    count_nonzero_params,
    count_params,
    layer_complexity,
    sparsity,
)

small = settings(deadline=None, max_examples=30)


class NeedsValues(nn.Module):
    """Wraps a model so that it cannot run on the meta device."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> object:
        assert math.isfinite(args[0].sum().item())
        return self.model(*args)


def both_ways(model: nn.Module, *args: Tensor, batch_size: int | None = None) -> int:
    """Count on the meta device and with real kernels; both must agree."""
    macs = count_macs(model, args, batch_size=batch_size)
    assert count_macs(NeedsValues(model), args, batch_size=batch_size) == macs
    return macs


# Published figures


@pytest.mark.parametrize(
    ("name", "published", "digits"),
    [
        ("resnet18", 1.814e9, 4),
        ("mobilenet_v2", 300.8e6, 4),
        ("resnet50", 4.09e9, 3),
        ("vgg16", 15.47e9, 4),
        ("vit_b_16", 17.56e9, 4),
    ],
)
def test_published_figures(name: str, published: float, digits: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    macs = count_macs(model, torch.zeros(1, 3, 224, 224))
    assert float(f"{macs:.{digits}g}") == published


def test_vision_transformer_by_hand() -> None:
    tokens, width, hidden, blocks = 197, 768, 3072, 12
    patches = 196 * width * 3 * 16 * 16
    projections = tokens * width * 3 * width + tokens * width * width
    attention = 2 * tokens * tokens * width  # Q·Kᵀ and weights·V over all heads
    mlp = 2 * tokens * width * hidden
    with torch.device("meta"):
        model = torchvision.models.vit_b_16()
    by_hand = patches + blocks * (projections + attention + mlp) + width * 1000
    assert count_macs(model, torch.zeros(2, 3, 224, 224)) == by_hand


def test_mobilenet_v1_for_cifar() -> None:
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
    plan += [(512, 1)] * 5 + [(1024, 1)] * 2
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
    channels = 16
    for width, stride in plan:
        layers.append(nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False))
        layers.append(nn.Conv2d(channels, width // 2, 1, bias=False))
        channels = width // 2
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    assert round(count_macs(model, torch.zeros(1, 3, 32, 32)) / 1e6, 2) == 16.97


# Closed formulas


@small
@given(
    groups=st.integers(1, 4),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    batch=st.integers(1, 3),
    side=st.integers(6, 9),
    dims=st.integers(1, 3),
)
def test_convolutions(
    groups: int,
    per_group: tuple[int, int],
    kernel: int,
    stride: int,
    dilation: int,
    batch: int,
    side: int,
    dims: int,
) -> None:
    c_in, c_out = per_group[0] * groups, per_group[1] * groups
    conv_type = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    conv = conv_type(c_in, c_out, kernel, stride, dilation=dilation, groups=groups)
    out = (side - dilation * (kernel - 1) - 1) // stride + 1
    expected = out**dims * c_out * per_group[0] * kernel**dims
    assert both_ways(conv, torch.zeros(batch, c_in, *[side] * dims)) == expected


@small
@given(groups=st.integers(1, 3), kernel=st.integers(1, 3), stride=st.integers(1, 2))
def test_transposed_convolutions(groups: int, kernel: int, stride: int) -> None:
    conv = nn.ConvTranspose2d(2 * groups, 3 * groups, kernel, stride, groups=groups)
    expected = 5 * 5 * (2 * groups) * 3 * kernel**2  # each input pixel meets each weight
    assert both_ways(conv, torch.zeros(2, 2 * groups, 5, 5)) == expected


@small
@given(
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    leading=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    bias=st.booleans(),
)
def test_linear(sizes: tuple[int, int], leading: list[int], bias: bool) -> None:
    positions = math.prod(leading[1:])
    linear = nn.Linear(*sizes, bias=bias)
    assert both_ways(linear, torch.zeros(*leading, sizes[0])) == positions * sizes[0] * sizes[1]


def recurrent_macs(rnn: nn.RNNBase, time: int) -> int:
    gates = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1}[rnn.mode]
    directions = 2 if rnn.bidirectional else 1
    out = rnn.proj_size or rnn.hidden_size
    total = 0
    for layer in range(rnn.num_layers):
        features = rnn.input_size if layer == 0 else out * directions
        step = gates * rnn.hidden_size * (features + out) + rnn.proj_size * rnn.hidden_size
        total += directions * time * step
    return total


@small
@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    sizes=st.tuples(st.integers(1, 4), st.integers(2, 5)),
    num_layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    time=st.integers(1, 4),
    batch=st.integers(1, 3),
)
def test_recurrent_layers(
    kind: type[nn.RNNBase],
    sizes: tuple[int, int],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    time: int,
    batch: int,
) -> None:
    rnn = kind(*sizes, num_layers, batch_first=batch_first, bidirectional=bidirectional)
    shape = (batch, time, sizes[0]) if batch_first else (time, batch, sizes[0])
    assert both_ways(rnn, torch.zeros(shape), batch_size=batch) == recurrent_macs(rnn, time)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
def test_lstm_with_projection_and_cells() -> None:
    lstm = nn.LSTM(3, 5, 2, proj_size=2, bidirectional=True, batch_first=True)
    assert both_ways(lstm, torch.zeros(2, 7, 3)) == recurrent_macs(lstm, 7)
    assert both_ways(nn.LSTMCell(3, 5), torch.zeros(2, 3)) == 4 * 5 * (3 + 5)
    assert both_ways(nn.GRUCell(3, 5), torch.zeros(2, 3)) == 3 * 5 * (3 + 5)


class Attention(nn.Module):
    def __init__(self, causal: bool = False, grouped: bool = False) -> None:
        super().__init__()
        self.options = {"is_causal": causal, "enable_gqa": grouped}

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, **self.options)


@small
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    dims=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    causal=st.booleans(),
)
def test_scaled_dot_product_attention(
    batch: int, heads: int, lengths: tuple[int, int], dims: tuple[int, int], causal: bool
) -> None:
    query = torch.zeros(batch, heads, lengths[0], dims[0])
    key = torch.zeros(batch, heads, lengths[1], dims[0])
    value = torch.zeros(batch, heads, lengths[1], dims[1])
    expected = heads * lengths[0] * lengths[1] * sum(dims)
    assert both_ways(Attention(causal), query, key, value) == expected


def test_attention_with_fewer_key_heads() -> None:
    query, key = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8)
    assert both_ways(Attention(grouped=True), query, key, key) == 4 * 5 * 6 * 16


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_backends_agree(backend: SDPBackend) -> None:
    query = torch.zeros(2, 4, 5, 8)
    with sdpa_kernel(backend):
        assert both_ways(Attention(), query, query, query) == 2 * 4 * 5 * 5 * 8


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_has_its_work_in_its_submodules(training: bool) -> None:
    length, width, hidden = 7, 8, 16
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).train(training)
    x = torch.randn(3, length, width)
    attention = 4 * length * width * width + 2 * length * length * width
    assert both_ways(encoder, x) == 2 * (attention + 2 * length * width * hidden)
    rows = {row.name: row.macs for row in layer_complexity(encoder, x)}
    assert rows["layers.1.self_attn"] == attention
    assert rows["layers.0.linear1"] == rows["layers.0.linear2"] == length * width * hidden
    assert torch.backends.mha.get_fastpath_enabled()


class Products(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> list[Tensor]:
        zero = torch.zeros(3, 3, device=a.device)
        return [
            torch.einsum("bij,bjk->bik", a, b),
            torch.baddbmm(zero.expand(2, 3, 3), a, b),
            torch.addbmm(zero, a, b),
            a @ b[0, :, 0],
            torch.addmv(zero[0], a[0], b[0, :, 0]),
            torch.dot(a[0, 0], b[0, :, 0]),
        ]


def test_matrix_products_of_every_kind() -> None:
    a, b = torch.zeros(2, 3, 4), torch.zeros(2, 4, 3)
    batched = 3 * (2 * 3 * 4 * 3)
    with_vector = 2 * 3 * 4 + 3 * 4
    assert both_ways(Products(), a, b, batch_size=1) == batched + with_vector + 4


def test_bilinear() -> None:
    bilinear = nn.Bilinear(3, 4, 5)
    expected = 5 * 4 * 3 + 5 * 4  # contract the first input, then the second
    assert both_ways(bilinear, torch.zeros(2, 3), torch.zeros(2, 4)) == expected


def test_elementwise_work_is_not_counted() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Softmax(1))
    assert count_macs(model, torch.zeros(1, 3, 4, 4)) == 0


def test_zeros_count_like_any_other_number() -> None:
    linear = nn.Linear(8, 4)
    nn.init.zeros_(linear.weight)
    assert count_macs(linear, torch.zeros(1, 8)) == 32


# Ways to call


def test_tuples_dicts_and_nested_batches() -> None:
    class TakesBatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, batch: dict[str, Tensor], scale: float = 1.0) -> Tensor:
            return self.linear(batch["x"]) * scale

    x = torch.zeros(5, 4)
    assert count_macs(TakesBatch(), ({"x": x},)) == 8
    assert count_macs(TakesBatch(), {"batch": {"x": x}, "scale": 2.0}) == 8
    assert count_macs(nn.Linear(4, 2), [x]) == 8


def test_the_batch_size_may_be_given() -> None:
    lstm = nn.LSTM(3, 5)
    time_first = torch.zeros(7, 2, 3)
    assert count_macs(lstm, time_first, batch_size=2) == recurrent_macs(lstm, 7)
    assert count_macs(nn.Linear(4, 2), torch.zeros(4), batch_size=1) == 8
    with pytest.raises(ValueError, match=r"batch_size=0; expected at least 1"):
        count_macs(lstm, time_first, batch_size=0)


def test_an_error_of_the_model_comes_with_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"Linear raised RuntimeError .*\(2, 5\) float32.*shapes"):
        count_macs(nn.Linear(4, 4), torch.zeros(2, 5))


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(0, 4\); expected a batch of at least one"):
        count_macs(nn.Linear(4, 4), torch.zeros(0, 4))


def test_lazy_parameters_are_refused_and_stay_lazy() -> None:
    model = nn.LazyLinear(4)
    for measure in (count_params, count_nonzero_params, sparsity, layer_complexity):
        with pytest.raises(ValueError, match=r"lazy parameters without a shape \(weight, bias\)"):
            measure(model)
    with pytest.raises(ValueError, match="Run the model once"):
        count_macs(model, torch.zeros(1, 4))
    assert model.has_uninitialized_params()


# The model stays as it was


class Stateful(nn.Module):
    """Needs values, writes to its input, keeps a cache, draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        self.cache["x"] = x
        torch.rand(3)
        return self.norm(self.linear(x)) * x.max().item()


@pytest.mark.parametrize("wrap", [False, True])
def test_nothing_of_the_model_or_the_random_state_changes(wrap: bool) -> None:
    inner = Stateful()
    inner.norm.eval()
    model = NeedsValues(inner) if wrap else inner
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    x, rng = torch.zeros(3, 4), torch.get_rng_state()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert count_macs(model, x) == 16
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, torch.zeros(3, 4))
    assert inner.cache == {}
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_lstm_still_works_afterwards() -> None:
    lstm, x = nn.LSTM(3, 5), torch.randn(4, 2, 3)
    before = lstm(x)[0]
    count_macs(lstm, x)
    assert torch.equal(lstm(x)[0], before)
    assert all(weight.device.type == "cpu" for weight in lstm._flat_weights)


def test_compiled_modules_are_counted_without_compiling() -> None:
    whole = torch.compile(nn.Linear(4, 2))
    part = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 2)))
    in_place = nn.Linear(4, 2)
    in_place.compile()
    x = torch.zeros(3, 4)
    assert [count_macs(model, x) for model in (whole, part, in_place)] == [8, 24, 8]
    assert [(row.name, row.macs) for row in layer_complexity(part, x)] == [
        ("0", 16),
        ("1._orig_mod", 8),
    ]


def test_a_module_in_the_middle_of_lightning_training() -> None:
    lightning = pytest.importorskip("lightning")
    found = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            found.append((count_macs(self, batch), self.training))
            return self(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(6, 4), batch_size=3))
    assert found == [(24, True)] * 2
    assert module.net[1].num_batches_tracked == 2


# Rows


def test_rows_add_up_and_shared_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.decoder = nn.Linear(4, 10, bias=False)
            self.decoder.weight = self.embedding.weight
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.embedding(tokens) * self.scale
            return self.decoder(hidden) @ self.embedding.weight  # its own product

    model, tokens = Tied(), torch.zeros(2, 3, dtype=torch.long)
    rows = layer_complexity(model, tokens)
    assert [(row.name, row.type, row.macs, row.num_params) for row in rows] == [
        ("", "Tied", 120, 4),
        ("embedding", "Embedding", 0, 40),
        ("decoder", "Linear", 120, 0),
    ]
    assert count_params(model) == 44
    assert count_macs(model, tokens) == 240


def test_a_reused_module_is_counted_each_time() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.again = self.linear

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.linear(x))

    rows = layer_complexity(Twice(), torch.zeros(1, 4))
    assert [(row.name, row.macs, row.num_params) for row in rows] == [("linear", 32, 20)]


def test_work_of_a_failed_attempt_stays_with_its_module() -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad, self.good = nn.Linear(5, 5), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.bad(x)
            except RuntimeError:
                return self.good(x) @ x.T

    rows = layer_complexity(Tries(), torch.zeros(1, 4))
    assert {row.name: row.macs for row in rows} == {"": 4, "bad": 0, "good": 16}


@small
@given(zeros=st.integers(0, 24), bias_zeros=st.integers(0, 4))
def test_zeros_are_counted_exactly(zeros: int, bias_zeros: int) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model[0].weight.view(-1)[:zeros] = 0
        model[0].bias[:bias_zeros] = 0
    assert count_nonzero_params(model) == count_params(model) - zeros - bias_zeros
    (linear, norm) = layer_complexity(model)
    assert (linear.num_weights, linear.num_nonzero_weights) == (24, 24 - zeros)
    assert linear.macs is None
    assert norm.sparsity is None
    assert sparsity(model).total == pytest.approx(zeros / 24)
    assert sparsity(model).layers == {"0": linear.sparsity}


def test_a_model_without_weights_is_not_sparse() -> None:
    assert sparsity(nn.ReLU()).total == 0.0
    assert sparsity(nn.BatchNorm2d(3)).layers == {}


def test_parameters_without_values_are_refused() -> None:
    model = nn.Linear(3, 3, device="meta")
    assert count_params(model) == 12
    for measure in (count_nonzero_params, sparsity, layer_complexity):
        with pytest.raises(ValueError, match=r"on the meta device \(weight, bias\).*Load"):
            measure(model)
