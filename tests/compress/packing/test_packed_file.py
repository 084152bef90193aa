import lzma
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.compress.clustering.clustered_weights import ClusteredWeights
from lit_compress.compress.packing import packed_file as packing
from lit_compress.compress.packing.packed_file import pack, read_packed, unpack, write_packed
from lit_compress.compress.packing.tensors import (
    Clustered,
    Integers,
    Raw,
    Sparse,
    num_index_bits,
    pack_bits,
    packed_form,
    unpack_bits,
)

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def same_bits(a, b):
    raw = (a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*raw)


def few(shape, k, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(k, generator=generator).sort().values.to(dtype)
    return centroids[torch.randint(0, k, shape, generator=generator)]


# --- Bits -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(0, 8), st.integers(0, 50))
def test_bits_come_back_and_take_no_more_room_than_they_need(data, bits, num):
    numbers = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=num, max_size=num))
    values = torch.tensor(numbers, dtype=torch.uint8)
    packed = pack_bits(values, bits)
    assert packed.shape == (-(-num * bits // 8),)
    assert torch.equal(unpack_bits(packed, bits, num), values)


def test_bits_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"9 numbers of 3 bits are 4 bytes of uint8; came \(3,\)"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 3, 9)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 16, 17, 255, 256])
def test_index_bits_are_enough_and_not_more(k):
    bits = num_index_bits(k)
    assert 2**bits >= k
    assert bits == 0 or 2 ** (bits - 1) < k


# --- Forms ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from(["dense", "sparse", "few", "one"]),
)
def test_every_form_is_equal_bit_by_bit(dtype, shape, content):
    generator = torch.Generator().manual_seed(len(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if content == "sparse":
        values = values * (torch.rand(shape, generator=generator) < 0.2)  # zeros of both signs
    elif content == "few":
        values = values.round()
    elif content == "one":
        values = torch.full(shape, 3.0, dtype=torch.float64)
    values = values.to(dtype)
    assert same_bits(packed_form(values).values, values)
    assert same_bits(unpack(pack({"x": packed_form(values)})).state_dict["x"], values)


def test_special_floats_keep_their_bits():
    values = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45] * 40)
    values.view(torch.int32)[2] += 1  # another NaN
    form = packed_form(values)
    assert isinstance(form, Clustered)
    assert len(form.centroids) == 7
    assert same_bits(unpack(pack({"x": form})).state_dict["x"], values)


def test_the_smallest_form_is_chosen():
    dense = torch.randn(64, 64)
    sparse = torch.where(torch.rand(64, 64) < 0.8, torch.zeros(()), dense)
    assert isinstance(packed_form(dense), Raw)
    assert isinstance(packed_form(sparse), Sparse)
    assert isinstance(packed_form(few((64, 64), 16)), Clustered)
    assert isinstance(packed_form(few((64, 64), 16, dtype=torch.bfloat16)), Clustered)
    assert isinstance(packed_form(torch.arange(1.0, 5.0)), Raw)
    assert isinstance(packed_form(torch.arange(5)), Raw)


@pytest.mark.parametrize("form", [Raw, Clustered, Sparse])
def test_graphs_and_layouts_are_left_behind(form):
    base = {Raw: torch.randn(64, 32, 3, 3), Clustered: few((8, 4, 3, 3), 3)}
    base[Sparse] = base[Raw].clamp_min(0)
    values = base[form].to(memory_format=torch.channels_last).requires_grad_()
    entry = packed_form(values)
    assert isinstance(entry, form)
    back = unpack(pack({"x": entry})).state_dict["x"]
    assert torch.equal(back, values.detach())
    assert not back.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clustered(torch.ones(2, 2), torch.zeros(3).byte()), r"shape \(2, 2\), expected"),
        (lambda: Clustered(torch.ones(0), torch.zeros(3).byte()), r"shape \(0,\), expected"),
        (lambda: Clustered(torch.ones(2), torch.zeros(3).long()), "indices are torch.int64"),
        (lambda: Clustered(torch.ones(2), torch.full((3,), 2).byte()), "an index is 2, expected"),
        (lambda: Sparse(torch.ones(3), torch.ones(3)), "the mask is torch.float32"),
        (lambda: Sparse(torch.ones(3).bool(), torch.ones(2)), r"shape \(2,\), expected \[3\]"),
        (lambda: Integers(torch.zeros(3), 8), "integers are torch.float32, expected torch.int8"),
        (lambda: Integers(torch.zeros(3).char(), 9), "bits is 9, expected"),
        (lambda: Integers(torch.zeros(3).char(), 4.0), "bits is 4.0, expected"),
        (lambda: Integers(torch.tensor([-9, 7]).char(), 4), "from -9 to 7, expected -8 to 7"),
    ],
)
def test_entries_that_are_none_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- Files ----------------------------------------------------------------------------------------


def content():
    state = {
        "conv.weight": few((16, 8, 3, 3), 16),
        "head.weight": torch.randn(10, 16, generator=torch.Generator().manual_seed(1)),
        "half": torch.randn(7).half(),
        "brain": few((60, 60), 5, dtype=torch.bfloat16),
        "bn.num_batches_tracked": torch.tensor(42),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
    }
    integers = {
        f"w{bits}": Integers(
            torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (9, 7)).char(), bits
        )
        for bits in range(2, 9)
    }
    return state, integers


def test_a_file_gives_back_what_was_written(tmp_path):
    state, integers = content()
    record = {"bits": 8, "names": ["a", "ü"], "nested": {"scale": 0.1}}
    size = write_packed(tmp_path / "model.packed", state, integers, record)
    assert size == (tmp_path / "model.packed").stat().st_size
    back = read_packed(tmp_path / "model.packed")
    assert list(back.entries) == [*state, *integers]
    assert all(same_bits(back.state_dict[n], v) for n, v in state.items())
    assert back.state_dict.keys() == state.keys()
    assert back.integers.keys() == integers.keys()
    assert all(same_bits(back.integers[n].values, i.values) for n, i in integers.items())
    assert [i.bits for i in back.integers.values()] == list(range(2, 9))
    assert back.record == record
    assert isinstance(back.entries["conv.weight"], Clustered)


def test_the_same_model_makes_the_same_bytes():
    state, integers = content()
    entries = {n: packed_form(v) for n, v in state.items()} | integers
    assert pack(entries) == pack(entries)


def test_what_is_read_belongs_to_the_reader(tmp_path):
    write_packed(tmp_path / "x", {"a": torch.ones(3), "b": torch.zeros(3)})
    state = read_packed(tmp_path / "x").state_dict
    state["a"].add_(5)
    assert state["b"].tolist() == [0, 0, 0]


def test_an_empty_state_is_a_file_too(tmp_path):
    write_packed(tmp_path / "x", {})
    assert read_packed(tmp_path / "x").entries == {}


def test_a_file_loads_into_a_network(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    write_packed(tmp_path / "x", network.state_dict())
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    other.load_state_dict(read_packed(tmp_path / "x").state_dict)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(network(x), other(x))


def test_indices_and_integers_take_few_bits(tmp_path):
    shape, n = (512, 512), 512 * 512
    dense = write_packed(tmp_path / "dense", {"w": torch.randn(shape)})
    assert dense > 3.2 * n
    for k in (2, 4, 8, 16, 100, 256):
        size = write_packed(tmp_path / "few", {"w": few(shape, k)})
        assert size < n / 8 * torch.tensor(float(k)).log2() * 1.1 + 6000, k
    for bits in (2, 4, 6, 8):
        values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).char()
        size = write_packed(tmp_path / "int", {}, {"w": Integers(values, bits)})
        assert size < n / 8 * bits * 1.08 + 6000, bits


# --- Broken files ---------------------------------------------------------------------------------


def test_every_truncation_and_flipped_byte_is_noticed_or_harmless(tmp_path):
    state = {"w": few((30, 30), 16), "b": torch.randn(30)}
    good = tmp_path / "good"
    write_packed(good, state, {"i": Integers(torch.randint(-8, 8, (40,)).char(), 4)})
    whole, expected = good.read_bytes(), read_packed(good)
    broken = tmp_path / "broken.packed"
    refused = accepted = 0
    for place in range(0, len(whole), 7):
        for damaged in (
            whole[:place],
            whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :],
        ):
            broken.write_bytes(damaged)
            try:
                found = read_packed(broken)
            except ValueError as error:
                refused += "broken.packed" in str(error) and "left as it was" in str(error)
            else:  # padding and names inside the zip container matter to nobody
                assert all(same_bits(found.state_dict[n], expected.state_dict[n]) for n in state)
                assert torch.equal(found.integers["i"].values, expected.integers["i"].values)
                accepted += 1
            assert broken.read_bytes() == damaged
    tried = 2 * len(range(0, len(whole), 7))
    assert refused + accepted == tried
    assert refused > tried / 2  # at least all truncations


@pytest.mark.parametrize("fill", [0, 255])
def test_damage_in_the_tensors_is_found_by_the_checksum(tmp_path, fill):
    write_packed(tmp_path / "x", {"w": few((99, 99), 16)})
    stored = torch.load(tmp_path / "x", weights_only=True)
    stored["content"][len(stored["content"]) // 2] = fill
    torch.save(stored, tmp_path / "x")
    with pytest.raises(ValueError, match=r"x' cannot be read as a packed file .* left as it was"):
        read_packed(tmp_path / "x")


def test_bytes_that_say_something_else_are_refused():
    for plain in (b"", b"\0" * 8, b"\2" + b"\0" * 7 + b"{}", b"\xff" * 40):
        with pytest.raises((ValueError, KeyError)):
            unpack(lzma.compress(plain))
    plain = lzma.decompress(pack({"a": Raw(torch.ones(2))}))
    with pytest.raises(ValueError, match="3 bytes are left over"):
        unpack(lzma.compress(plain + b"\0\0\0"))
    with pytest.raises(ValueError, match="cannot be decompressed"):
        unpack(b"nothing")


def test_other_files_are_told_apart(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state.pt' is no packed file: .* read it with"):
        read_packed(tmp_path / "state.pt")
    with pytest.raises(FileNotFoundError):
        read_packed(tmp_path / "missing")


def test_an_older_file_stays_whole_when_writing_fails(tmp_path, monkeypatch):
    target = tmp_path / "x"
    write_packed(target, {"w": torch.ones(3)})
    before = target.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(packing.torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        write_packed(target, {"w": torch.zeros(3)})
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"w": "text"},), "'w' is a str, expected a tensor; leave it out, or give it in record"),
        (({"w": torch.eye(3).to_sparse()},), "'w' is torch.float32 in torch.sparse_coo, expected"),
        (
            ({"w": torch.ones(2)}, {"w": Integers(torch.ones(2).char(), 2)}),
            "'w' is in state_dict and in integers",
        ),
        (({}, {}, {"when": {1, 2}}), "the record cannot be stored .* give numbers, strings"),
    ],
)
def test_what_cannot_be_packed_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_packed(tmp_path / "x", *arguments)
    assert not os.listdir(tmp_path)


# --- Sizes of a real network ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet20():
    file = Path(os.environ["LIT_COMPRESS_ASSETS"]) / "weights" / "resnet20-cifar10-jpeg.pt"
    return torch.load(file, weights_only=True)["state_dict"]


def sparsified(state, sparsity):
    found = {}
    for name, values in state.items():
        if values.dim() > 1:
            threshold = values.abs().flatten().kthvalue(round(sparsity * values.numel())).values
            values = values.masked_fill(values.abs() <= threshold, 0.0)
        found[name] = values
    return found


def int8(state):
    rest, integers = {}, {}
    for name, values in state.items():
        if values.dim() > 1:
            scale = values.abs().flatten(1).amax(1) / 127
            rest[f"{name}.scale"] = scale
            steps = values / scale.view(-1, *[1] * (values.dim() - 1))
            integers[name] = Integers(steps.round().char(), 8)
        else:
            rest[name] = values
    return rest, integers


def few_weights(state, k):
    weights = {n: torch.nn.Parameter(v.clone()) for n, v in state.items() if v.dim() > 1}
    ClusteredWeights(weights, dict.fromkeys(weights, k)).cluster()
    return state | {n: w.detach() for n, w in weights.items()}


@pytest.mark.assets
@pytest.mark.parametrize(
    ("sparsity", "how", "least"),
    [
        (0.0, lambda state: (state,), 1.2),
        (0.8, lambda state: (state,), 5.3),
        (0.0, int8, 4.3),
        (0.8, int8, 12.0),
        (0.0, lambda state: (few_weights(state, 16),), 8.4),
        (0.8, lambda state: (few_weights(state, 16),), 17.5),
    ],
    ids=["dense", "sparse", "int8", "sparse + int8", "16 clusters", "sparse + 16 clusters"],
)
def test_sizes_of_resnet20(resnet20, tmp_path, sparsity, how, least):
    torch.save(resnet20, tmp_path / "raw.pt")
    state = sparsified(resnet20, sparsity) if sparsity else resnet20
    packed = how(state)
    size = write_packed(tmp_path / "packed", *packed)
    assert (tmp_path / "raw.pt").stat().st_size / size > least
    back = read_packed(tmp_path / "packed").state_dict
    assert all(same_bits(back[name], values) for name, values in packed[0].items())


def test_the_same_content_is_the_same_file_whatever_its_name(tmp_path):
    state = {"weight": torch.arange(12.0).view(3, 4)}
    files = []
    for name in ("a.pt", "another.pt", "a.pt"):
        write_packed(tmp_path / name, state, record={"x": 1})
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1] == files[2]
