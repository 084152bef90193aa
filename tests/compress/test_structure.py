import copy
import io
import json
import pickle
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.compress.structure import (
    describe,
    difference,
    note_change,
    record_of,
    replay,
    values_after,
)
from lit_compress.compress.structure_record import (
    STRUCTURE_KEY,
    StructureChange,
    StructureRecord,
)
from tests.slim_nets import chain, cut, keep_last, widths


def state(model):
    """All that must not change on a refusal."""
    return (
        describe(model),
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: id(parameter) for name, parameter in model.named_parameters()},
        record_of(model),
    )


def same_state(a, b):
    equal = all(torch.equal(a[1][name], b[1][name]) for name in (*a[1], *b[1]))
    return (a[0], a[2], a[3]) == (b[0], b[2], b[3]) and equal


def through_json(record):
    return StructureRecord.from_plain(json.loads(json.dumps(record.to_plain())))


def through_torch(record):
    file = io.BytesIO()
    torch.save(record.to_plain(), file)
    file.seek(0)
    return StructureRecord.from_plain(torch.load(file, weights_only=True))


# --- Descriptions ---------------------------------------------------------------------------------


def test_description_of_a_layer():
    layer = nn.LayerNorm([3, 4])
    layer.note, layer.ratio, layer.sizes, layer._hidden = "text", 0.5, [1, 2], 7
    layer.far = float("inf")
    found = describe(layer)
    assert found["normalized_shape"] == (3, 4)
    assert found["weight"] == found["bias"] == (3, 4)
    assert (found["ratio"], found["sizes"], found["elementwise_affine"]) == (0.5, (1, 2), True)
    assert not {"note", "training", "_hidden", "far"} & set(found)


def test_names_are_those_before_compiling():
    network = chain()
    expected = describe(network)
    network[3] = torch.compile(network[3])
    assert describe(network) == expected
    assert describe(torch.compile(chain())) == expected


def test_lazy_parameters_are_left_out():
    network = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2), nn.LazyBatchNorm1d())
    found = describe(network)
    assert "0.weight" not in found
    assert found["1.weight"] == (2, 3)
    before = describe(network)
    network[1].out_features = 1
    assert set(note_change(network, before).values) == {"1.out_features"}


def test_difference_is_what_changed_in_the_models_order():
    network = chain(8, 6)
    before = describe(network)
    keep_last(network, 4, 5)
    change = difference(before, describe(network))
    assert list(change.values)[:2] == ["0.out_channels", "0.weight"]
    assert change.values["0.weight"] == ((8, 1, 3, 3), (4, 1, 3, 3))
    assert change.values["3.in_channels"] == (8, 4)
    assert change.values["3.out_channels"] == (6, 5)
    assert "0.in_channels" not in change.values
    assert difference(before, before) == StructureChange({})


def test_true_and_one_are_not_the_same():
    assert difference({"a": True}, {"a": 1}).values == {"a": (True, 1)}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [({}, {"a.b": 1}, "'a.b' is new; a cut may"), ({"a.b": 1}, {}, "'a.b' is gone; a cut may")],
)
def test_what_comes_or_goes_is_no_cut(before, after, message):
    with pytest.raises(ValueError, match=message):
        difference(before, after)


# --- Records --------------------------------------------------------------------------------------


def test_cuts_are_kept_in_order_and_can_be_squashed():
    network = chain(8, 6)
    assert record_of(network) == StructureRecord()
    first, second = cut(network, 6, 6), cut(network, 3, 4)
    record = record_of(network)
    assert record == StructureRecord().append(first).append(second)
    assert len(record) == 2
    assert record.changes[0].values["0.out_channels"] == (8, 6)
    assert record.changes[1].values["0.out_channels"] == (6, 3)
    assert record.changes[1].values["3.out_channels"] == (6, 4)
    (squashed,) = record.squashed().changes
    assert squashed.values["0.out_channels"] == (8, 3)
    assert squashed.values == record.values()


def test_a_cut_of_nothing_is_not_noted():
    network = chain()
    cut(network, 4, 4)
    record = record_of(network)
    cut(network, 4, 4)
    assert record_of(network) == record
    assert record.append(StructureChange({})) is record


def test_squashing_drops_what_came_back():
    back = StructureRecord().append(StructureChange({"a": (1, 2)}))
    assert back.append(StructureChange({"a": (2, 1)})).squashed() == StructureRecord()


def test_changes_must_follow_on_each_other():
    record = StructureRecord().append(StructureChange({"conv.out_channels": (8, 4)}))
    with pytest.raises(ValueError, match="takes 'conv.out_channels' from 8, but .* with it at 4"):
        record.append(StructureChange({"conv.out_channels": (8, 2)}))


def test_part_of_a_record():
    module = nn.Module()
    module.model = chain()
    cut(module, 4, 4)
    assert set(record_of(module).values()) == {
        f"model.{n}" for n in record_of(module.model).values()
    }
    assert record_of(module).under("model.") == record_of(module.model)
    assert record_of(module).under("other.") == StructureRecord()


@pytest.mark.parametrize("through", [through_json, through_torch])
def test_records_are_plain_data(through):
    network = chain()
    cut(network, 4, 4)
    cut(network, 2, 3)
    record = record_of(network)
    assert through(record) == record
    assert record.to_plain()["changes"][0]["0"]["out_channels"] == [8, 4]
    assert record.size_bytes == len(json.dumps(record.to_plain()))
    assert StructureRecord.in_checkpoint({STRUCTURE_KEY: record.to_plain()}) == record
    assert StructureRecord.in_checkpoint({}) is None


@contextmanager
def suppress_refusal():
    """Nothing goes wrong but with the error that says what is wrong."""
    try:
        yield
    except ValueError as error:
        if "is no structure record" not in str(error):
            raise


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["changes", "a", ""]) | st.integers(), inner, max_size=3
            )
        ),
        max_leaves=8,
    )
)
@settings(deadline=None, max_examples=100)
def test_anything_else_is_refused_as_no_record(plain):
    for content in (plain, {"changes": plain}, {"changes": [{"a": plain}]}):
        with suppress_refusal():
            record = StructureRecord.from_plain(content)
            assert StructureRecord.from_plain(record.to_plain()) == record


# --- Replay ---------------------------------------------------------------------------------------

CUTS = st.lists(
    st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=0, max_size=3
)  # of what is there, the part that each cut keeps of both widths


def kept(width, part):
    return max(1, round(width * part))


@given(st.integers(1, 9), st.integers(1, 9), CUTS)
@settings(deadline=None, max_examples=30)
def test_a_replayed_model_takes_the_weights(first, second, cuts):
    network = chain(first, second).eval()
    for parts in cuts:
        cut(network, *(kept(w, part) for w, part in zip(widths(network), parts, strict=True)))
    other = chain(first, second).eval()
    identities = {name: id(p) for name, p in other.named_parameters()}
    replay(other, through_json(record_of(network)))
    assert describe(other) == describe(network)
    assert record_of(other) == record_of(network)
    assert {name: id(p) for name, p in other.named_parameters()} == identities
    other.load_state_dict(network.state_dict())
    images = torch.randn(2, 1, 7, 7)
    assert torch.equal(other(images), network(images))


@given(CUTS, CUTS)
@settings(deadline=None, max_examples=30)
def test_any_structure_can_follow_any_other(cuts, others):
    dense = describe(chain())
    network, other = chain(), chain()
    for model, choice in ((network, cuts), (other, others)):
        for parts in choice:
            cut(model, *(kept(w, part) for w, part in zip(widths(model), parts, strict=True)))
    replay(network, record_of(other))
    assert describe(network) == describe(other)
    replay(network, record_of(other))  # nothing to do
    assert record_of(network) == record_of(other)
    replay(network, StructureRecord())
    assert describe(network) == dense
    assert not any("_structure_history" in vars(module) for module in network.modules())


@given(st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None, max_examples=30)
def test_another_model_is_refused_and_left_alone(first, second):
    network = chain(8, 6)
    cut(network, 4, 3)
    other = chain(first, second)
    before = state(other)
    if (first, second) in [(8, 6), (4, 3)]:
        replay(other, record_of(network))
        assert widths(other) == (4, 3)
        return
    where, found, expected = ("0", first, 8) if first != 8 else ("3", second, 6)
    message = f"'out_channels' of module '{where}' is {found}, expected {expected}"
    with pytest.raises(
        ValueError, match=f"the record of a.ckpt does not fit Sequential: {message}"
    ):
        replay(other, record_of(network), "the record of a.ckpt")
    assert same_state(state(other), before)


def slim_record():
    network = chain()
    cut(network, 4, 3)
    return record_of(network)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.__setitem__(3, nn.Identity()), "'in_channels' of module '3' is missing"),
        (lambda n: n.__setitem__(6, nn.Linear(6, 5)), r"'weight' of module '6' is \(5, 6\), expe"),
        (lambda n: setattr(n[1], "num_features", 9), "'num_features' of module '1' is 9, expected"),
        (lambda n: setattr(n[1], "num_features", None), "'num_features' of module '1' is None"),
        (lambda n: cut(n, 5, 5) and n.__setitem__(6, nn.Linear(7, 4)), "'in_features' of module"),
    ],
)
def test_the_first_mismatch_is_named(change, message):
    network = chain()
    change(network)
    before = state(network)
    with pytest.raises(ValueError, match=f"{message}.* Build the model with the arguments"):
        replay(network, slim_record())
    assert same_state(state(network), before)


def test_a_mismatch_in_the_root_itself():
    layer = nn.Linear(4, 3)
    record = StructureRecord().append(StructureChange({"out_features": (5, 2)}))
    with pytest.raises(ValueError, match="'out_features' of the model itself is 3, expected 5"):
        replay(layer, record)


@pytest.mark.parametrize("shape", [(4, 1, 3), (4, 1, 3, -3), None, 4])
def test_impossible_shapes_are_refused(shape):
    network = chain()
    before = state(network)
    values = {"0.out_channels": (8, 4), "0.weight": ((8, 1, 3, 3), shape)}
    with pytest.raises(ValueError, match="is damaged: it gives the tensor '0.weight' the shape"):
        replay(network, StructureRecord((StructureChange(values),)))
    assert same_state(state(network), before)


def test_what_replay_would_set():
    network = chain()
    values = values_after(network, slim_record())
    assert widths(network) == (8, 6)
    assert values["0.out_channels"] == 4
    replay(network, slim_record())
    assert {name: describe(network)[name] for name in values} == values
    assert values_after(network, StructureRecord())["0.out_channels"] == 8


def test_what_is_kept_of_a_resized_tensor():
    network = chain().to(memory_format=torch.channels_last)
    network[3].weight.requires_grad_(False)
    network(torch.randn(2, 1, 7, 7)).sum().backward()
    was = network[3].weight.detach().clone()
    replay(network, slim_record())
    weight = network[3].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert torch.equal(weight, was[:3, :4])
    assert not weight.requires_grad
    assert network[0].weight.requires_grad
    assert network[0].weight.grad is None
    replay(network, StructureRecord())
    assert network[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(network[3].weight[:3, :4], was[:3, :4])
    assert int(network[3].weight[3:].count_nonzero()) == 0


def test_sequences_keep_their_type():
    network = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(torch.Size([4])))
    network[0].sizes = [4, 4]
    replaced = copy.deepcopy(network)
    before = describe(replaced)
    for layer in replaced:
        layer.normalized_shape = (2,)
        layer.weight.data = layer.weight.data[:2]
        layer.bias.data = layer.bias.data[:2]
    replaced[0].sizes = [2, 4]
    note_change(replaced, before)
    replay(network, through_json(record_of(replaced)))
    assert network[0].normalized_shape == (2,)
    assert type(network[0].normalized_shape) is tuple
    assert network[0].sizes == [2, 4]
    assert network(torch.randn(3, 2)).shape == (3, 2)


def test_shared_modules_and_tied_parameters_stay_so():
    network = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6, bias=False)})
    network["c"] = network["a"]
    network["b"].weight = network["a"].weight
    dense = copy.deepcopy(network)
    before = describe(network)
    network["a"].weight.data = network["a"].weight.data[:, :3].clone()
    network["a"].in_features = network["b"].in_features = 3
    note_change(network, before)
    record = record_of(network)
    assert record.values()["c.in_features"] == record.values()["a.in_features"] == (4, 3)
    replay(dense, through_json(record))
    assert dense["c"] is dense["a"]
    assert dense["b"].weight is dense["a"].weight
    assert dense["b"].weight.shape == (6, 3)
    assert record_of(dense) == record
    replay(dense, StructureRecord())
    assert dense["b"].weight.shape == (6, 4)


@pytest.mark.parametrize("inside", [True, False])
def test_compiled_models_and_plain_ones_fit_each_other(inside):
    def compiled():
        network = chain()
        if not inside:
            return torch.compile(network, backend="eager")
        for index in (0, 3):
            network[index] = torch.compile(network[index], backend="eager")
        return network

    network = compiled()
    images = torch.randn(2, 1, 7, 7)
    network(images)
    replay(network, slim_record())
    assert record_of(network) == slim_record()
    other = chain()
    replay(other, record_of(network))
    weights = {name: torch.randn_like(p) for name, p in other.named_parameters()}
    for model in (network, other):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(weights[name.replace("_orig_mod.", "")])
    torch.testing.assert_close(network(images), other(images))


def test_copies_parts_and_pickles_know_how_to_go_back():
    network = chain()
    cut(network, 4, 3)
    pickled = pickle.loads(pickle.dumps(network))
    part = copy.deepcopy(network[0])
    for model in (copy.deepcopy(network), pickled):
        assert record_of(model) == record_of(network)
        replay(model, StructureRecord())
        assert widths(model) == (8, 6)
    assert record_of(part).values() == {
        "out_channels": (8, 4),
        "weight": ((8, 1, 3, 3), (4, 1, 3, 3)),
    }
    elsewhere = nn.Module()
    elsewhere.body = network
    assert record_of(elsewhere).under("body.") == record_of(network)
    assert widths(network) == (4, 3)


def test_the_state_dict_shows_nothing_of_it():
    network = chain()
    keys = set(network.state_dict())
    cut(network, 4, 3)
    assert set(network.state_dict()) == keys


def test_a_rebuilt_part_is_dense_again():
    network = chain()
    cut(network, 4, 3)
    for index in (0, 1, 3, 6):
        network[index] = chain()[index]
    assert record_of(network) == StructureRecord()
    replay(network, slim_record())
    assert widths(network) == (4, 3)
