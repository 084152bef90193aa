import builtins
import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.measure.size import compressed_size_bytes, saved_sizes, size_bytes


@pytest.fixture
def without_zstandard(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import, real_find = builtins.__import__, importlib.util.find_spec

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name == "zstandard":
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(
        "lit_compress.measure.size.find_spec",
        lambda name: None if name == "zstandard" else real_find(name),
    )


def test_size_is_that_of_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(64, 64))
    path = tmp_path / "m.pt"
    torch.save(model.state_dict(), path)
    # A file name stands once in the archive for each tensor; nothing else may differ.
    assert abs(size_bytes(model) - path.stat().st_size) <= 64 * (len(model.state_dict()) + 8)
    assert size_bytes(model) >= 4 * sum(t.numel() for t in model.state_dict().values())


def test_half_precision_halves_the_weights() -> None:
    model = nn.Linear(512, 512)
    full = size_bytes(model)
    assert size_bytes(model.half()) == pytest.approx(full / 2, rel=0.01)


@settings(deadline=None, max_examples=10)
@given(share=st.sampled_from([0.5, 0.75, 0.9, 0.95]))
def test_zeros_pay_only_after_compression(share: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(200, 200)
    size, dense = saved_sizes(model)
    with torch.no_grad():
        model.weight.view(-1)[torch.randperm(40_000)[: int(share * 40_000)]] = 0
    sparse_size, sparse = saved_sizes(model)
    assert sparse_size == size
    for codec in ("deflate", "zstd"):
        # No less than the non-zero numbers hold, no more than 40 % above it.
        assert (1 - share) * 0.8 * dense[codec] < sparse[codec] < dense[codec]
        assert sparse[codec] < (1 - share) * dense[codec] * 1.4 + 0.1 * dense[codec]


@pytest.mark.parametrize("codec", ["deflate", "zstd"])
def test_more_effort_is_not_larger(codec) -> None:
    model = nn.Linear(100, 100)
    nn.init.constant_(model.weight, 0.5)
    low, high = compressed_size_bytes(model, codec, 1), compressed_size_bytes(model, codec, 9)
    assert high <= low < size_bytes(model) / 10


def test_saved_sizes_are_the_single_ones() -> None:
    model = nn.Linear(30, 30)
    assert saved_sizes(model) == (
        size_bytes(model),
        {codec: compressed_size_bytes(model, codec) for codec in ("deflate", "zstd")},
    )


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(ValueError, match=r"codec='rar'; expected one of deflate, zstd"):
        compressed_size_bytes(nn.Linear(2, 2), "rar")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("codec", "level", "span"), [("deflate", 10, "0 to 9"), ("zstd", 0, "1 to 22")]
)
def test_a_level_out_of_range_is_refused(codec, level: int, span: str) -> None:
    with pytest.raises(ValueError, match=rf"level={level} for {codec}; expected {span}"):
        compressed_size_bytes(nn.Linear(2, 2), codec, level)


@pytest.mark.usefixtures("without_zstandard")
def test_without_zstandard_only_zstd_is_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lit-compress\[report\]'"):
        compressed_size_bytes(nn.Linear(2, 2), "zstd")
    assert list(saved_sizes(nn.Linear(2, 2))[1]) == ["deflate"]
