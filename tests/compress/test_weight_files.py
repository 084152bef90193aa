import pytest
import torch
from torch import nn

from lit_compress.compress.structure import record_of
from lit_compress.compress.structure_record import STRUCTURE_KEY, StructureRecord
from lit_compress.compress.weight_files import (
    load_checkpoint,
    load_weights,
    read_checkpoint,
    read_weights,
    structure_for,
)
from tests.slim_nets import chain, cut, widths

MEND = "Give others."


def net():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}])
def test_bare_and_wrapped_state_dicts_are_read(tmp_path, wrap):
    weights = net().state_dict()
    torch.save(wrap(weights), tmp_path / "file.pt")
    assert equal(read_weights(tmp_path / "file.pt"), weights)
    assert set(read_checkpoint(tmp_path / "file.pt")) >= {"state_dict"}


@pytest.mark.parametrize("prefix", ["", "model.", "student.net."])
def test_a_prefix_is_stripped_and_the_rest_ignored(prefix):
    source, target = net(), net()
    weights = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    if prefix:
        weights["elsewhere.weight"] = torch.ones(1)
    load_weights(target, weights, "file", MEND)
    assert equal(target.state_dict(), source.state_dict())


def test_compiled_parts_and_plain_ones_fit_each_other():
    source, target = net(), nn.Sequential(*net())
    target[0] = torch.compile(target[0])
    load_weights(target, source.state_dict(), "file", MEND)
    assert torch.equal(target[0]._orig_mod.weight, source[0].weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("1.bias"), "'1.bias' is missing. Give others."),
        (lambda w: w.update({"9.bias": torch.ones(1)}), "'9.bias' is unknown to it. Give others."),
        (lambda w: w.update({"0.bias": torch.ones(4)}), r"'0.bias' has shape \(4,\), expected \(3"),
    ],
)
def test_the_first_misfit_is_named_and_nothing_changes(change, message):
    target = net()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    weights = dict(net().state_dict())
    change(weights)
    with pytest.raises(ValueError, match=f"'file' do not fit Sequential: {message}"):
        load_weights(target, weights, "file", MEND)
    assert equal(target.state_dict(), before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected a Lightning checkpoint"),
        ({"lr": 0.1}, r"holds no weights but the keys \['lr'\]"),
        ({"state_dict": {}}, r"holds no weights but the keys \['state_dict'\]"),
        (net(), "cannot be read .* pickled objects, which are never loaded"),
    ],
)
def test_files_without_weights_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "file.pt")


@pytest.mark.parametrize("keep", [0, 10, 500])
def test_truncated_files_are_refused_and_left_alone(tmp_path, keep):
    file = tmp_path / "file.pt"
    torch.save(net().state_dict(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"file.pt' cannot be read .*it is truncated"):
        read_weights(file)
    assert len(file.read_bytes()) == keep


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file '.*gone.pt'"):
        read_weights(tmp_path / "gone.pt")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_network_gets_the_structure_that_the_weights_need(prefix):
    source, target = chain(), chain()
    cut(source, 3, 2)
    slim, whole = nn.Module(), chain().state_dict()
    slim.model = source
    record = record_of(source if not prefix else slim)
    weights = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    checkpoint = {"state_dict": weights, STRUCTURE_KEY: record.to_plain()}
    load_checkpoint(target, checkpoint, "file", MEND)
    assert equal(target.state_dict(), source.state_dict())
    assert structure_for(target, checkpoint, prefix) == record_of(target) == record_of(source)
    load_checkpoint(target, {"state_dict": weights}, "file", MEND)  # as it is
    assert widths(target) == (3, 2)
    load_weights(target, whole, "file", MEND)  # as it was dense
    assert equal(target.state_dict(), whole)
    assert record_of(target) == StructureRecord()


def test_without_strictness_weights_may_be_missing_or_unknown_but_must_fit():
    source, target = net(), net()
    weights = {**source.state_dict(), "9.bias": torch.ones(1)}
    kept = target[0].bias.detach().clone()
    del weights["0.bias"]
    load_checkpoint(target, {"state_dict": weights}, "file", MEND, strict=False)
    assert torch.equal(target[0].weight, source[0].weight)
    assert torch.equal(target[0].bias, kept)
    weights["0.bias"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"'0.bias' has shape \(4,\), expected \(3,\)"):
        load_checkpoint(target, {"state_dict": weights}, "file", MEND, strict=False)
