"""Errors of exports name the layer, the line and the remedy; a fixed batch size is called one."""

import os
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_compress.deploy import ExportError, export
from lit_compress.deploy.exporting import exported_program
from lit_compress.deploy.flat_call import FlatCall
from lit_compress.deploy.places import layers_named_in, place_of_error, words_of_error
from tests.deploy.nets import images, quantized, small_net


class Around(nn.Module):
    """Something odd between a convolution and a linear layer."""

    def __init__(self, odd):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.middle = nn.Sequential(nn.ReLU(), odd)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.middle(self.first(x)).mean((2, 3)))


class Airy(nn.Module):
    def forward(self, x):
        return torch.special.airy_ai(x)


class Branching(nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


ANY_BATCH = pytest.mark.parametrize("target", ["onnx", "openvino"])
MODULES = {"onnx": "onnxscript", "openvino": "openvino"}


@ANY_BATCH
def test_an_unknown_operator_is_placed(target, tmp_path):
    pytest.importorskip(MODULES[target])
    said = r"Around cannot.*airy_ai.*That is aten\.special_airy_ai in 'middle\.1'\. Replace that"
    with pytest.raises(ExportError, match=said):
        export(Around(Airy()), target, tmp_path / "net", images())
    assert os.listdir(tmp_path) == []


@ANY_BATCH
def test_code_that_cannot_be_traced_is_placed(target, tmp_path):
    pytest.importorskip(MODULES[target])
    said = r"That is in 'middle\.1' \(Branching\), test_export_refusals\.py:\d+ \(return x if float"
    with pytest.raises(ExportError, match=said):
        export(Around(Branching()), target, tmp_path / "net", images())


@ANY_BATCH
def test_ranges_of_the_moment_are_refused_with_their_remedy(target, tmp_path):
    pytest.importorskip(MODULES[target])
    net = quantized(Around(nn.Identity()), images(), activation_ranges="dynamic")
    with pytest.raises(ExportError, match=r"choose_qparams.*'first'.*activation_ranges=\"observed"):
        export(net, target, tmp_path / "net", images())


def test_layers_of_an_operator_or_a_node():
    x = images()
    program = exported_program(FlatCall(Around(nn.Conv2d(4, 4, 1)).eval(), x), (x,))

    def named_in(text):
        return [layer for _, layer in layers_named_in(RuntimeError(text), program)]

    assert named_in("no kernel for aten::conv2d") == ["first", "middle.1"]
    assert named_in("Lowering not found: aten.linear.default") == ["head"]
    convs = [n.name for n in program.graph.nodes if "conv2d" in str(n.target)]
    assert named_in(f"at %{convs[1]}: no rule for aten.conv2d") == ["middle.1"]
    assert named_in(f"While executing %{convs[0]}") == ["first"]
    assert named_in("something else") == []


@pytest.mark.parametrize(
    ("layers", "remedy"),
    [("head", r"quantize_last_layer=False, or ignored_layers=\['head'\]"),
     ("first", r"\(ignored_layers=\['first'\], when"),
     ("", "names no layer. Replace that operation")],
)  # fmt: skip
def test_layers_of_integers_can_be_left_out(layers, remedy, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    from lit_compress.deploy.openvino import OpenvinoRoute

    operator = {"head": "aten::linear", "first": "aten::conv2d", "": "nothing"}[layers]

    def fail(*args, **kwargs):
        raise RuntimeError(f"first words\nno kernel for {operator}")

    monkeypatch.setattr(OpenvinoRoute, "export", fail)
    net = quantized(Around(nn.Identity()), images())
    with pytest.raises(ExportError, match=remedy):
        export(net, "openvino", tmp_path / "net", images())


def test_the_line_that_says_most():
    error = RuntimeError("it failed\nsomehow")
    error.__cause__ = KeyError("aten.foo.default")
    assert words_of_error(error) == "KeyError: 'aten.foo.default'"
    assert place_of_error(error, small_net()) is None
    assert words_of_error(RuntimeError("it failed.\nsomehow")) == "RuntimeError: it failed"
    assert words_of_error(RuntimeError()) == "RuntimeError"


# --- Batch sizes ----------------------------------------------------------------------------------


class Reshaped(nn.Module):
    def forward(self, x):
        return x.reshape(4, 3, 12, 12).mean((2, 3))


class WithBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.ones(4, 3))

    def forward(self, x):
        return x.mean((2, 3)) + self.offset


class Looped(nn.Module):
    def forward(self, x):
        return torch.stack([one.mean((1, 2)) for one in x])


class Picked(nn.Module):
    """Runs on four images or more; torch.export says any."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.arange(4))

    def forward(self, x):
        return x.mean((2, 3))[self.rows]


class Below(nn.Module):
    """The line is within a layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return F.relu(self.inner(x))


@ANY_BATCH
@pytest.mark.parametrize(
    ("inner", "code"),
    [(Reshaped, r"return x\.reshape\(4"), (WithBuffer, r"return x\.mean\(\(2, 3\)\) \+ self"),
     (Looped, r"return torch\.stack"), (Picked, r"return x\.mean\(\(2, 3\)\)\[self")],
)  # fmt: skip
def test_who_fixes_the_batch_size(target, inner, code, tmp_path):
    pytest.importorskip(MODULES[target])
    said = (
        rf"takes batches of 4 only: Below itself fixes its batch size, in 'inner' "
        rf"\({inner.__name__}\), test_export_refusals\.py:\d+ \({code}.*x\.shape\[0\].*--batch-size"
    )
    with pytest.warns(UserWarning, match=said):
        done = export(Below(inner()), target, tmp_path / "net", images(4),
                      check_inputs=[images(3), images(8)])  # fmt: skip
    assert done.batch_size == 4
    assert done.parity.cosine > 0.9999


def test_inputs_of_a_batch_size_that_the_network_does_not_take(tmp_path):
    said = (
        r"Below raised RuntimeError \(shape.*invalid.*\) in 'inner' \(Reshaped\), test_export_.*"
        r"reshape.*on example_inputs of \(1, 3, 12, 12\).*runs on a batch of 4"
        r".*--batch-size 4.*x\.shape"
    )
    with pytest.raises(ValueError, match=said):
        export(Below(Reshaped()), "onnx", tmp_path / "net", images(1))
    with pytest.raises(ValueError, match=r"\(2, 5, 12, 12\) float32\. Pass one batch as it takes"):
        export(small_net(), "onnx", tmp_path / "net", torch.zeros(2, 5, 12, 12))


def test_a_limit_of_the_batch_size_is_called_one(tmp_path):
    pytest.importorskip("onnxscript")

    class UpToFour(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("offset", torch.ones(4, 1, 1, 1))

        def forward(self, x):
            return (x + self.offset[: x.shape[0]]).mean((2, 3))

    said = r"UpToFour raised RuntimeError.*self\.offset.*check_inputs of \(8, .*limits its batch"
    with pytest.raises(ValueError, match=said):
        export(UpToFour(), "onnx", tmp_path / "net", images(4), check_inputs=[images(8)])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"assume_vnni": "no"}, "assume_vnni is 'no', expected true or false"),
        ({"num_threads": 0}, "num_threads is 0, expected a whole number of at least 1"),
        ({"num_threads": "2"}, "num_threads is '2', expected"),
        ({"tolerance": 0.01}, "tolerance is 0.01, expected a ParityTolerance"),
        ({"check_inputs": [(images() * torch.nan,)]}, "gives NaN or infinity on check_inputs"),
    ],
)
def test_settings_are_checked_before_anything_is_written(settings, said, tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=said):
        export(small_net(), "onnx", tmp_path / "net.onnx", images(), **settings)
    assert os.listdir(tmp_path) == []


def test_a_file_for_vnni_that_saturates_here_says_so(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    module = import_module("lit_compress.deploy.export")  # the package has a function of this name
    network = quantized(small_net(), images(), weight_bits=8, avoid_saturation=False)
    monkeypatch.setattr(module, "processor", lambda: ("", {"vnni": False}))
    tight = module.ParityTolerance(cosine=1.0, max_error=0.0)
    with pytest.raises(module.ParityError, match="for processors with VNNI, which this one is not"):
        module.export(
            network, "ort-int8", tmp_path / "a.onnx", images(), assume_vnni=True, tolerance=tight
        )
