"""Files timed in turns, memory, tables, JSON and picture."""

import math
from pathlib import Path

import pytest
import torch

from lit_compress.deploy import BenchmarkResult, FileLatency, MeasuredFile, benchmark_files, export
from lit_compress.deploy.benchmark import _in_turns, _named
from lit_compress.deploy.file_memory import peak_memory_by_batch
from tests.deploy.nets import images, quantized_net, small_net

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("files")
    plain = export(small_net(), "onnx", folder / "float", images()).path
    return plain, export(quantized_net(), "ort-int8", folder / "int8", images()).path


def test_files_side_by_side(files):
    before = torch.get_num_threads()
    result = benchmark_files(
        files, images(1), threads=(1, 2), batch_sizes=(1, 3), rounds=4, warmup=1, memory=False
    )
    assert torch.get_num_threads() == before
    assert [f.name for f in result.files] == ["float.onnx", "int8.onnx"]
    assert [f.target for f in result.files] == ["onnx", "onnx"]
    assert [f.size_bytes for f in result.files] == [p.stat().st_size for p in files]
    places = [(row.num_threads, row.batch_size, row.file) for row in result.rows]
    assert places == [(t, b, f.name) for t in (1, 2) for b in (1, 3) for f in result.files]
    for row in result.rows:
        assert 0 < row.p25_ms <= row.median_ms <= row.p75_ms
        assert row.throughput == pytest.approx(row.batch_size / row.median_ms * 1e3)
        assert row.ratio_p10 <= row.ratio_p90
        assert row.peak_memory_bytes is None
        first = result.row("float.onnx", row.num_threads, row.batch_size)
        assert row.ratio == pytest.approx(row.median_ms / first.median_ms)
    assert result.setting["torch"] == torch.__version__.partition("+")[0]


def test_every_file_begins_a_round_in_turn():
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __call__(self, batch):
            calls.append(self.name)

    times = _in_turns({n: Recorder(n) for n in "abc"}, (), rounds=2, warmup=1)
    assert "".join(calls) == "abcbcacab"
    assert {name: len(t) for name, t in times.items()} == {"a": 2, "b": 2, "c": 2}


@LINUX
def test_memory_grows_with_the_batch(files):
    batches = {size: (images(1).repeat(size, 1, 4, 4),) for size in (1, 64)}
    plain = export(small_net(), "onnx", files[0].parent / "large", batches[1][0]).path
    peaks = peak_memory_by_batch(plain, batches)
    assert list(peaks) == [1, 64]
    # 64 examples of 8 channels of 48 x 48 floats are 4.7 MB, and two of them stand at a time.
    assert peaks[64] - peaks[1] > 4_000_000
    assert peaks[64] < 200_000_000
    result = benchmark_files([plain], batches[1][0], threads=1, batch_sizes=2, rounds=2)
    assert result.rows[0].peak_memory_bytes is not None


def test_bad_calls(files, tmp_path):
    with pytest.raises(ValueError, match="give a list of at least one file"):
        benchmark_files([], images())
    with pytest.raises(ValueError, match="give a list"):
        benchmark_files(str(files[0]), images())
    with pytest.raises(FileNotFoundError):
        benchmark_files([tmp_path / "net.onnx"], images())
    broken = tmp_path / "net.onnx"
    broken.write_bytes(b"\x08" + bytes(50))
    with pytest.raises(ValueError, match=r"net\.onnx cannot be loaded"):
        benchmark_files([broken], images())
    for name, value in (("threads", (0,)), ("batch_sizes", ()), ("rounds", 1), ("warmup", 0),
                        ("rounds", 2.5), ("threads", (1.5,)), ("threads", "2")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}=.*at least"):
            benchmark_files(files, images(), **{name: value})
    with pytest.raises(ValueError, match=r"takes \(any, 3, 12, 12\); came \(1, 3, 8, 8\)"):
        benchmark_files(files, images(1)[..., :8, :8], threads=(1,), batch_sizes=(1,))


def made():
    nan = math.nan
    files = (MeasuredFile("a.onnx", "onnx", None, 1000, 900),
             MeasuredFile("b.pte", "executorch", 1, 250_000, 200))  # fmt: skip
    rows = (
        FileLatency("a.onnx", 1, 1, 2.0, 1.5, 2.5, 500.0, 1.0, 1.0, 1.0, 3_000_000),
        FileLatency("b.pte", 1, 1, 1.0, 0.5, 1.5, 1000.0, 0.5, 0.4, 0.6, None),
        FileLatency("a.onnx", 1, 8, 8.0, 7.0, 9.0, 1000.0, nan, nan, nan, None),
    )
    return BenchmarkResult(files, rows, {"torch": "2"})


def test_tables():
    text = str(made())
    assert "b.pte   executorch" in text
    assert "0.500  0.400-0.600" in text
    assert "3.000 MB" in text
    assert made().row("b.pte", 1, 1).median_ms == 1
    with pytest.raises(ValueError, match="not timed with 2 threads"):
        made().row("b.pte", 2, 1)


def test_json_and_back(tmp_path):
    made().save(tmp_path / "new" / "result.json")
    again = BenchmarkResult.load(tmp_path / "new" / "result.json")
    assert again.files == made().files
    assert str(again) == str(made())
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="format None; expected 'lit-compress benchmark 1'"):
        BenchmarkResult.load(tmp_path / "other.json")
    (tmp_path / "other.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        BenchmarkResult.load(tmp_path / "other.json")


def test_names_tell_files_apart():
    same = [Path("a/net.onnx"), Path("b/net.onnx"), Path("b/other.onnx")]
    assert list(_named(same)) == ["a/net.onnx", "b/net.onnx", "other.onnx"]
