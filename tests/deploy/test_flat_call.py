"""Arguments and results of any nesting as flat tuples."""

import pytest
import torch
from torch import nn

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
    assert call.input_names == ("image", "scales_0", "scales_1")
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
