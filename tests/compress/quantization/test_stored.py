"""Networks take over from a checkpoint what it has quantized, and nothing else."""

import pytest
import torch
from torch import nn

from lit_compress.compress.quantization.network import (
    calibrate,
    is_quantized,
    prepare,
    quantization_record,
)
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.compress.quantization.stored import (
    QUANTIZATION_KEY,
    belongs_to_quantizers,
    quantization_records,
    take_quantization,
)
from tests.compress.quantization.nets import IMAGES, head


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head(4)).eval()


def quantized(bits: int = 8) -> nn.Module:
    network, x = net(), torch.randn(2, *IMAGES)
    prepare(network, QuantizationScheme(bits), lambda n: n(x))
    calibrate(network, lambda n, b: n(b), [x])
    return network


class Pair(nn.Module):
    def __init__(self, student: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.student, self.other = student, other


def checkpoint(module: nn.Module) -> dict[str, object]:
    return {"state_dict": module.state_dict(), QUANTIZATION_KEY: quantization_records(module)}


def test_records_are_by_name():
    pair = Pair(quantized(), net())
    assert quantization_records(pair) == {"student": quantization_record(pair.student)}
    assert quantization_records(pair.student) == {"": quantization_record(pair.student)}
    assert quantization_records(pair.other) == {}


def test_a_file_brings_quantizers_to_where_they_were(tmp_path):
    pair = Pair(quantized(), quantized(4))
    torch.save(checkpoint(pair), tmp_path / "pair.ckpt")
    stored = torch.load(tmp_path / "pair.ckpt", weights_only=True)
    fresh = Pair(net(), net())
    take_quantization(fresh, stored)
    fresh.load_state_dict(stored["state_dict"])
    x = torch.randn(2, *IMAGES)
    assert torch.equal(fresh.student(x), pair.student(x))
    assert torch.equal(fresh.other(x), pair.other(x))
    assert fresh.other.quantization.weight("0.weight").grid.bits == 4


def test_what_is_quantized_alike_gets_the_scales_of_the_checkpoint():
    pair, source = Pair(quantized(), net()), Pair(quantized(), net())
    source.student.quantization.activation("2:relu:0").scale.mul_(3)
    stored = checkpoint(source)
    take_quantization(pair, stored)
    pair.load_state_dict(stored["state_dict"])
    x = torch.randn(2, *IMAGES)
    assert torch.equal(pair.student(x), source.student(x))


def test_what_is_quantized_otherwise_is_replaced():
    pair = Pair(quantized(8), net())
    stored = checkpoint(Pair(quantized(3), net()))
    take_quantization(pair, stored)
    assert pair.student.quantization.scheme.weight_bits == 3
    pair.load_state_dict(stored["state_dict"])


@pytest.mark.parametrize("stored", [{}, {QUANTIZATION_KEY: None}, {QUANTIZATION_KEY: {}}])
def test_what_the_checkpoint_has_not_quantized_comes_off(stored):
    pair = Pair(quantized(), quantized())
    take_quantization(pair, stored)
    assert not is_quantized(pair.student)
    assert not is_quantized(pair.other)
    assert set(pair.state_dict()) == set(Pair(net(), net()).state_dict())


def test_quantizers_move_to_another_network():
    pair = Pair(quantized(), net())
    take_quantization(pair, checkpoint(Pair(net(), quantized())))
    assert not is_quantized(pair.student)
    assert is_quantized(pair.other)


def test_prefixes_choose_a_part_of_the_checkpoint():
    stored = checkpoint(Pair(quantized(), quantized(4)))
    alone, around = net(), nn.ModuleDict({"inner": Pair(net(), net())})
    take_quantization(alone, stored, prefix="other.")
    assert alone.quantization.scheme.weight_bits == 4
    outer = {QUANTIZATION_KEY: {f"model.inner.{k}": v for k, v in stored[QUANTIZATION_KEY].items()}}
    take_quantization(around, outer, prefix="model.")
    assert around["inner"].student.quantization.scheme.weight_bits == 8
    take_quantization(alone, stored, prefix="another.")
    assert not is_quantized(alone)


def test_a_record_of_a_network_that_is_not_there_is_refused():
    stored = checkpoint(Pair(quantized(), net()))
    with pytest.raises(ValueError, match="a.ckpt has a quantized network 'student', which Sequent"):
        take_quantization(net(), stored, source="a.ckpt")


@pytest.mark.parametrize("records", [[1], "int8", {"student": 8}])
def test_records_that_are_none_are_refused(records):
    with pytest.raises(ValueError, match=f"under '{QUANTIZATION_KEY}', expected a quantization"):
        take_quantization(Pair(net(), net()), {QUANTIZATION_KEY: records})


def test_a_record_of_another_structure_is_refused():
    stored = checkpoint(Pair(quantized(), net()))
    with pytest.raises(ValueError, match="quantizes '0.weight', which ReLU does not have"):
        take_quantization(Pair(nn.ReLU(), net()), stored)


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("quantization.weights.0/weight.scale", True),
        ("model.quantization.activations.input:0.low", True),
        ("model.0.weight", False),
        ("dequantization.weight", False),
        ("quantization_head.weight", False),
    ],
)
def test_entries_of_quantizers_are_told_apart(name, belongs):
    assert belongs_to_quantizers(name) == belongs


def test_all_entries_of_quantizers_are_found():
    state, plain = quantized().state_dict(), net().state_dict()
    assert {name for name in state if not belongs_to_quantizers(name)} == set(plain)
