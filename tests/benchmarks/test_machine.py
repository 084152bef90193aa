"""What a benchmark writes of its machine, and how long it says that it will take."""

import json
import time

import pytest
from machine import CPU_FLAGS, machine, processor, rounded, say_duration, seconds_of

CPUINFO = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu {flags} sse\n\n"


@pytest.mark.parametrize(
    ("flags", "known"),
    [
        ("avx2", {"avx2"}),
        ("avx avx512", set()),
        ("avx2 avx_vnni", {"avx2", "vnni"}),
        ("avx2 avx512f avx512_vnni amx_int8", {"avx2", "avx512", "vnni", "amx"}),
    ],
)
def test_flags_are_read_as_linux_spells_them(flags, known):
    found = processor(CPUINFO.format(flags=flags))
    assert found["processor"] == "Some CPU @ 2 GHz"
    assert {name for name in CPU_FLAGS if found[name]} == known


def test_unknown_flags_are_not_absent_ones():
    found = processor("")
    assert found["processor"]
    assert all(found[name] is None for name in CPU_FLAGS)


def test_a_machine_is_plain_data_with_all_that_times_depend_on():
    found = json.loads(json.dumps(machine()))
    asked = {"processor", *CPU_FLAGS, "cores", "load_average", "num_threads", "python", "torch"}
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
