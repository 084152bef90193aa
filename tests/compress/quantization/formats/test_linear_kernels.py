import copy
import json
import os
import pickle
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lit_compress.compress.quantization.formats import linear_kernels
from lit_compress.compress.quantization.formats.linear_kernels import (
    LinearKernels,
    apply_linear_kernels,
    quantize_linears,
    torchao_weights_readable,
)

pytest.importorskip("torchao")

KINDS = {"int8_dynamic": 0.03, "int8_weight_only": 0.01, "int4_weight_only": 0.15}
"""And the largest relative error that is expected."""


def mlp(seed: int = 0, width: int = 64) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    return nn.Sequential(*layers).eval()


def inputs() -> Tensor:
    return torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))


def relative(y: Tensor, of: Tensor) -> float:
    return float((y - of).norm() / of.norm())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_results_are_near_the_float_ones(kind):
    net, x = mlp(), inputs()
    y = net(x)
    kernels = quantize_linears(net, kind)
    assert kernels.quantized == ("0", "2")
    assert not kernels.skipped
    result = net(x)
    assert (result.shape, result.dtype) == (y.shape, torch.float32)
    assert 0 < relative(result, y) < KINDS[kind]
    torch.testing.assert_close(net(x[0, 0]), result[0, 0], rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_state_dict_is_small_and_loads_into_another_network(tmp_path, kind):
    net, x = mlp(width=256), torch.randn(3, 256)
    torch.save(net.state_dict(), tmp_path / "float.pt")
    kernels = quantize_linears(net, kind)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    ratio = os.path.getsize(tmp_path / "net.pt") / os.path.getsize(tmp_path / "float.pt")
    assert ratio < (0.18 if kind == "int4_weight_only" else 0.28)
    with torchao_weights_readable():
        state = torch.load(tmp_path / "net.pt", weights_only=True)
    other = mlp(seed=3, width=256)
    again = LinearKernels.from_plain(json.loads(json.dumps(kernels.to_plain())))
    assert again == kernels
    apply_linear_kernels(other, again)
    other.load_state_dict(state)
    assert torch.equal(other(x), net(x))


def test_files_open_inside_the_context_only(tmp_path):
    states = {kind: mlp() for kind in KINDS}
    for kind, net in states.items():
        quantize_linears(net, kind)
        torch.save(net.state_dict(), tmp_path / kind)
    known = torch.serialization.get_safe_globals()  # torchao's import declared its own
    torch.serialization.clear_safe_globals()
    try:
        for kind in KINDS:
            with pytest.raises(pickle.UnpicklingError, match="torchao"):
                torch.load(tmp_path / kind, weights_only=True)
            with torchao_weights_readable():
                state = torch.load(tmp_path / kind, weights_only=True)
            assert type(state["0.weight"]) is type(states[kind][0].weight.data)
        assert torch.serialization.get_safe_globals() == []
    finally:
        torch.serialization.add_safe_globals(known)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_copies_and_pickles_work_and_stand_alone(kind):
    net, x = mlp(), inputs()
    quantize_linears(net, kind)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))
    assert "extra_repr" not in twin[0].__dict__


@torch.no_grad()
def test_a_transformer_layer_keeps_its_attention_and_runs_without_its_fast_path():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = inputs()
    y = net(x)
    kernels = quantize_linears(net)
    assert kernels.quantized == ("linear1", "linear2")
    assert "nn.MultiheadAttention" in kernels.skipped["self_attn.out_proj"]
    assert "self_attn.out_proj" in str(kernels)
    assert 0 < relative(net(x), y) < 0.05


@pytest.mark.parametrize("kind", ["int8_dynamic", "int8_weight_only"])
@torch.no_grad()
def test_weights_that_are_read_without_a_call_work_in_int8(kind):
    net, x = mlp(), inputs()
    y = net(x)
    quantize_linears(net, kind)
    hidden = nn.functional.gelu(nn.functional.linear(x, net[0].weight, net[0].bias))
    assert 0 < relative(nn.functional.linear(hidden, net[2].weight, net[2].bias), y) < KINDS[kind]


def test_options_of_inductor_stay_as_they_were():
    import torch._inductor.config as config

    before = config.coordinate_descent_tuning, config.force_fuse_int_mm_with_mul
    quantize_linears(mlp())
    assert (config.coordinate_descent_tuning, config.force_fuse_int_mm_with_mul) == before


def test_layers_that_are_left_alone_say_why():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 64)
            self.tied = nn.Linear(64, 10)
            self.tied.weight = self.embedding.weight
            self.weight_norm = parametrizations.weight_norm(nn.Linear(64, 64))
            self.narrow = nn.Linear(40, 64)
            self.odd = nn.Linear(64, 10)
            self.lazy = nn.LazyLinear(4)
            self.empty = nn.Linear(0, 16)
            self.named = nn.Linear(64, 64)
            self.good = nn.Linear(64, 64)

    expected = {
        "tied": "its weight is the same tensor as embedding.weight",
        "weight_norm": "its weight is computed by a parametrization; remove it first",
        "narrow": "its 40 input features are no multiple of group_size 32",
        "odd": "its 10 output features are no multiple of 16, as the int4 kernel needs them",
        "lazy": "is not initialised yet (a lazy module): run one batch through it first",
        "empty": "its weight is empty",
        "named": "matches ignored_layers",
    }
    net = Net()
    kernels = quantize_linears(net, "int4_weight_only", ignored_layers=["na*d"])
    assert kernels.skipped == expected
    assert kernels.quantized == ("good",)
    assert type(net.odd.weight.data) is Tensor
    again = quantize_linears(net, "int8_dynamic")
    assert again.quantized == ("narrow", "odd", "named")
    assert "no float parameter" in again.skipped["good"]


@torch.no_grad()
def test_a_network_that_is_one_layer():
    net = nn.Linear(32, 16)
    x = torch.randn(4, 32)
    y = net(x)
    assert quantize_linears(net).quantized == ("",)
    assert 0 < relative(net(x), y) < 0.05


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="kind is 'int2', expected one of int8_dynamic"):
        quantize_linears(mlp(), "int2")
    with pytest.raises(ValueError, match=r"group_size is 48, expected one of \(32, 64, 128\)"):
        quantize_linears(mlp(), "int4_weight_only", group_size=48)
    with pytest.raises(ValueError, match="'head', which matches none of the 2 layers"):
        quantize_linears(mlp(), ignored_layers=["head"])
    with pytest.raises(ValueError, match="no linear layer is left to quantize"):
        quantize_linears(mlp(), ignored_layers=["*"])
    with pytest.raises(ValueError, match="no linear layer is left to quantize"):
        quantize_linears(nn.Conv2d(3, 3, 3))
    net = mlp()
    with torch.no_grad():
        net[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'2.weight' holds NaN"):
        quantize_linears(net)
    assert type(net[0].weight.data) is Tensor


def test_a_record_for_another_network_is_refused_and_nothing_changes():
    kernels = quantize_linears(mlp())
    other = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Conv2d(3, 3, 1))
    with pytest.raises(
        ValueError, match="'2' on int8_dynamic.*it is a Conv2d without float weight"
    ):
        apply_linear_kernels(other, kernels)
    assert type(other[0].weight.data) is Tensor
    quantized = mlp()
    quantize_linears(quantized)
    with pytest.raises(ValueError, match="it is a Linear without float weight"):
        apply_linear_kernels(quantized, kernels)
    with pytest.raises(ValueError, match="it is missing"):
        apply_linear_kernels(nn.Sequential(nn.Linear(2, 2)), kernels)
    for plain in ({}, None, {**kernels.to_plain(), "kind": "int2"}):
        with pytest.raises(ValueError, match="no record of linear kernels"):
            LinearKernels.from_plain(plain)


def test_without_torchao_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    for name in list(sys.modules):
        if name.startswith("torchao."):
            monkeypatch.delitem(sys.modules, name)
    net = mlp()
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lit-compress\[torchao\]"'):
        quantize_linears(net)
    with (
        pytest.raises(ModuleNotFoundError, match="lit-compress"),
        torchao_weights_readable(),
    ):
        pass
    assert type(net[0].weight.data) is Tensor


def test_a_torchao_without_a_kernel_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"has no torchao.future.*torchao>=0.18"):
        linear_kernels._torchao("future")
