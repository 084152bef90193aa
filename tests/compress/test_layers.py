import glob

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from lit_compress.compress.layers import match_layers, plain_name, select_weights
from lit_compress.compress.sparsity.patterns import Block, NofM


class Zoo(nn.Module):
    """One of each kind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.lstm = nn.LSTM(8, 4)
        self.words = nn.Embedding(10, 8)
        self.position = nn.Parameter(torch.zeros(5, 8))
        self.head = nn.Linear(8, 10)


def reasons(selection):
    return {s.name: s.reason for s in selection.skipped}


def test_defaults_take_what_can_be_sparse_and_say_what_cannot():
    selection = select_weights(Zoo())
    assert selection.names == (
        "stem.weight",
        "grouped.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "head.weight",
    )
    assert reasons(selection) == {
        "position": "Zoo is no layer type that can be made sparse",
        "depthwise.weight": "its type, depthwise, is not among layer_types",
        "words.weight": "its type, embedding, is not among layer_types",
    }
    text = str(selection)
    assert "8 weights are made sparse" in text
    assert "depthwise.weight: its type" in text
    assert f"{selection.num_other} biases and norm parameters" in text


def test_names_and_types_choose():
    selection = select_weights(
        Zoo(), layers=["*e*"], ignored_layers=["stem"], layer_types=["conv", "depthwise", "linear"]
    )
    assert selection.names == (
        "depthwise.weight",
        "grouped.weight",
        "attention.out_proj.weight",
        "head.weight",
    )
    assert reasons(selection)["stem.weight"] == "matches ignored_layers"
    assert reasons(selection)["up.weight"] == "matches none of layers"


def test_patterns_skip_what_does_not_fit():
    selection = select_weights(Zoo(), pattern=NofM(2, 4))
    assert reasons(selection)["stem.weight"].startswith("3 input channels are not a multiple of 4")
    assert "transposed" in reasons(selection)["up.weight"]
    assert reasons(select_weights(Zoo(), pattern=Block(4, 1)))["head.weight"].startswith(
        "shape (10, 8) cannot be cut"
    )


def test_shared_frozen_and_computed_weights_are_left_alone():
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    net[1].weight = net[0].weight
    net[2].requires_grad_(False)
    weight_norm(net[3])
    prune.l1_unstructured(net[4], "weight", 0.5)
    selection = select_weights(net)
    assert selection.names == ("0.weight",)
    found = reasons(selection)
    assert found["1.weight"] == "is the same tensor as 0.weight"
    assert found["2.weight"] == "is frozen"
    assert "computed by a parametrization" in found["3.weight"]
    assert "computed by a parametrization" in found["4.weight"]


def test_lazy_layers_are_named():
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    assert "not initialised yet" in reasons(select_weights(net))["0.weight"]


def test_compiled_parts_keep_their_plain_names():
    net = nn.Sequential(nn.Linear(4, 4))
    net.inner = torch.compile(nn.Sequential(nn.Linear(4, 2)))
    assert select_weights(net).names == ("0.weight", "inner.0.weight")


@pytest.mark.parametrize("argument", ["layers", "ignored_layers"])
def test_a_pattern_that_matches_nothing_names_the_nearest(argument):
    with pytest.raises(ValueError, match=rf"{argument} holds the pattern 'hed', .*'head'"):
        select_weights(Zoo(), **{argument: ["hed"]})


LAYERS = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "fc"]


def matched(patterns, names=LAYERS, prefix="model"):
    return list(match_layers("ignored_layers", patterns, names, prefix))


@pytest.mark.parametrize("prefix", ["model", "deep.inner"])
@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("layer1.*", LAYERS[1:3]),
        ("layer?.0.conv1", [LAYERS[1], LAYERS[3]]),
        ("layer1.0.conv[23]", [LAYERS[2]]),
        ("fc", ["fc"]),
        ("*", LAYERS),
    ],
)
def test_a_pattern_takes_the_same_layers_in_both_spellings(prefix, pattern, found):
    assert matched([pattern], prefix=prefix) == found
    assert matched([f"{prefix}.{pattern}"], prefix=prefix) == found
    assert matched([pattern], prefix="") == found


def test_one_list_may_mix_spellings_and_the_first_match_counts():
    assert match_layers("layer_bits", ["model.fc", "layer1.*", "model.*"], LAYERS, "model") == {
        "conv1": "model.*",
        "layer1.0.conv1": "layer1.*",
        "layer1.0.conv2": "layer1.*",
        "layer2.0.conv1": "model.*",
        "fc": "model.fc",
    }
    assert match_layers("layer_bits", [], LAYERS, "model") == {}


PARTS = st.text("ab*?[]!01_", min_size=1, max_size=4)
NAMES = st.lists(PARTS, min_size=1, max_size=3).map(".".join)


@given(st.lists(NAMES, min_size=1, max_size=6, unique=True), NAMES, st.data())
def test_a_pattern_equal_to_a_name_takes_exactly_that_layer_in_both_spellings(names, prefix, data):
    name = data.draw(st.sampled_from(names))
    assert matched([glob.escape(name)], names, prefix) == [name]
    assume(f"{prefix}.{name}" not in names)
    assert matched([glob.escape(f"{prefix}.{name}")], names, prefix) == [name]


def test_a_name_that_network_and_module_both_have_is_that_in_the_network():
    names = ["head", "model.head"]  # in the LightningModule: model.head, model.model.head
    assert matched(["model.head"], names) == ["model.head"]
    assert matched(["model.model.head"], names) == ["model.head"]
    assert matched(["head"], names) == ["head"]


@pytest.mark.parametrize("argument", ["layers", "ignored_layers", "num_clusters"])
def test_the_nearest_names_come_in_the_spelling_of_the_pattern(argument):
    said = f"{argument} holds the pattern 'conv9', which matches none of the 5 .* 'conv1'"
    with pytest.raises(ValueError, match=said):
        match_layers(argument, ["fc", "conv9"], LAYERS, "model")
    with pytest.raises(ValueError, match="'model.cnv1', .* the nearest names are 'model.conv1'"):
        match_layers(argument, ["model.cnv1"], LAYERS, "model")
    with pytest.raises(ValueError, match="'net.fc', .* names are 'fc'"):
        match_layers(argument, ["net.fc"], LAYERS, "model")
    with pytest.raises(ValueError, match="none of the 0 layers .* the nearest names are none"):
        match_layers(argument, ["*"], [], "model")


def test_names_are_those_before_compilation():
    names = ["_orig_mod.stem", "body._orig_mod.0"]
    assert matched(["body.*"], names) == matched(["model.body.0"], names) == [names[1]]
    assert plain_name("model._orig_mod") == "model"
    assert plain_name("my_orig_mod.weight") == "my_orig_mod.weight"
    with pytest.raises(ValueError, match="the nearest names are 'body.0'"):
        matched(["body.1"], names)


def test_weights_are_chosen_by_both_names_of_their_layers():
    module = nn.ModuleDict({"net": Zoo(), "loss": nn.Linear(2, 2)})
    for patterns in (["attention*", "stem"], ["net.attention*", "net.stem"]):
        inside = select_weights(module["net"], layers=patterns, prefix="net")
        around = select_weights(module, layers=patterns, network="net")
        assert around.names == tuple(f"net.{name}" for name in inside.names)
        assert around.names[0] == "net.stem.weight"
        assert around.taken_by["net.stem.weight"] == patterns[1]
        assert around.taken_by["net.attention.in_proj_weight"] == patterns[0]
    assert select_weights(module, layers=["loss"], network="net").names == ("loss.weight",)
    with pytest.raises(ValueError, match="'hed', which matches none of .*'head'"):
        select_weights(module, layers=["hed"], network="net")


def test_the_network_itself_may_be_the_layer():
    module = nn.ModuleDict({"net": nn.Linear(2, 2)})
    for patterns in (["net"], ["*"]):
        assert select_weights(module, layers=patterns, network="net").names == ("net.weight",)
        assert select_weights(module["net"], layers=patterns, prefix="net").names == ("weight",)


def test_unknown_types_are_refused():
    with pytest.raises(ValueError, match="layer_types holds 'norm', expected some of conv"):
        select_weights(Zoo(), layer_types=["norm"])


def test_an_empty_selection_lists_the_reasons():
    with pytest.raises(ValueError, match="no layer is left(.|\n)*head.weight: matches ignored"):
        select_weights(Zoo(), ignored_layers=["*"])
