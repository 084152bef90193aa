"""What a user may declare, and what is refused at once."""

import dataclasses
import json

import pytest

from lit_compress.compress.quantization.affine import Grid
from lit_compress.compress.quantization.scheme import QuantizationScheme


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 1}, "weight_bits is 1; expected a whole number of bits from 2 to 8"),
        ({"weight_bits": 9}, "weight_bits is 9"),
        ({"weight_bits": 4.0}, "weight_bits is 4.0"),
        ({"weight_bits": "8"}, "weight_bits is '8'"),
        ({"weight_bits": True}, "weight_bits is True"),
        ({"weight_bits": None}, "weight_bits is None"),
        ({"activation_bits": 16}, "activation_bits is 16"),
        ({"activation_bits": False}, "activation_bits is False"),
        ({"layer_bits": [("conv", 4)]}, r"layer_bits is \[\('conv', 4\)\]; give a mapping"),
        ({"layer_bits": {"conv": 12}}, r"layer_bits\['conv'\] is 12"),
        ({"layer_bits": {3: 4}}, "layer_bits has the key 3; give a name pattern"),
        ({"weight_ranges": "max"}, "weight_ranges is 'max'; choose one of minmax, mse, learned"),
        ({"activation_ranges": None}, "activation_ranges is None; choose one of observed"),
        ({"ignored_layers": "fc"}, r"ignored_layers is the string 'fc'; give a list, as in \['fc'"),
        ({"ignored_layers": [1]}, r"ignored_layers is \[1\]; give a list of names"),
        ({"ignored_layers": 5}, "ignored_layers is 5; give a list of names"),
        ({"per_tensor_weights": "a"}, "per_tensor_weights is the string 'a'"),
        ({"quantize_first_layer": 1}, "quantize_first_layer is 1; give true or false"),
        ({"quantize_last_layer": "no"}, "quantize_last_layer is 'no'; give true or false"),
    ],
)
def test_values_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationScheme(**arguments)


def test_the_first_pattern_that_matches_counts():
    scheme = QuantizationScheme(6, layer_bits={"body.*.conv?": 3, "body.*": 4})
    bits = {name: scheme.weight_grid(name) for name in ("body.0.conv1", "body.0.fc", "head")}
    assert bits == {
        "body.0.conv1": Grid(3, signed=True),
        "body.0.fc": Grid(4, signed=True),
        "head": Grid(6, signed=True),
    }


def test_names_of_layers_take_the_place_of_patterns():
    scheme = QuantizationScheme(layer_bits={"net.a*": 4, "*": 6}, ignored_layers=["net.c"])
    named = scheme.for_layers(["a[0]", "a1", "b", "c"], "net")
    assert named.layer_bits == {"a[[]0]": 4, "a1": 4, "b": 6, "c": 6}
    assert [named.weight_grid(name).bits for name in ("a[0]", "a1", "b")] == [4, 4, 6]
    assert [named.ignores(name) for name in ("a1", "c")] == [False, True]
    assert named.for_layers(["a[0]", "a1", "b", "c"], "net") == named
    assert scheme.layer_bits == {"net.a*": 4, "*": 6}


def test_grids_of_activations():
    assert QuantizationScheme(activation_bits=4).activation_grid == Grid(4, signed=False)
    assert QuantizationScheme(activation_bits=None).activation_grid is None


def test_plain_data_makes_the_same_scheme_again():
    scheme = QuantizationScheme(
        4, None, {"a*": 2}, "mse", "dynamic", ["b"], False, False, ["c.weight"]
    )
    plain = json.loads(json.dumps(scheme.to_plain()))
    assert QuantizationScheme(**plain) == scheme
    assert set(plain) == {field.name for field in dataclasses.fields(scheme)}
    assert QuantizationScheme(**plain).to_plain() == plain


def test_more_weights_of_one_scale_join_those_there_are():
    scheme = QuantizationScheme(per_tensor_weights=["a.weight"])
    assert scheme.with_per_tensor(["b.weight"]).per_tensor_weights == ("a.weight", "b.weight")
    assert scheme.per_tensor_weights == ("a.weight",)


def test_what_is_handed_in_may_change_afterwards():
    bits, ignored = {"a": 4}, ["b"]
    scheme = QuantizationScheme(layer_bits=bits, ignored_layers=ignored)
    bits["a"] = 99
    ignored.append("c")
    assert scheme.weight_grid("a").bits == 4
    assert scheme.ignored_layers == ("b",)
