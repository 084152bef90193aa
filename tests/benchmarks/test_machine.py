"""What a benchmark writes of its machine, and how long it says that it will take."""

import json
import time

import pytest
from machine import machine, rounded, say_duration, seconds_of

from lit_compress.measure.processor import FEATURES


def test_a_machine_is_plain_data_with_all_that_times_depend_on():
    found = json.loads(json.dumps(machine()))
    asked = {"processor", *FEATURES, "cores", "load_average", "num_threads", "python", "torch"}
    assert found.keys() >= asked
    assert found["cores"] >= 1


def test_a_duration_is_so_many_units_of_work(capsys):
    calls = []

    def unit():
        calls.append(None)
        time.sleep(0.5 if len(calls) == 1 else 0.01)  # the first does not count

    seconds = say_duration(1000, unit)
    assert 10 <= seconds < 60
    assert str(rounded(seconds)) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, 1), (7.6, 8), (43, 40), (97, 100), (248, 250)]
)
def test_durations_are_rounded(seconds, shown):
    assert rounded(seconds) == shown


def test_the_median_of_a_call():
    assert 0.02 <= seconds_of(lambda: time.sleep(0.02)) < 0.2
