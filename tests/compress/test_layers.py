import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from lit_compress.compress.layers import select_weights
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


def test_unknown_types_are_refused():
    with pytest.raises(ValueError, match="layer_types holds 'norm', expected some of conv"):
        select_weights(Zoo(), layer_types=["norm"])


def test_an_empty_selection_lists_the_reasons():
    with pytest.raises(ValueError, match="no layer is left(.|\n)*head.weight: matches ignored"):
        select_weights(Zoo(), ignored_layers=["*"])
