"""One step from a trained float network to a quantized one: every method, and what is refused."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from lit_compress.compress.quantization.formats.conversions import (
    convert_as,
    is_converted,
    remove_conversion,
    stored_conversion,
)
from lit_compress.compress.quantization.formats.fixed_point import FixedPoint
from lit_compress.compress.quantization.formats.linear_kernels import torchao_weights_readable
from lit_compress.compress.quantization.network import is_quantized, quantized_network
from lit_compress.compress.quantization.post_training import (
    PostTrainingScheme,
    quantize_after_training,
)
from lit_compress.compress.quantization.sizes import stored_bytes
from lit_compress.compress.quantization.stored import (
    QUANTIZATION_KEY,
    holds_torchao_weights,
    quantization_records,
    take_quantization,
)
from lit_compress.compress.weight_files import load_checkpoint, read_checkpoint

CONV, LINEAR, OUT = 8 * 3 * 9, 32 * 64, 32 * 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d((2, 4))
        self.fc = nn.Linear(64, 32)
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.bn(self.conv(x))))
        return self.out(torch.relu(self.fc(x.flatten(1))))


@torch.no_grad()
def built(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net()
    for batch in batches(4, seed=7):
        net(batch)
    return net.eval()


def batches(num: int = 4, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(num)]


METHODS = [
    PostTrainingScheme(),
    PostTrainingScheme("dynamic"),
    PostTrainingScheme("weight_only"),
    PostTrainingScheme("weight_only", weight_bits=4, activation_bits=None),
    PostTrainingScheme("float16"),
    PostTrainingScheme("bfloat16"),
    PostTrainingScheme("fixed_point"),
    PostTrainingScheme("fixed_point", fixed_point=FixedPoint("log", 6, None, None)),
    PostTrainingScheme("int8_dynamic_linear"),
    PostTrainingScheme("int8_weight_only_linear"),
    PostTrainingScheme("int4_weight_only_linear", ignored_layers=["out"]),
]
of_each_method = pytest.mark.parametrize(
    "scheme", METHODS, ids=lambda s: f"{s.method}-{s.weight_bits}"
)


@of_each_method
def test_each_method_stays_near_the_float_network(scheme):
    net, (x, *_) = built(), batches(1, seed=3)
    before, names = net(x), list(net.state_dict())
    outcome = quantize_after_training(net, scheme, batches())
    error = (net(x) - before).norm() / before.norm()
    assert 0 < error < (0.2 if scheme.method.startswith(("int4", "fixed")) or
                        scheme.weight_bits < 8 else 0.03)  # fmt: skip
    assert net(x).dtype == torch.float32
    assert [n for n in net.state_dict() if not n.startswith("quantization.")] == names
    assert is_quantized(net) != is_converted(net)
    assert outcome.num_batches == scheme.num_batches(4)


@of_each_method
def test_a_file_brings_each_method_back_bit_by_bit(scheme, tmp_path):
    net, (x, *_) = built(), batches(1, seed=3)
    quantize_after_training(net, scheme, batches())
    expected = net(x)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    assert quantization_records(copy.deepcopy(net)) == quantization_records(net)
    content = {
        "state_dict": {f"model.{k}": v for k, v in net.state_dict().items()},
        QUANTIZATION_KEY: {"model": quantization_records(net)[""]},
    }
    torch.save(content, tmp_path / "q.pt")
    checkpoint = read_checkpoint(tmp_path / "q.pt")  # weights_only=True
    assert holds_torchao_weights(checkpoint) == scheme.method.endswith("_linear")
    fresh = built(seed=5)
    load_checkpoint(fresh, checkpoint, "q.pt", "")
    assert torch.equal(fresh.eval()(x), expected)
    # A float checkpoint takes the same module back.
    float_net = built(seed=6)
    load_checkpoint(fresh, {"state_dict": float_net.state_dict()}, "f.pt", "")
    assert torch.equal(fresh(x), float_net(x))
    assert not quantization_records(fresh)
    assert {t.dtype for t in fresh.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (PostTrainingScheme(), CONV + LINEAR + OUT),
        (PostTrainingScheme(weight_bits=4), (CONV + LINEAR + OUT) / 2),
        (PostTrainingScheme(layer_bits={"fc": 4}), CONV + LINEAR / 2 + OUT),
        (PostTrainingScheme(ignored_layers=["fc"]), CONV + 4 * LINEAR + OUT),
        (PostTrainingScheme("float16"), 2 * (CONV + LINEAR + OUT)),
        (PostTrainingScheme("int8_dynamic_linear"), 4 * CONV + LINEAR + OUT),
    ],
    ids=str,
)
def test_sizes_count_the_bits_of_weights(scheme, expected):
    net = built()
    rest = stored_bytes(net) - 4 * (CONV + LINEAR + OUT)
    assert stored_bytes(net) == sum(t.nbytes for t in net.state_dict().values())
    quantize_after_training(net, scheme, batches())
    assert expected <= stored_bytes(net) <= expected + rest + 4 * (8 + 32 + 5 + 5)


def test_static_quantization_is_what_the_scheme_says():
    net = built()
    scheme = PostTrainingScheme(layer_bits={"f*": 5}, ignored_layers=["out"], ranges="minmax")
    outcome = quantize_after_training(net, scheme, batches())
    assert outcome.quantized == ("conv", "fc")
    assert outcome.floating == {"out": "it is in ignored_layers"}
    quantization = quantized_network(net)
    assert {n: quantization.weight(f"{n}.weight").grid.bits for n in ("conv", "fc")} == {
        "conv": 8,
        "fc": 5,
    }
    assert quantization.activation("input:0").low == torch.stack(batches()).min()


def test_ranges_are_found_as_declared():
    def high(**arguments):
        net = built()
        quantize_after_training(net, PostTrainingScheme(**arguments), batches())
        return float(quantized_network(net).activation("input:0").high)

    largest = float(torch.stack(batches()).max())
    found = {kind: high(ranges=kind) for kind in ("minmax", "moving_average", "mse", "histogram")}
    assert found["minmax"] == pytest.approx(largest)
    assert all(value < largest for kind, value in found.items() if kind != "minmax")
    assert high(ranges="percentile", percentile=90.0) < high(ranges="percentile") <= largest


def skewed() -> Net:
    """The same function as :func:`built`, its hidden features of very different sizes."""
    net, factors = built(), torch.logspace(-1, 1, 32)
    with torch.no_grad():
        net.fc.weight.mul_(factors[:, None])
        net.fc.bias.mul_(factors)
        net.out.weight.div_(factors)
    return net


@pytest.mark.parametrize(
    ("corrections", "activation_bits", "network"),
    [
        (["equalization"], 4, skewed),
        (["bias_correction"], 8, built),
        (["bias_correction", "adaround", "equalization"], 4, skewed),
    ],
)
def test_corrections_bring_few_bits_nearer_to_the_float_network(
    corrections, activation_bits, network
):
    inputs = torch.cat(batches())  # what they are fitted to
    expected = network()(inputs)

    def error(corrections):
        net = network()
        bits = 8 if network is skewed else 3
        scheme = PostTrainingScheme("static", bits, activation_bits, corrections=corrections)
        outcome = quantize_after_training(net, scheme, batches())
        assert len(outcome.remarks) == len(corrections)
        assert outcome.num_batches == 4
        return (net(inputs) - expected).square().mean()

    assert error(corrections) < 0.9 * error([])


def test_equal_weights_stay_equal_where_there_is_one_scale():
    net = built()
    with torch.no_grad():
        net.fc.weight.copy_(torch.tensor([-0.3, 0.0, 0.11, 0.4])[torch.randint(4, (32, 64))])
    quantize_after_training(net, PostTrainingScheme(), batches(), per_tensor_weights=["fc.weight"])
    rounded = quantized_network(net).weight("fc.weight")(net.fc.weight)
    assert len(rounded.unique()) == 4
    assert bool((rounded[net.fc.weight == 0] == 0).all())


def test_a_mapping_of_inputs_runs_through_forward():
    net = built()
    given = [{"x": x} for x in batches()]
    quantize_after_training(net, PostTrainingScheme(), given, lambda n, batch: n(**batch))
    assert is_quantized(net)


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "int8"}, "method is 'int8'; choose one of static, dynamic"),
        ({"weight_bits": 1}, "weight_bits is 1; expected a whole number of bits from 2 to 8"),
        ({"weight_bits": 16}, "weight_bits is 16; expected"),
        ({"activation_bits": 9}, "activation_bits is 9; expected"),
        ({"activation_bits": None}, "choose method='weight_only'"),
        ({"layer_bits": {"fc": 0}}, r"layer_bits\['fc'\] is 0; expected"),
        ({"ranges": "kl"}, "ranges is 'kl'; choose one of minmax"),
        ({"percentile": 99.0}, "percentile is 99.0, which ranges='mse' has no use for"),
        ({"percentile": 40.0, "ranges": "percentile"}, "percentile is 40.0; expected a number"),
        ({"percentile": "99", "ranges": "percentile"}, "percentile is '99'; expected a number"),
        ({"corrections": "adaround"}, r"give a list, as in \['adaround'\]"),
        ({"corrections": ["magic"]}, "a correction is 'magic'; choose one of equalization"),
        ({"ignored_layers": "fc"}, r"ignored_layers is the string 'fc'"),
        ({"fixed_point": FixedPoint()}, "which method='static' has no use for; .* 'fixed_point'"),
        ({"method": "fixed_point", "fixed_point": {}}, "give a FixedPoint or nothing"),
        ({"method": "float16", "weight_bits": 4}, "weight_bits is 4, which method='float16'"),
        ({"method": "bfloat16", "ignored_layers": ["fc"]}, "ignored_layers is .*'bfloat16'"),
        ({"method": "dynamic", "ranges": "minmax"}, "ranges is 'minmax', .* choose 'static'"),
        ({"method": "weight_only", "activation_bits": 4}, "activation_bits is 4, which method"),
        ({"method": "int8_dynamic_linear", "corrections": ["adaround"]}, "corrections is"),
        ({"method": "fixed_point", "layer_bits": {"fc": 4}}, "layer_bits is"),
    ],
    ids=str,
)
def test_schemes_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        PostTrainingScheme(**arguments)


def same(net, state):
    now = net.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[k], state[k]) for k in state)


def refused(message, given, scheme=None, net=None, error=ValueError):
    net = net or built()
    before, kind = copy.deepcopy(net.state_dict()), type(net)
    with pytest.raises(error, match=message):
        quantize_after_training(net, scheme or PostTrainingScheme(), given)
    assert same(net, before)
    assert type(net) is kind
    assert not quantization_records(net)


@pytest.mark.parametrize("method", ["static", "dynamic", "weight_only", "fixed_point"])
def test_no_batches(method):
    refused(f"there is no calibration batch, and method='{method}' needs", [],
            PostTrainingScheme(method))  # fmt: skip


def test_batches_of_another_shape():
    other = torch.randn(8, 1, 8, 8)
    message = r"calibration batch 2 does not run through Net \(RuntimeError: .*\(8, 1, 8, 8\), "
    refused(message + r"where the first batch has \(8, 3, 8, 8\)", [*batches(2), other])
    refused(r"calibration batch 0 does not run .*\(8, 1, 8, 8\)\.", [other])
    refused(r"calibration batch 0 does not run", [torch.randn(8, 12)])
    refused(r"calibration batch 0 .*shapes of nothing", [None])


@pytest.mark.parametrize("corrections", [[], ["equalization", "adaround"]], ids=len)
def test_activations_that_are_nan_are_named(corrections):
    bad = batches(3)
    bad[1][0, 0, 0, 0] = torch.nan
    refused("activation 'input:0': ", bad, PostTrainingScheme(corrections=corrections))


def test_infinite_activations_inside_of_the_network_are_named():
    net = built()
    with torch.no_grad():
        net.fc.weight.mul_(1e38)
        net.fc.bias.fill_(3e38)
    refused("activation '(:relu:1|fc:linear:0)': ", [1e3 * x for x in batches()], net=net)


@of_each_method
def test_weights_that_are_nan_are_named(scheme):
    net = built()
    with torch.no_grad():
        net.fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'fc.weight' holds NaN or infinite values"):
        quantize_after_training(net, scheme, batches())


@of_each_method
def test_a_network_is_quantized_once(scheme):
    net = built()
    quantize_after_training(net, scheme, batches())
    with pytest.raises(ValueError, match="Net is quantized already; load the float weights"):
        quantize_after_training(net, PostTrainingScheme(), batches())
    with pytest.raises(ValueError, match=r"Sequential is quantized already \(in '0'\)"):
        quantize_after_training(nn.Sequential(net), PostTrainingScheme("float16"))


def test_patterns_and_networks_without_layers():
    refused("ignored_layers holds the pattern 'head', which matches none of the 3", batches(),
            PostTrainingScheme(ignored_layers=["head"]))  # fmt: skip
    refused(
        "layer_bits holds the pattern 'head'", batches(), PostTrainingScheme(layer_bits={"head": 4})
    )
    refused("no layer of ReLU can be quantized", batches(), net=nn.ReLU())
    refused("no linear layer is left", [], PostTrainingScheme("int8_dynamic_linear"), nn.ReLU())


def test_activations_beyond_float16():
    net = built()
    with torch.no_grad():
        net.fc.weight.mul_(1e4)
    large = [1e3 * x for x in batches(1)]
    refused("passes the range of float16 .* Choose method='bfloat16'", large,
            PostTrainingScheme("float16"), copy.deepcopy(net))  # fmt: skip
    quantize_after_training(net, PostTrainingScheme("bfloat16"), large)
    assert is_converted(net)
    with torch.no_grad():
        other = built()
        other.fc.weight[0, 0] = 1e6
    refused("'fc.weight' holds 1e.06, beyond the range of float16", [],
            PostTrainingScheme("float16"), other)  # fmt: skip


def test_records_of_another_version_and_of_another_network():
    net = built()
    with pytest.raises(ValueError, match="recorded as 'int1', expected one of half, fixed_point"):
        convert_as(net, {"kind": "int1", "record": {}})
    with pytest.raises(ValueError, match="is no record of half precision"):
        convert_as(net, {"kind": "half", "record": {"dtype": "float16"}})
    with pytest.raises(ValueError, match="is in no other number format"):
        remove_conversion(net)
    record = {"kind": "half", "record": {"dtype": "float16", "kept": [], "num_flushed": {}}}
    with pytest.raises(ValueError, match="has a quantized network 'net', which Net does not have"):
        take_quantization(net, {QUANTIZATION_KEY: {"net": record}})
    assert stored_conversion(net) is None


def test_torchao_that_is_missing(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name=name.partition(".")[0])

    net = built()
    quantize_after_training(net, PostTrainingScheme("int8_dynamic_linear"))
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    place = "lit_compress.compress.quantization.formats.linear_kernels.import_module"
    monkeypatch.setattr(place, missing)
    remedy = r'pip install "lit-compress\[torchao\]"'
    refused(remedy, [], PostTrainingScheme("int8_dynamic_linear"), error=ModuleNotFoundError)
    with pytest.raises(ModuleNotFoundError, match=remedy), torchao_weights_readable():
        pass
