"""What ``report`` and ``benchmark`` say of checkpoints whose model was cut."""

import json
from pathlib import Path

import pytest
import torch

from lit_compress import CompressionReport, load_compressed
from lit_compress.cli import main
from lit_compress.compress.structure_record import STRUCTURE_KEY
from tests.callbacks.nets import trainer
from tests.slim_nets import ChainModule, cut


@pytest.fixture
def slim(task):
    """Paths of the checkpoint that fit wrote, and beside it of the same model after a cut."""
    task = [word for word in task if not word.startswith("--model")]
    assert main(["fit", "--model=tests.slim_nets.ChainModule", "--model.classes=10", *task]) == 0
    (dense,) = Path.cwd().rglob("*.ckpt")
    module = load_compressed(dense, ChainModule)
    cut(module, 3, 2)
    run = trainer()
    run.strategy.connect(module)
    run.save_checkpoint(dense.with_name("slim.ckpt"))
    return str(dense), str(dense.with_name("slim.ckpt"))


def test_report(slim):
    dense, path = slim
    arguments = [f"--baseline={dense}", "--validate", "--json=out.json"]
    assert main(["report", path, *arguments]) == 0
    report = CompressionReport.load("out.json")
    assert report.dense.num_params == 8 * 9 + 16 + 6 * 8 * 9 + 6 + 6 * 10 + 10
    assert report.compressed.num_params == 3 * 9 + 6 + 2 * 3 * 9 + 2 + 2 * 10 + 10
    assert report.dense.macs == 36 * 8 * 9 + 16 * 6 * 8 * 9 + 60
    assert report.compressed.macs == 36 * 3 * 9 + 16 * 2 * 3 * 9 + 20
    assert set(report.compressed.metrics) == {"loss"}


def test_benchmark(slim):
    dense, path = slim
    for arguments in ([], [f"--baseline={dense}"]):
        assert main(["benchmark", path, "--repeats=2", "--json=out.json", *arguments]) == 0
        (result,) = json.loads(Path("out.json").read_text())
        assert result["b"]["median_ms"] > 0


def test_a_record_of_another_model_is_refused(slim, capsys):
    _, path = slim
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[STRUCTURE_KEY]["changes"][0]["model.0"]["out_channels"][0] = 9
    torch.save(checkpoint, path)
    assert main(["report", path]) == 2
    assert "'out_channels' of module '0' is 8, expected 9" in capsys.readouterr().err
