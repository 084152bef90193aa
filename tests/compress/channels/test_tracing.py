import copy
import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.compress.channels.cut import cut_channels
from lit_compress.compress.channels.tracing import find_channel_groups
from tests.compress.cut_checks import groups_when_cut, random_keep, tensors_of


def conv(inputs, outputs, **kwargs):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **kwargs)


def images():
    return torch.rand(2, 3, 6, 6)


def widths(groups):
    return {group.name: group.num_channels for group in groups.groups}


def left(groups):
    return {layer.layer: layer.reason for layer in groups.left_alone}


def chain():
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), conv(6, 2))


# --- The model is as it was -----------------------------------------------------------------------


class Counting(nn.Module):
    """Changes its buffers in place and by new ones, and draws random numbers, as it runs."""

    def __init__(self):
        super().__init__()
        self.net = chain()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x):
        self.calls += 1
        x = self.net[:2](x)
        self.average = 0.9 * self.average + x.mean((0, 2, 3))
        return self.net[2:](F.dropout(x, 0.5, self.training) + torch.rand_like(x))


def test_nothing_of_the_model_changes():
    model = Counting()
    model.net[1].eval()
    model.net[3].weight.requires_grad_(False)
    model.net[0].weight.grad = torch.ones_like(model.net[0].weight)
    objects = tensors_of(model)
    before = {name: (t, t.data_ptr(), t.clone(), t.grad) for name, t in objects.items()}
    modes = [module.training for module in model.modules()]
    attributes = [{k: v for k, v in vars(m).items() if k[0] != "_"} for m in model.modules()]
    random_state = torch.get_rng_state()
    groups = find_channel_groups(model, lambda m: m(images()))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    now = [{k: v for k, v in vars(m).items() if k[0] != "_"} for m in model.modules()]
    assert now == attributes
    for name, tensor in tensors_of(model).items():
        same, address, values, gradient = before[name]
        assert tensor is same
        assert tensor.data_ptr() == address
        assert torch.equal(tensor, values), name
        assert tensor.grad is gradient
    assert widths(groups) == {"net.0": 8, "net.3": 6}
    assert "average" in {axis.tensor for axis in groups.axes}


def test_nothing_changes_when_the_model_raises():
    class Raising(Counting):
        def forward(self, x):
            super().forward(x)
            if self.training:
                raise RuntimeError("labels are missing")

    model = Raising().eval()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"Raising raised RuntimeError .* in training mode: labels are missing"
    ):
        find_channel_groups(model, lambda m: m(images()))
    assert not model.training
    assert not model.net.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_one_example_is_too_few_for_batch_norm_and_the_error_says_so():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="give one batch of at least two examples"):
        find_channel_groups(model, lambda m: m(torch.rand(1, 3)))


def test_no_copy_is_taken_of_a_model_that_cannot_be_copied():
    class Alone(nn.Sequential):
        def __deepcopy__(self, memo):
            raise TypeError("there is only one of me")

    assert widths(find_channel_groups(Alone(*chain()), lambda m: m(images()))) == {"0": 8, "3": 6}


# --- Ways to call and to answer -------------------------------------------------------------------


def test_other_code_in_training_mode_counts():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head, self.aux = conv(3, 8), conv(8, 2), conv(8, 5)

        def forward(self, x):
            x = self.stem(x)
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    groups = groups_when_cut(Auxiliary(), images())
    assert widths(groups) == {"stem": 8}
    assert set(left(groups)) == {"head", "aux"}
    assert ("aux.weight", 1) in {(axis.tensor, axis.dim) for axis in groups.axes}


def test_names_in_and_out():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, batch, *, scale):
            hidden = self.a(batch["x"]) * scale
            return {"logits": self.b(hidden), "more": [{"x": batch["x"]}]}

    inputs = {"x": torch.rand(2, 4), "name": ["one", "two"]}
    groups = groups_when_cut(Named(), forward=lambda m: m(inputs, scale=torch.tensor(2.0)))
    assert widths(groups) == {"a": 8}
    assert left(groups) == {"b": "reaches the model's output"}


def test_what_is_returned_within_an_object_stays():
    @dataclass
    class Answer:
        logits: torch.Tensor
        features: torch.Tensor

    class Answering(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            features = self.a(x)
            return Answer(self.b(features), features)

    groups = groups_when_cut(Answering(), torch.rand(2, 4))
    assert groups.groups == ()
    assert left(groups)["a"] == "reaches the model's output"


def test_a_loss_for_an_output():
    groups = find_channel_groups(chain(), lambda m: m(images()).square().mean())
    assert widths(groups) == {"0": 8, "3": 6}
    assert left(groups) == {"4": "is read by no layer"}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(context):
    def forward(model):
        with context():
            return model(images())

    model = nn.Sequential(*chain(), nn.Flatten(), nn.Linear(72, 2))
    assert widths(find_channel_groups(model, forward)) == {"0": 8, "3": 6, "4": 2}


def test_autocast():
    def forward(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(images())

    assert widths(find_channel_groups(chain(), forward)) == {"0": 8, "3": 6}


def test_a_detector_may_find_another_number_of_things():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)
            self.counts = []

        def forward(self, x):
            found = self.b(self.a(x)).softmax(1)
            found = found[(1e4 * found[:, 0]) % 1 > 0.5]
            self.counts.append(len(found))
            return found

    model = Detector()
    x = torch.rand(64, 4)
    assert widths(find_channel_groups(model, lambda m: m(x))) == {"a": 16}
    assert len(set(model.counts)) > 1


def test_a_model_without_parameters():
    groups = find_channel_groups(nn.ReLU(), lambda m: m(images()))
    assert groups.groups == groups.axes == groups.left_alone == ()


# --- Ignored layers -------------------------------------------------------------------------------


def test_ignored_layers_keep_what_they_make():
    groups = find_channel_groups(chain(), lambda m: m(images()), ["0", "4"])
    assert widths(groups) == {"3": 6}
    assert left(groups)["0"] == "matches ignored_layers"


def test_an_ignored_norm_keeps_its_channels():
    groups = find_channel_groups(chain(), lambda m: m(images()), ["[1]"])
    assert widths(groups) == {"3": 6}


def test_a_pattern_that_matches_no_layer_is_refused():
    with pytest.raises(ValueError, match=r"'layer1\.\*', which matches none of the 4 layers"):
        find_channel_groups(chain(), lambda m: m(images()), ["0", "layer1.*"])


# --- Widths that the code takes from elsewhere ----------------------------------------------------


class Attention(nn.Module):
    """Heads as wide as the input divided by their number; the width is also written down."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads, self.embed_dim, self.head_dim = num_heads, width, width // num_heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = (q @ k.mT).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(batch, length, self.embed_dim))


class Encoder(nn.Module):
    def __init__(self, *blocks, width=24):
        super().__init__()
        self.hidden_dim = width
        self.stem, self.blocks, self.head = nn.Linear(4, width), nn.ModuleList(blocks), None
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x).unflatten(-1, (self.hidden_dim,))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def layer(**kwargs):
    return nn.TransformerEncoderLayer(24, 3, 32, batch_first=True, dropout=0.0, **kwargs)


def test_attention_that_takes_its_width_from_its_input():
    model = Encoder(Attention(24, 3), Attention(24, 6))
    groups = find_channel_groups(model, lambda m: m(torch.rand(2, 5, 4)))
    assert [(g.name, g.num_channels, g.num_blocks) for g in groups.groups] == [("stem", 24, 6)]
    assert left(groups) == {"head": "reaches the model's output"}
    slim = copy.deepcopy(model)
    keep = random_keep(groups)
    after = cut_channels(slim, groups, keep)
    assert slim.hidden_dim == slim.blocks[0].embed_dim == 12
    assert (slim.blocks[0].head_dim, slim.blocks[1].head_dim) == (4, 2)
    assert slim(torch.rand(2, 5, 4)).shape == (2, 3)
    cut_channels(slim, after, random_keep(after))
    assert (slim.hidden_dim, slim.blocks[0].head_dim, slim.blocks[1].head_dim) == (6, 2, 1)
    assert slim(torch.rand(2, 5, 4)).shape == (2, 3)


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_transformer(norm_first):
    model = Encoder(layer(norm_first=norm_first), layer(norm_first=norm_first)).eval()
    groups = find_channel_groups(model, lambda m: m(torch.rand(2, 5, 4)))
    assert widths(groups) == {"stem": 24, "blocks.0.linear1": 32, "blocks.1.linear1": 32}
    keep = random_keep(groups)
    cut_channels(model, groups, keep)
    attention = model.blocks[0].self_attn
    assert (attention.embed_dim, attention.kdim, attention.vdim, attention.head_dim) == (
        12, 12, 12, 4
    )  # fmt: skip
    x = torch.rand(2, 5, 4)
    slow = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow)  # by the fused operator


def test_what_is_inside_of_torchs_transformer_layers_is_exact():
    model = Encoder(layer(), layer())
    groups_when_cut(model, torch.rand(2, 5, 4), leave=["stem"])


def test_attention_to_another_sequence():
    class Crossing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 24), nn.Linear(4, 12), nn.Linear(24, 2)
            self.attend = nn.MultiheadAttention(24, 3, kdim=12, vdim=12, batch_first=True)

        def forward(self, x):
            context = self.b(x)
            return self.head(self.attend(self.a(x), context, context, need_weights=False)[0])

    model = Crossing()
    groups = find_channel_groups(model, lambda m: m(torch.rand(2, 5, 4)))
    assert "a" in widths(groups)
    cut_channels(model, groups, random_keep(groups))
    assert model.attend.kdim == model.b.out_features
    assert model.attend.embed_dim == model.a.out_features == 12
    assert model(torch.rand(2, 5, 4)).shape == (2, 5, 2)


# --- Random networks ------------------------------------------------------------------------------


class Random(nn.Module):
    """Blocks one after the other: plain, residual, dense (concatenating), depthwise, gated."""

    def __init__(self, kinds, rng):
        super().__init__()
        self.kinds = kinds
        self.layers = nn.ModuleList()
        width = rng.choice([4, 6, 8])
        self.stem = conv(3, width)
        for kind in kinds:
            inner = rng.choice([4, 6, 8])
            outer = {"residual": width, "gate": width}.get(kind, inner)
            second = conv(inner, inner, groups=inner) if kind == "depthwise" else conv(inner, outer)
            block = nn.Sequential(conv(width, inner), nn.BatchNorm2d(inner), nn.ReLU(), second)
            self.layers.append(block)
            width = width + inner if kind == "dense" else outer
        self.head = nn.Linear(4 * width, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        for kind, block in zip(self.kinds, self.layers, strict=True):
            y = block(x)
            x = {
                "residual": lambda a, b: a + b,
                "gate": lambda a, b: a * b.mean((2, 3), keepdim=True).tanh(),
                "dense": lambda a, b: torch.cat([a, b], 1),
            }.get(kind, lambda a, b: b)(x, y)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.lists(
        st.sampled_from(["plain", "residual", "dense", "depthwise", "gate"]), min_size=1, max_size=4
    ),
    seed=st.integers(0, 1000),
)
def test_random_networks_without_channels_are_those_with_silent_ones(kinds, seed):
    model = Random(kinds, random.Random(seed))
    groups = groups_when_cut(model, images())
    assert left(groups) == {"head": "reaches the model's output"}
    made = {axis.tensor.rpartition(".")[0] for axis in groups.axes if axis.role != "in"}
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert convolutions <= made
