import json
from pathlib import Path

import pytest
import torch

from lit_compress import load_compressed
from lit_compress.cli import main
from lit_compress.deploy import load_file
from lit_compress.tasks import ImageClassifier

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def int8_checkpoint(tmp_path_factory):
    """The checkpoint of a short run with quantization, beside its config.yaml."""
    from .conftest import TASK

    folder = tmp_path_factory.mktemp("int8")
    task = [word.replace("save_dir=.", f"save_dir={folder}") for word in TASK]
    quantized = ["--quantization.num_calibration_batches=2", "--summary=null"]
    assert main(["fit", *task, *quantized]) == 0
    (path,) = folder.rglob("*.ckpt")
    return path


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_a_quantized_checkpoint_becomes_an_int8_file_that_scores_as_torch(int8_checkpoint, capsys):
    arguments = ["--to=ort-int8", "--validate", "--json=out.json", "--output=int8.onnx"]
    assert main(["export", str(int8_checkpoint), *arguments]) == 0
    (written,) = json.loads(Path("out.json").read_text())
    assert written["integers"] is True
    assert written["size_bytes"] == Path("int8.onnx").stat().st_size
    assert written["parity"]["cosine"] > 0.99
    torch_top1, file_top1 = (written["metrics"][w]["val_top1"] for w in ("torch", "file"))
    assert abs(torch_top1 - file_top1) <= 0.01
    assert "val_top1" in capsys.readouterr().out
    module = load_compressed(int8_checkpoint, ImageClassifier).eval()
    images = torch.rand(5, 1, 8, 8)
    with load_file("int8.onnx") as file, torch.no_grad():
        (logits,) = file((images,))
        assert torch.allclose(logits, module(images), atol=0.2)


def test_several_targets_are_files_of_the_same_network(int8_checkpoint, tmp_path):
    targets = ["onnx", "ort-int8", "onnx", "ort-int8"]
    arguments = [f"--to={','.join(targets)}", "--validate", f"--output={tmp_path}"]
    assert main(["export", str(int8_checkpoint), *arguments, "--json=out.json"]) == 0
    first, second, third, fourth = json.loads(Path("out.json").read_text())
    assert first["metrics"] == third["metrics"]
    assert second["metrics"] == fourth["metrics"]
    module = load_compressed(int8_checkpoint, ImageClassifier).eval()
    images = torch.rand(5, 1, 8, 8)
    with load_file(fourth["path"]) as file, torch.no_grad():
        (logits,) = file((images,))
        expected = module(images)
    assert float((logits - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_the_fastest_form_is_kept(int8_checkpoint, capsys):
    arguments = ["--to=ort-int8", "--fastest", "--assume-vnni", "--json=out.json"]
    assert main(["export", str(int8_checkpoint), *arguments, "--output=fast.onnx"]) == 0
    (written,) = json.loads(Path("out.json").read_text())
    assert written["median_ms"].keys() == {"integers", "float"}
    assert written["form"] == min(written["median_ms"], key=written["median_ms"].get)
    assert written["needs_vnni"] == []  # it was quantized so that nothing saturates
    assert "timed on this machine" in capsys.readouterr().out
    with load_file("fast.onnx") as file:
        assert file((torch.rand(2, 1, 8, 8),))[0].shape == (2, 10)


def test_float_leaves_quantization_off(int8_checkpoint, capsys):
    assert main(["export", str(int8_checkpoint), "--to=onnx", "--float", "--output=f.onnx"]) == 0
    assert "float" in capsys.readouterr().out
    assert main(["export", str(int8_checkpoint), "--to=onnx", "--output=q.onnx"]) == 0
    assert Path("q.onnx").stat().st_size < Path("f.onnx").stat().st_size
    module = load_compressed(int8_checkpoint, ImageClassifier).eval()
    module.model.quantization.set_mode(observing=False, quantizing=False)
    images = torch.rand(3, 1, 8, 8)
    with load_file("f.onnx") as file, torch.no_grad():
        assert torch.allclose(file((images,))[0], module(images), atol=1e-4)


def test_files_lie_beside_the_checkpoint_by_default(int8_checkpoint):
    assert main(["export", str(int8_checkpoint), "--to=onnx,ort-int8"]) == 0
    folder, stem = int8_checkpoint.parent, int8_checkpoint.stem
    assert (folder / f"{stem}.onnx.onnx").is_file()
    assert (folder / f"{stem}.ort-int8.onnx").is_file()


def test_a_file_that_scores_worse_is_not_kept(int8_checkpoint, capsys, monkeypatch):
    from lit_compress.cli import export as command

    worse = {"val_loss": 9.0, "val_top1": 0.1, "val_top5": 0.5}
    scores = iter([{"val_loss": 0.5, "val_top1": 0.9, "val_top5": 1.0}, worse])
    monkeypatch.setattr(command.Subject, "validate", lambda self: next(scores))
    arguments = ["--to=ort-int8", "--validate", "--output=worse.onnx"]
    said = refused(capsys, "export", int8_checkpoint, *arguments)
    assert "not kept" in said
    assert not Path("worse.onnx").exists()


def test_refusals(int8_checkpoint, checkpoint, capsys):
    assert "choose from onnx" in refused(capsys, "export", int8_checkpoint, "--to=tensorrt")
    said = refused(capsys, "export", checkpoint, "--to=ort-int8", "--output=x.onnx")
    assert "Quantize it first" in said
    Path("broken.ckpt").write_bytes(int8_checkpoint.read_bytes()[:1000])
    config = f"--config={int8_checkpoint.parent.parent / 'config.yaml'}"
    said = refused(capsys, "export", "broken.ckpt", "--to=onnx", config)
    assert "truncated" in said
    said = refused(capsys, "export", int8_checkpoint, "--to=ort-int8", "--cosine=2")
    assert "cosine" in said


def test_exported_files_are_timed_beside_each_other(int8_checkpoint, capsys):
    export = ["export", str(int8_checkpoint), "--to=onnx"]
    assert main([*export, "--float", "--output=f.onnx"]) == 0
    assert main([*export, "--output=q.onnx"]) == 0
    capsys.readouterr()
    timing = ["--input-shape=1,8,8", "--batch-sizes=1,4", "--repeats=3", "--json=times.json"]
    assert main(["benchmark", "f.onnx", "q.onnx", *timing, "--plot=times.png"]) == 0
    printed = capsys.readouterr().out
    assert "f.onnx" in printed
    assert "q.onnx" in printed
    rows = json.loads(Path("times.json").read_text())["rows"]
    assert [(r["file"], r["batch_size"]) for r in rows] == [
        ("f.onnx", 1), ("q.onnx", 1), ("f.onnx", 4), ("q.onnx", 4),
    ]  # fmt: skip
    assert Path("times.png").stat().st_size > 0
    assert main(["benchmark", "q.onnx", "--repeats=3", "--input-shape=1,8,8"]) == 0


def test_checkpoints_and_exported_files_are_not_mixed(int8_checkpoint, capsys):
    Path("f.onnx").write_bytes(b"")
    said = refused(capsys, "benchmark", "f.onnx", int8_checkpoint)
    assert "export it first" in said
    assert "empty" in refused(capsys, "benchmark", "f.onnx", "--input-shape=1,8,8")
    assert "No such file" in refused(capsys, "benchmark", "g.onnx", "--input-shape=1,8,8")


def test_sparse_kernels_are_named(checkpoint, capsys):
    assert main(["benchmark", str(checkpoint), "--repeats=3", "--sparse-kernels"]) == 0
    assert "CSR products in 0 layers" in capsys.readouterr().out
