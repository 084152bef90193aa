"""Arguments and results of any nesting as flat tuples."""

import pytest
import torch
from torch import nn

from lit_compress.deploy import export, load_file
from lit_compress.deploy.flat_call import FlatCall, flat_inputs
from tests.deploy.nets import Nested, images, small_net


def nested_inputs(count=2):
    scales = {"gain": torch.rand(count), "shift": torch.rand(count)}
    return {"image": images(count), "scales": scales, "flip": True}


def test_a_tensor_a_tuple_and_keywords_are_one_call():
    net, x = small_net(), images()
    for inputs in (x, (x,), [x], {"image": x}):
        call = FlatCall(net, inputs)
        assert call.input_names == ("image",)
        (output,) = call(*flat_inputs(inputs))
        assert torch.equal(output, net(x))


def test_nests_are_flattened_and_constants_kept():
    inputs = nested_inputs()
    call = FlatCall(Nested(), inputs)
    assert call.input_names == ("image", "scales_gain", "scales_shift")
    mean, everything, total = call(*flat_inputs(inputs))
    expected = Nested()(**inputs)
    assert torch.equal(mean, expected["mean"])
    assert torch.equal(everything, expected["all"][0])
    assert torch.equal(total, expected["all"][1])


def test_other_tensors_may_be_given():
    call = FlatCall(Nested(), nested_inputs())
    other = nested_inputs(5)
    assert call(*flat_inputs(other))[0].shape == (5, 3)


def test_no_tensor_out_is_refused():
    class Silent(nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(ValueError, match="Silent returns no tensor"):
        FlatCall(Silent(), images())(images())


def test_inputs_come_contiguous_and_without_gradient():
    x = images().requires_grad_().transpose(2, 3)
    (flat,) = flat_inputs(x)
    assert flat.is_contiguous()
    assert not flat.requires_grad


class AnyKeywords(nn.Module):
    def forward(self, **kwargs):
        return kwargs["input_ids"] - kwargs["attention_mask"]


class OneMapping(nn.Module):
    def forward(self, inputs):
        return inputs["input_ids"] - inputs["attention_mask"]


class Ordered(nn.Module):
    def forward(self, first, second=None, *more, **others):
        return first


def tokens():
    return {"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": torch.ones(2, 3).long()}


@pytest.mark.parametrize("inputs", [tokens(), (tokens(),)], ids=["keywords", "one dictionary"])
def test_keys_of_dictionaries_are_names(inputs):
    net = AnyKeywords() if isinstance(inputs, dict) else OneMapping()
    call = FlatCall(net, inputs)
    assert call.input_names == ("input_ids", "attention_mask")
    assert torch.equal(call(*flat_inputs(inputs))[0], tokens()["input_ids"] - 1)


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        # In the order of the call, not of the signature.
        ({"second": 2, "first": 1}, ("second", "first")),
        ((1, 2, 3, 4), ("first", "second", "more_0", "more_1")),
        ({"first": {"a": [1, 2], "b": 3}}, ("first_a_0", "first_a_1", "first_b")),
        ({"first": [1], "second": [2, 3]}, ("first", "second_0", "second_1")),
        ({"first": 1, "past": {"key.0": 2, "key/0": 3}}, ("first", "past_key_0", "past_key_0_2")),
        ({"first": 1, "größe": 2, "2nd": 3}, ("first", "gr__e", "input_2nd")),
        (
            {"first": {"x_y": 1}, "first_x": {"y": 2, "z": 3}},
            ("first_x_y", "first_x_y_2", "first_x_z"),
        ),
    ],
)
def test_names_are_readable_and_unique(inputs, names):
    inputs = torch.utils._pytree.tree_map(lambda n: torch.full((2,), float(n)), inputs)
    call = FlatCall(Ordered(), inputs)
    assert call.input_names == names
    call(*flat_inputs(inputs))


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_names_are_in_the_file(target, tmp_path):
    pytest.importorskip({"onnx": "onnxruntime"}.get(target, target))
    done = export(AnyKeywords(), target, tmp_path / "net", tokens())
    assert done.batch_size is None
    with load_file(done.path) as loaded:
        if target == "onnx":
            names = [place.name for place in loaded._runner._loaded.get_inputs()]
        else:
            names = [place.get_any_name() for place in loaded._runner._compiled.inputs]
    assert names == ["input_ids", "attention_mask"]
