"""An int8 ONNX file as x86 without VNNI computes it: pairs of products are added in int16.

Every other operator is that of ONNX's reference implementation.
"""

from math import prod

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch.nn import functional as F

__all__ = ["run_on_avx2"]


def run_on_avx2(path, images, saturate=True):
    """The first output of a file, float.

    Args:
        path: An ONNX file with quantize and dequantize operators.
        images: Its input.
        saturate: Whether sums of two products are limited to int16.
    """
    model = onnx.load(str(path))
    graph, versions = model.graph, {o.domain: o.version for o in model.opset_import}
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    values[graph.input[0].name] = images.numpy()
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        given = [values[name] if name else None for name in node.input]
        product = _PRODUCTS.get(node.op_type)
        pair = [makers.get(name) for name in node.input[:2]]
        if product and all(m is not None and m.op_type == "DequantizeLinear" for m in pair):
            (x, xs, xz), (w, ws, _) = ([values[n] for n in maker.input] for maker in pair)
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            sums = product(torch.from_numpy(x), int(xz), torch.from_numpy(w), saturate, attributes)
            shape = [1, -1, *[1] * (sums.dim() - 2)] if node.op_type == "Conv" else [-1]
            y = sums.double() * float(xs) * torch.from_numpy(ws).double().reshape(shape)
            if len(given) > 2:
                y = y + torch.from_numpy(given[2]).double().reshape(shape)
            results = [y.float().numpy()]
        else:
            single = onnx.helper.make_graph(
                [node],
                "node",
                [onnx.helper.make_empty_tensor_value_info(n) for n in node.input if n],
                [onnx.helper.make_empty_tensor_value_info(n) for n in node.output],
            )
            opsets = [onnx.helper.make_opsetid(d, v) for d, v in versions.items()]
            evaluator = ReferenceEvaluator(onnx.helper.make_model(single, opset_imports=opsets))
            results = evaluator.run(None, {n: values[n] for n in node.input if n})
        values.update(zip(node.output, results, strict=True))
    return torch.from_numpy(np.asarray(values[graph.output[0].name]))


def _added(x, weight, saturate):
    """``[..., K]`` times ``[N, K]``, uint8 by int8, in pairs; exact where the weights are uint8."""
    x, w = x.to(torch.int32), weight.to(torch.int32)
    if not saturate or weight.dtype == torch.uint8:
        return (x.double() @ w.double().T).to(torch.int64)
    if x.shape[-1] % 2:
        x, w = F.pad(x, (0, 1)), F.pad(w, (0, 1))
    total = torch.zeros(*x.shape[:-1], len(w), dtype=torch.int32)
    for k in range(0, x.shape[-1], 2):
        both = x[..., k, None] * w[:, k] + x[..., k + 1, None] * w[:, k + 1]
        total += both.clamp_(-(2**15), 2**15 - 1)
    return total.to(torch.int64)


def _conv(x, zero, weight, saturate, attributes):
    strides = attributes.get("strides", [1, 1])
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    groups = attributes.get("group", 1)
    x = F.pad(x.int(), (left, right, top, bottom), value=zero)
    outputs = []
    for part, rows in zip(x.chunk(groups, 1), weight.chunk(groups, 0), strict=True):
        high, wide = rows.shape[2:]
        patches = part.unfold(2, high, strides[0]).unfold(3, wide, strides[1])
        patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3)  # input channels come first
        rows = rows.permute(0, 2, 3, 1).flatten(1)
        depthwise = groups == len(weight) and weight.shape[1] == 1
        outputs.append(_centred(patches, zero, rows, saturate and not depthwise))
    return torch.cat(outputs, -1).permute(0, 3, 1, 2)


def _gemm(x, zero, weight, saturate, attributes):
    rows = weight if attributes.get("transB", 0) else weight.T
    return _centred(x, zero, rows, saturate)


def _centred(x, zero, rows, saturate):
    shift = 128 if rows.dtype == torch.uint8 else 0
    plain = rows.to(torch.int64) - shift
    sums = _added(x, rows, saturate) - shift * x.to(torch.int64).sum(-1, keepdim=True)
    assert prod(plain.shape)
    return sums - zero * plain.sum(1)


_PRODUCTS = {"Conv": _conv, "Gemm": _gemm, "MatMul": _gemm}
