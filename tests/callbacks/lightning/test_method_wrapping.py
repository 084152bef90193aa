import copy
import itertools

import pytest

from lit_compress.callbacks.lightning.method_wrapping import MethodWrapper


class Counter:
    def __init__(self, start=0):
        self.start = start

    def count(self, step, *, times=1):
        return [self.start + step * times]


def noting(mark):
    return lambda method, *args, **kwargs: [*method(*args, **kwargs), mark]


def test_the_wrapper_stands_in_for_the_method():
    counter = Counter(1)
    MethodWrapper(counter, "count", noting("a"))
    assert counter.count(2, times=3) == [7, "a"]
    assert Counter(1).count(2) == [3]


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
@pytest.mark.parametrize("own", [False, True])
def test_wrappers_nest_and_leave_in_any_order(order, own):
    counter = Counter()
    if own:  # an instance attribute already, as in a compiled LightningModule
        counter.count = original = lambda step: ["own", step]
    wrappers = {mark: MethodWrapper(counter, "count", noting(mark)) for mark in "abc"}
    left = list("abc")
    for mark in order:
        wrappers[mark].remove()
        left.remove(mark)
        assert counter.count(1) == [*(["own", 1] if own else [1]), *left]
    assert vars(counter) == ({"start": 0, "count": original} if own else {"start": 0})


def test_removing_twice_does_nothing():
    counter = Counter()
    wrapper = MethodWrapper(counter, "count", noting("a"))
    wrapper.remove()
    outer = MethodWrapper(counter, "count", noting("b"))
    wrapper.remove()
    assert counter.count(1) == [1, "b"]
    outer.remove()
    assert "count" not in vars(counter)


def test_a_copy_runs_its_own_method_unwrapped():
    counter = Counter(1)
    wrappers = [MethodWrapper(counter, "count", noting(mark)) for mark in "ab"]
    copied = copy.deepcopy(counter)
    copied.start = 100
    assert copied.count(1) == [101]
    assert counter.count(1) == [2, "a", "b"]
    for wrapper in wrappers:
        wrapper.remove()
    assert copied.count(1) == [101]


def test_the_innermost_signature_is_the_one_that_is_seen():
    counter = Counter()
    method = counter.count
    for mark in "ab":
        MethodWrapper(counter, "count", noting(mark))
    assert counter.count.__wrapped__ == method
