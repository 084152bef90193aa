"""Which tensors are quantized, by hand-made networks for which one can tell."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_compress.compress.quantization.calls import record_calls
from lit_compress.compress.quantization.placement import (
    Placement,
    layer_of,
    place,
    with_layer_names,
)
from lit_compress.compress.quantization.scheme import QuantizationScheme
from tests.compress.quantization.nets import (
    LinearChannels,
    Shared,
    SqueezeExcite,
    Tied,
    call,
    conv_bn,
    made,
)

IMAGES = torch.zeros(2, 3, 8, 8)


def placed(net: nn.Module, *inputs: Tensor, **scheme: Any) -> Placement:
    trace = record_calls(net, lambda n: n(*inputs or (IMAGES,)))
    return place(net, trace, with_layer_names(QuantizationScheme(**scheme), trace))


def points(net: nn.Module, *inputs: Tensor, **scheme: Any) -> dict[str, str]:
    return placed(net, *inputs, **scheme).activations


class Of(nn.Module):
    """A network whose forward is a function of it."""

    def __init__(self, function: Any, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


CONV = {"kernel_size": 3, "padding": 1}


def test_convolution_batch_norm_and_relu_have_one_point():
    net = nn.Sequential(*conv_bn(3, 4), nn.ReLU(), *conv_bn(4, 4), nn.ReLU6(), nn.Conv2d(4, 2, 1))
    plan = placed(net)
    assert plan.activations == same("input:0", "2:relu:0", "5:hardtanh:0")  # ReLU6
    assert plan.batch_norms == {
        "1:batch_norm:0": "0:conv2d:0", "4:batch_norm:0": "3:conv2d:0"}  # fmt: skip
    assert plan.weights == {f"{i}:conv2d:0": f"{i}.weight" for i in (0, 3, 6)}
    assert plan.biases == {"6:conv2d:0": "6.bias"}
    assert plan.layer_inputs == {
        "0:conv2d:0": "input:0",
        "3:conv2d:0": "2:relu:0",
        "6:conv2d:0": "5:hardtanh:0",
    }
    assert plan.outputs == same("6:conv2d:0")  # the answer stays as exact as it is
    assert plan.floating == {}


def test_other_activations_have_points_on_both_sides():
    net = nn.Sequential(*conv_bn(3, 4), nn.Hardswish(), nn.Conv2d(4, 2, 1))
    assert points(net) == same("input:0", "1:batch_norm:0", "2:hardswish:0")


def test_sums_take_and_give_integers_with_their_relu():
    net = Of(
        lambda n, x: n.c(F.relu(n.a(x) + n.b(x))),
        a=nn.Conv2d(3, 4, **CONV), b=nn.Conv2d(3, 4, **CONV), c=nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    assert points(net) == same("input:0", "a:conv2d:0", "b:conv2d:0", ":relu:0")


def test_sums_that_no_layer_takes_stay():
    net = Of(
        lambda n, x: torch.sigmoid(n.a(x) + n.b(x)),
        a=nn.Conv2d(3, 4, **CONV), b=nn.Conv2d(3, 4, **CONV),
    )  # fmt: skip
    # The convolutions' own results are on a grid all the same, for the sake of their kernels.
    plan = placed(net)
    assert plan.activations == same("input:0", "a:conv2d:0", "b:conv2d:0")


def test_residuals_quantize_the_stream_once():
    net = made("residual")[0]
    plan = placed(net)
    assert plan.activations == same(
        "input:0", "stem.2:relu:0", "bn1:batch_norm:0", "relu:relu:0", "bn2:batch_norm:0",
        "relu:relu:1", "conv3:conv2d:0", ":cat:0", ":relu:0", ":adaptive_avg_pool2d:0",
    ) | {
        ":pad:0": "relu:relu:0",  # a strided part with zeros around it
        "conv4:pad:0": ":cat:0",
        ":flatten:0": ":adaptive_avg_pool2d:0",
    }  # fmt: skip


def test_moves_share_the_grid():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Unflatten(1, (4, 9)),
        nn.Linear(9, 2),
    )  # fmt: skip
    plan = placed(net)
    assert plan.activations == same("input:0", "1:relu:0") | {"4:unflatten:0": "1:relu:0"}
    assert plan.layer_inputs["5:linear:0"] == "1:relu:0"


def test_dropout_hides_no_grid():
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.ReLU(), nn.Dropout2d(), nn.Flatten(), nn.Dropout(),
                        nn.Linear(4, 2))  # fmt: skip
    # Behind a dropout, values are 1 / (1 - p) times as great in training.
    plan = placed(net)
    assert plan.activations == same("input:0", "1:relu:0") | {"3:flatten:0": "1:relu:0"}
    assert plan.layer_inputs["5:linear:0"] == "1:relu:0"


def test_answers_that_are_moved_at_the_end_stay():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 6), nn.Flatten())
    plan = placed(net)
    assert plan.activations == same("input:0", "1:relu:0")
    assert plan.outputs == same("2:conv2d:0")


def test_features_that_are_returned_and_go_on_are_quantized():
    net = Of(
        lambda n, x: (y := F.relu(n.a(x)), n.b(y)),
        a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    assert points(net) == same("input:0", ":relu:0")


def test_linear_layers_give_integers_only_where_they_are_taken():
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert points(net, torch.zeros(2, 8)) == same("input:0", "1:gelu:0", "3:relu:0")
    assert placed(net, torch.zeros(2, 8)).outputs == same("0:linear:0", "4:linear:0")


def test_gates_multiply_integers():
    plan = placed(SqueezeExcite())
    assert ":mul:0" in plan.activations
    assert ":sigmoid:0" in plan.activations
    assert "stem.2:silu:0" in plan.activations
    # conv - silu: what the convolution gives goes on a grid before the activation.
    assert "stem.1:batch_norm:0" in plan.activations


def test_factors_that_are_constant_make_no_integers():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            self.gamma = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.gamma * 2.0)

    plan = placed(Scaled())
    assert plan.activations == same("input:0", "a:conv2d:0", ":mul:1")
    assert plan.floating == {
        "gamma": "it goes into mul; only convolutions and linear layers are quantized"
    }


def test_a_layer_called_twice_has_one_weight_and_two_norms():
    plan = placed(Shared())
    assert plan.weights["conv:conv2d:0"] == plan.weights["conv:conv2d:1"] == "conv.weight"
    assert plan.batch_norms == {
        "bn1:batch_norm:0": "conv:conv2d:0", "bn2:batch_norm:0": "conv:conv2d:1"}  # fmt: skip
    assert {"relu:relu:0", "relu:relu:1"} <= set(plan.activations)


def test_batch_norms_over_other_channels_are_not_folded():
    plan = placed(LinearChannels(), torch.zeros(2, 6, 8))
    assert plan.batch_norms == {}
    two = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    assert placed(two, torch.zeros(2, 8)).batch_norms == {"1:batch_norm:0": "0:linear:0"}
    unbatched = nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(8), nn.Linear(8, 2))
    assert placed(unbatched, torch.zeros(3, 8)).batch_norms == {}


@pytest.mark.parametrize(
    "between",
    [
        [nn.Identity(), nn.BatchNorm2d(4, track_running_stats=False)],
        [nn.Sigmoid(), nn.BatchNorm2d(4)],
        [nn.GroupNorm(2, 4)],
    ],
)
def test_norms_that_cannot_be_folded_stay(between):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), *between, nn.ReLU(), nn.Conv2d(4, 2, 1))
    plan = placed(net)
    assert plan.batch_norms == {}
    assert "0:conv2d:0" in plan.activations


def test_a_result_with_two_users_keeps_its_norm_apart():
    net = Of(
        lambda n, x: n.c(F.relu(n.bn(y := n.a(x)) + y)),
        a=nn.Conv2d(3, 4, **CONV), bn=nn.BatchNorm2d(4), c=nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    plan = placed(net)
    assert plan.batch_norms == {}
    assert plan.activations == same("input:0", "a:conv2d:0", "bn:batch_norm:0", ":relu:0")


def test_transposed_convolutions_keep_their_norms():
    plan = placed(made("transposed")[0])
    assert set(plan.batch_norms) == {"1:batch_norm:0"}
    assert "5:conv_transpose2d:0" in plan.activations
    assert "4:relu:0" in plan.activations


# --- What users declare ---------------------------------------------------------------------------


def stack() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )


def test_ignored_layers_stay_and_their_neighbours_do_not_need_them():
    plan = placed(stack(), ignored_layers=["2"])
    assert plan.weights == {"0:conv2d:0": "0.weight", "4:conv2d:0": "4.weight"}
    assert plan.floating == {"2:conv2d:0": "it is in ignored_layers"}
    assert plan.activations == same("input:0", "1:relu:0", "3:relu:0")


def test_the_first_and_the_last_layer_can_stay():
    plan = placed(stack(), quantize_first_layer=False, quantize_last_layer=False)
    assert list(plan.weights) == ["2:conv2d:0"]
    assert plan.floating == {
        "0:conv2d:0": "it is the first layer", "4:conv2d:0": "it is the last layer"}  # fmt: skip
    assert plan.activations == same("1:relu:0", "3:relu:0")


def test_a_first_layer_called_twice_stays_both_times():
    net = Of(lambda n, x: n.b(F.relu(n.a(x)) + F.relu(n.a(x * 2))),
             a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 2, 1))  # fmt: skip
    plan = placed(net, quantize_first_layer=False)
    assert list(plan.weights) == ["b:conv2d:0"]
    assert set(plan.floating) == {"a:conv2d:0", "a:conv2d:1"}


def test_weights_only():
    plan = placed(stack(), activation_bits=None)
    assert plan.activations == plan.outputs == plan.layer_inputs == {}
    assert len(plan.weights) == 3


def test_dynamic_ranges_are_for_inputs_of_layers_only():
    plan = placed(made("residual")[0], activation_ranges="dynamic")
    assert plan.outputs == {}
    assert "bn1:batch_norm:0" not in plan.activations
    assert {"input:0", "stem.2:relu:0", "conv4:pad:0", ":flatten:0"} <= set(plan.activations)


@pytest.mark.parametrize("what", ["ignored_layers", "layer_bits"])
def test_patterns_that_match_nothing_are_refused_with_what_there_is(what):
    pattern = {"ignored_layers": ["conv9"], "layer_bits": {"conv9": 4}}[what]
    message = f"{what} holds the pattern 'conv9', which matches none of the 3 .*'0', '2', '4'"
    with pytest.raises(ValueError, match=message):
        placed(stack(), **{what: pattern})


def test_a_network_with_nothing_left_is_refused():
    with pytest.raises(ValueError, match="no layer of Sequential can be quantized: 0: it is in "):
        placed(stack(), ignored_layers=["*"])
    with pytest.raises(ValueError, match="it calls no convolution and no linear layer"):
        placed(nn.Sequential(nn.ReLU()))


# --- What stays in floating point, and why --------------------------------------------------------


def test_layers_with_computed_parts_are_named():
    class Computing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
            self.b, self.c, self.d = nn.Conv2d(4, 4, 1), nn.Linear(4, 4), nn.Linear(4, 2)
            self.register_buffer("blur", torch.ones(4, 1, 2, 2))
            self.flat = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(self.a(x), self.blur, groups=4)
            x = F.conv2d(x, self.b.weight, self.b.bias * 2).mean((2, 3))
            weightless = F.linear(x, self.flat)
            return self.d(self.c(x)) + weightless[:, None]

    plan = placed(Computing())
    reasons = {name: why for name, why in plan.floating.items() if ":" in name}
    assert reasons == {
        "a:conv2d:0": "its weight is no parameter, but computed or a buffer",
        ":conv2d:0": "its weight is no parameter, but computed or a buffer",
        ":conv2d:1": "its bias is no parameter, but computed or a buffer",
        ":linear:0": "its weight has no dimension of output channels",
    }
    assert set(plan.weights) == {"c:linear:0", "d:linear:0"}
    assert "b.weight" not in plan.floating  # named by its call


def test_attention_and_other_parameters_are_named():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place = nn.Parameter(torch.zeros(1, 5, 8))
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.rnn = nn.GRU(8, 4, batch_first=True)
            self.unused = nn.Linear(3, 3)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.rnn(self.block(x + self.place))[0][:, -1])

    plan = placed(Encoder(), torch.zeros(2, 5, 8))
    assert set(plan.weights.values()) == {
        "block.linear1.weight", "block.linear2.weight", "fc.weight"}  # fmt: skip
    only = "; only convolutions and linear layers are quantized"
    assert plan.floating == {
        "place": "it goes into add" + only,
        "block.self_attn.in_proj_weight": "it goes into multi_head_attention_forward" + only,
        "block.self_attn.out_proj.weight": "it goes into multi_head_attention_forward" + only,
        "rnn.weight_ih_l0": "it goes into gru" + only,
        "rnn.weight_hh_l0": "it goes into gru" + only,
        "unused.weight": "no convolution and no linear layer takes it",
    }
    assert "block.self_attn.in_proj_weight stays in floating point: it goes into" in str(plan)


def test_a_weight_that_is_read_elsewhere_is_kept():
    plan = placed(Tied(), torch.zeros(2, 3, dtype=torch.long))
    assert plan.weights == {"fc:linear:0": "fc.weight", "out:linear:0": "embed.weight"}
    assert plan.floating == {
        "embed.weight": "embedding takes it as well, besides the layer that is quantized"
    }


def test_a_plan_says_what_it_does():
    text = str(placed(Shared(), ignored_layers=["fc"]))
    assert text.splitlines() == [
        "2 layers and 4 activations quantized",
        "  fc stays in floating point: it is in ignored_layers",
    ]


def test_layers_are_named_by_their_weights():
    assert layer_of("body.conv.weight") == "body.conv"
    assert layer_of("kernel") == "kernel"
    assert layer_of("block.in_proj_weight") == "block.in_proj_weight"
    net = made("functional")[0]
    plan = placed(net, ignored_layers=["kernel"], layer_bits={"inner": 4})
    assert set(plan.weights.values()) == {"up", "inner.weight"}


# --- Plain data -----------------------------------------------------------------------------------


def test_plain_data_makes_the_same_plan_again():
    net, inputs = made("residual")
    plan = place(net, record_calls(net, lambda n: call(n, inputs)), QuantizationScheme())
    assert Placement.from_plain(json.loads(json.dumps(plan.to_plain()))) == plan
    assert plan.counts["relu:relu"] == "2"
    assert plan.counts["conv4:conv2d"] == "1"


@pytest.mark.parametrize("plain", [{}, {"weights": {}}, {"weights": 3}])
def test_data_that_is_no_plan_is_refused(plain):
    with pytest.raises(ValueError, match="a placement of quantizers has the parts activations"):
        Placement.from_plain(plain)


def test_parts_that_are_no_mappings_are_refused():
    plain = placed(stack()).to_plain() | {"weights": ["0.weight"]}
    with pytest.raises(ValueError, match="was not written by this library"):
        Placement.from_plain(plain)


def test_a_placement_lists_its_parts_in_the_order_of_calls():
    """So that files with it are the same every time, whatever the hashes of names."""
    net = nn.Sequential(*(layer for _ in range(9) for layer in conv_bn(3, 3)))
    trace = record_calls(net, lambda n: n(IMAGES))
    order = list(trace.calls)
    for name, part in place(net, trace, QuantizationScheme()).to_plain().items():
        made_by_calls = [key for key in part if key in order]
        assert made_by_calls == sorted(made_by_calls, key=order.index), name
