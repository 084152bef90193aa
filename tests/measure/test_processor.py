"""What a processor is called and has."""

import pytest

from lit_compress.measure.processor import FEATURES, describe_processor, processor

CPUINFO = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n{field}\t\t: fpu {flags} sse\n\n"


@pytest.mark.parametrize(
    ("field", "flags", "known"),
    [
        ("flags", "avx2", ["avx2"]),
        ("flags", "avx avx512", []),
        ("flags", "avx2 avx_vnni", ["avx2", "vnni"]),
        ("flags", "avx2 avx512f avx512_vnni amx_int8", ["avx2", "avx512", "vnni", "amx"]),
        ("Features", "asimd asimddp", ["asimddp"]),
    ],
)
def test_flags_are_read_as_linux_spells_them(field, flags, known):
    text = CPUINFO.format(field=field, flags=flags)
    name, features = processor(text)
    assert name == "Some CPU @ 2 GHz"
    assert [feature for feature, found in features.items() if found] == known
    shown = f"{name} ({', '.join(known)})" if known else name
    assert describe_processor(text) == shown


def test_unknown_flags_are_not_absent_ones():
    name, features = processor("")
    assert name
    assert features == dict.fromkeys(FEATURES)
    assert describe_processor("").endswith("(features unknown)")


def test_this_one_has_a_name():
    assert describe_processor().startswith(processor()[0])
