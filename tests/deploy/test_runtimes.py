"""Files recognised by suffix and content; damaged ones are named."""

import zipfile

import pytest
import torch

from lit_compress.deploy import load_file, recognize

GOOD = {
    "net.onnx": b"\x08\x08",
    "net.xml": b'<?xml version="1.0"?>\n<net name="Model0" version="11">',
    "net.pte": b"\x00\x00\x00\x00ET12",
    "net.tflite": b"\x1c\x00\x00\x00TFL3",
    "net.pt2": b"PK\x03\x04",
}
TARGETS = {"net.onnx": "onnx", "net.xml": "openvino", "net.pte": "executorch",
           "net.tflite": "litert", "net.pt2": "inductor"}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_recognised(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(GOOD[name] + bytes(100))
    assert recognize(path) == TARGETS[name]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("content", [b"", b"text instead"])
def test_other_content_is_refused(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} (is empty|begins with b'text ins).*again"):
        recognize(path)
    with pytest.raises(ValueError, match=name):
        load_file(path)


@pytest.mark.parametrize(
    ("name", "package"),
    [("net.onnx", "onnxruntime"), ("net.xml", "openvino"), ("net.pte", "executorch"),
     ("net.tflite", "ai_edge_litert"), ("net.pt2", "torch")],
)  # fmt: skip
def test_a_damaged_file_is_named(name, package, tmp_path):
    pytest.importorskip(package)
    path = tmp_path / name
    path.write_bytes(GOOD[name] + bytes(200))
    path.with_suffix(".bin").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} cannot be loaded.*damaged.*export it again"):
        load_file(path)


def test_an_archive_of_something_else_is_no_package(tmp_path):
    path = tmp_path / "net.pt2"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no compiled network"):
        load_file(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_other_suffixes_and_missing_files(tmp_path):
    (tmp_path / "net.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"net\.bin is no file of a runtime.*\.onnx, \.xml, \.pte"):
        recognize(tmp_path / "net.bin")
    with pytest.raises(FileNotFoundError):
        load_file(tmp_path / "net.onnx")


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_threads_of_the_wrong_kind(threads, tmp_path):
    with pytest.raises(ValueError, match="num_threads=.*at least 1"):
        load_file(tmp_path / "net.onnx", threads)
