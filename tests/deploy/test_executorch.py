"""What is written differently for XNNPACK computes the same."""

import pytest
import torch

from lit_compress.compress.quantization.integers import integer_network
from lit_compress.deploy import export
from lit_compress.deploy.executorch import (
    ExecutorchRoute,
    put_sequences_in_2d,
    quantize_before_concatenation,
    quantize_free_products,
    separate_dequantization,
)
from lit_compress.deploy.exporting import exported_program
from lit_compress.deploy.flat_call import FlatCall
from tests.deploy.nets import ends_in_convolutions

_OPS = torch.ops.quantized_decomposed


def of_integers(program, layer):
    """Whether a layer of the program has integer weights, and a range of the moment."""
    nodes = []
    for node in program.graph.nodes:
        paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        if "conv" in str(node.target) and any(path.endswith(layer) for path in paths):
            nodes.append(node)
    (node,) = nodes
    x, weight = node.args[:2]
    integers = weight.target is _OPS.dequantize_per_channel.default
    return integers, x.target is _OPS.dequantize_per_tensor.tensor


@pytest.mark.parametrize("kind", ["maps", "sequences", "two ends"])
def test_rewritten_programs_compute_the_same(kind):
    net, x = ends_in_convolutions()[kind]
    call = FlatCall(integer_network(net, ExecutorchRoute.spelling), x).eval()
    program = exported_program(call, (x,))
    quantize_before_concatenation(program)
    put_sequences_in_2d(program)
    quantize_free_products(program)
    separate_dequantization(program)
    with torch.no_grad():
        ours, theirs = call(x), program.module()(x)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=0.02 * float(a.abs().max()))
    if kind == "two ends":
        assert of_integers(program, "depthwise") == (False, False)
        assert of_integers(program, "up") == (False, False)
    else:
        assert of_integers(program, "first") == (True, False)
        assert of_integers(program, "last") == (True, True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["maps", "sequences", "two ends"])
@pytest.mark.parametrize("target", ["executorch", "litert", "openvino", "ort-int8"])
def test_networks_that_end_in_convolutions(target, kind, tmp_path):
    pytest.importorskip({"litert": "litert_torch", "ort-int8": "onnxruntime"}.get(target, target))
    net, x = ends_in_convolutions()[kind]
    done = export(net, target, tmp_path / "net", x)
    assert done.integers
    assert done.parity.cosine > 0.999
