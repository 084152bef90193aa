"""Calls have the same names in every run, and nobody else is seen or disturbed."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from lit_compress.compress.quantization.calls import (
    layer_arguments,
    record_calls,
    seen_calls,
    with_layer_arguments,
)
from tests.compress.quantization.nets import NETS, Functional, Residual, call, made


def names_in(net, inputs) -> list[str]:
    names: list[str] = []

    def handle(name, op, func, args, kwargs):
        names.append(name)
        return func(*args, **kwargs)

    with seen_calls(net, handle):
        call(net, inputs)
    return names


@pytest.mark.parametrize("name", NETS)
def test_every_recorded_call_comes_again_under_its_name(name):
    net, inputs = made(name)
    trace = record_calls(net, lambda n: call(n, inputs))
    again = names_in(net, inputs)
    assert set(trace.calls) <= set(again)
    assert [n for n in again if n in trace.calls] == list(trace.calls)
    assert len(set(again)) == len(again)


def test_flow_is_followed_from_inputs_to_outputs():
    net, inputs = made("residual")
    trace = record_calls(net, lambda n: call(n, inputs))
    calls = trace.calls
    assert calls["stem.0:conv2d:0"].inputs == ("input:0",)
    assert calls["stem.0:conv2d:0"].weight == "stem.0.weight"
    assert calls["stem.0:conv2d:0"].bias is None
    assert calls["stem.1:batch_norm:0"].inputs[:1] == ("stem.0:conv2d:0",)
    # In place, by the same tensor, and out of place.
    assert calls[":add:0"].inputs == ("bn1:batch_norm:0", "stem.2:relu:0")
    assert calls["relu:relu:0"].inputs == (":add:0",)
    assert calls[":add:1"].inputs == ("bn2:batch_norm:0", ":pad:0")
    assert calls[":cat:0"].inputs == ("conv3:conv2d:0", "relu:relu:1")
    assert calls["conv4:pad:0"].inputs == (":cat:0",)
    assert calls["fc:linear:0"].bias == "fc.bias"
    assert trace.outputs == {"fc:linear:0"}
    assert trace.users()["relu:relu:0"] == ["conv2:conv2d:0", ":getitem:0"]
    assert calls["conv4:pad:0"].module == "conv4"
    assert calls[":add:0"].module == ""


def test_layers_without_modules_are_known_by_their_parameters():
    net, inputs = made("functional")
    trace = record_calls(net, lambda n: call(n, inputs))
    layers = {c.name: (c.inputs, c.weight, c.bias) for c in trace.calls.values() if c.weight}
    assert layers == {
        ":conv2d:0": (("input:0",), "kernel", "shift"),
        ":conv_transpose2d:0": ((":relu:0",), "up", None),
        ":linear:0": ((":flatten:0",), "inner.weight", None),
    }
    assert trace.readers == {
        "kernel": [":conv2d:0"], "shift": [":conv2d:0"], "up": [":conv_transpose2d:0"],
        "inner.weight": [":linear:0"],
    }  # fmt: skip


def test_nested_inputs_are_numbered_in_order_and_outputs_found():
    net, inputs = made("nested")
    trace = record_calls(net, lambda n: call(n, inputs))
    assert trace.calls["left:conv2d:0"].inputs == ("input:0",)
    assert trace.calls["right:conv2d:0"].inputs == ("input:1",)
    assert trace.calls[":add:1"].inputs == ("input:2",)
    assert trace.outputs == {":mul:0", ":relu:1", ":add:1"}


def test_computed_and_stored_weights_and_biases_are_told_apart():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))
            self.register_buffer("fixed", torch.ones(2, 3))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [
                F.linear(x, self.weight, self.bias * 2),
                F.linear(x, self.weight * 2, self.bias),
                F.linear(x, self.fixed),
            ]

    calls = record_calls(Net(), lambda n: n(torch.ones(1, 3))).calls
    found = [(c.weight, c.bias, c.computes_bias) for c in calls.values() if c.op == "linear"]
    assert found == [("weight", None, True), (None, "bias", False), (None, None, False)]


def test_recording_changes_nothing():
    net, inputs = made("plain")
    net.train()
    net[5].eval()
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    attributes = dict(vars(net))
    record_calls(net, lambda n: call(n, inputs))
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert modes == [m.training for m in net.modules()]
    assert vars(net) == attributes
    assert not module_hooks._global_forward_pre_hooks
    assert not module_hooks._global_forward_hooks


def test_a_forward_set_on_the_instance_comes_back():
    net, inputs = made("plain")
    forward = net.forward

    def other(x: Tensor) -> Tensor:
        return forward(x)

    net.forward = other
    record_calls(net, lambda n: call(n, inputs))
    assert net.forward is other


def test_what_happens_around_the_network_does_not_count():
    net, inputs = made("residual")
    alone = record_calls(net, lambda n: call(n, inputs))

    def step(n: nn.Module) -> Tensor:
        images = inputs[0][0].mul(1.0).add(0.0) + 0.0
        logits = n(images)
        return F.cross_entropy(logits + 0.0, torch.zeros(4).long()) + n(images).sum()

    assert record_calls(net, step) == alone


def test_forward_called_by_its_name_is_recorded():
    net, inputs = made("residual")
    alone = record_calls(net, lambda n: call(n, inputs))
    assert record_calls(net, lambda n: n.forward(*inputs[0])) == alone


def test_a_run_that_leaves_the_network_out_is_refused():
    net, inputs = made("plain")
    with pytest.raises(ValueError, match="running Sequential called no torch function inside"):
        record_calls(net, lambda n: inputs[0][0] * 2)


def test_modules_called_inside_are_left_when_they_fail():
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.broken, self.fc = nn.Linear(5, 5), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.broken(x)
            except RuntimeError:
                x = x * 2
            return self.fc(x)

    trace = record_calls(Careful(), lambda n: n(torch.ones(1, 3)))
    assert list(trace.calls) == [":mul:0", "fc:linear:0"]


def test_other_threads_neither_see_nor_disturb():
    net, inputs = made("residual")
    expected = names_in(net, inputs)
    started, stop = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def elsewhere() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    call(net, inputs)
                started.set()
        except BaseException as error:
            failures.append(error)
            started.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    try:
        started.wait(10)
        seen = [names_in(net, inputs) for _ in range(20)]
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert seen == [expected] * 20


def test_hooks_of_other_threads_do_not_move_the_place():
    # The same, without luck: another thread enters a module in the middle of a forward.
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Waiting()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1

    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                entered.set()
                done.wait(10)
            return x * 2

    entered, done = threading.Event(), threading.Event()
    net, x = Net(), torch.ones(2)
    names = []

    def handle(name, op, func, args, kwargs):
        names.append(name)
        return func(*args, **kwargs)

    with seen_calls(net, handle):
        thread = threading.Thread(target=net, args=(x,))
        thread.start()
        assert entered.wait(10)
        net(x)
        done.set()
        thread.join()
    assert names == ["inner:mul:0", ":add:0"]


def test_counts_are_given():
    net, inputs = made("shared")
    with seen_calls(net, lambda name, op, func, args, kwargs: func(*args, **kwargs)) as counts:
        call(net, inputs)
    assert counts["conv:conv2d"] == 2
    assert counts["relu:relu"] == 3


def test_layer_arguments_by_place_and_by_name():
    x, w, b = (torch.full((1,), float(i)) for i in range(3))
    for args, kwargs in (((x, w, b), {}), ((x, w), {"bias": b}), ((), {"weight": w, "input": x,
                                                                       "bias": b})):  # fmt: skip
        assert layer_arguments(args, kwargs) == (x, w, b)
        changed = with_layer_arguments(args, kwargs, w + 5, None)
        assert layer_arguments(*changed) == (x, w + 5, None)
    assert layer_arguments((x, w), {}) == (x, w, None)


def test_nets_hold_what_they_are_named_after():
    # So that the tests above are about something.
    assert any(isinstance(m, nn.Dropout) for m in made("plain")[0])
    assert not list(Functional().children())[1:]
    assert isinstance(made("residual")[0], Residual)
