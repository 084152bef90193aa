"""Real W&B in offline mode; what it wrote is read back from its files."""

import json
import struct
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger

from lit_compress import CompressionSummary, Distillation, MagnitudeSparsity
from tests.callbacks.nets import Net, loader, trainer
from tests.processes import run_script

wandb = pytest.importorskip("wandb")


BLOCK, HEADER = 32768, 7


def records(folder: Path):
    """All records of the one offline run below ``folder``.

    The file is a LevelDB log: blocks of 32 KiB with chunks of (checksum, length, type), where a
    type of 1 is a whole record and 2, 3, 4 its first, middle and last part; 7 bytes come before.
    """
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fit with every callback, logged offline: the folder and the summary."""
    folder = tmp_path_factory.mktemp("wandb")
    patch = pytest.MonkeyPatch()
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("WANDB_SILENT", "true")
    patch.setenv("WANDB_CACHE_DIR", str(folder / "cache"))
    patch.setenv("WANDB_DATA_DIR", str(folder / "data"))
    torch.manual_seed(0)
    summary = CompressionSummary(folder / "report", latency=False)
    logger = WandbLogger(project="test", save_dir=folder, offline=True)
    callbacks = [Distillation(), MagnitudeSparsity(0.77), summary]
    runner = trainer(callbacks=callbacks, logger=logger, log_every_n_steps=1)
    runner.fit(Net(), loader(), loader(32))
    wandb.finish()
    patch.undo()
    return folder, summary


def history(folder):
    """Each logged row as a mapping from key to value."""
    rows = []
    for record in records(folder):
        if record.HasField("history"):
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def test_scalars_are_logged_along_the_run(run):
    rows = history(run[0])
    totals = [row["sparsity/total"] for row in rows if "sparsity/total" in row]
    assert totals == sorted(totals)
    assert totals[-1] == pytest.approx(351 / 456)
    keys = set().union(*rows)
    assert {"sparsity/scheduled", "sparsity/layer/model.8.weight"} <= keys
    assert {"distillation/task_loss", "distillation/logits_loss"} <= keys


def test_the_report_is_a_table_plots_and_an_artifact(run):
    folder, summary = run
    logged = {key: value for row in history(folder) for key, value in row.items()}
    assert logged["compression/report/_type"] == "table-file"
    (file,) = folder.glob(f"wandb/offline-run-*/files/{logged['compression/report/path']}")
    table = json.loads(file.read_text())
    assert table["columns"] == ["measure", "dense", "compressed", "change"]
    assert [list(row) for row in summary.report.rows()] == table["data"]
    assert logged["compression/plots/count"] == 2
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == 2
    artifacts = [record.artifact for record in records(folder) if record.HasField("artifact")]
    (artifact,) = [a for a in artifacts if a.type == "report"]
    names = {entry.path for entry in artifact.manifest.contents}
    assert {"compression_report.json", "compression_report.md", "layers.png"} <= names


def test_wandb_is_not_imported_without_its_logger(tmp_path):
    script = tmp_path / "fit.py"
    script.write_text(
        "import sys; from tests.callbacks.nets import *; from lit_compress import *;"
        "trainer(max_epochs=1, callbacks=[MagnitudeSparsity(0.5),"
        f"CompressionSummary({str(tmp_path)!r}, latency=False, plots=False)]).fit(Net(), loader());"
        "assert 'wandb' not in sys.modules, 'imported'"
    )
    ((code, output),) = run_script(script, environments=[{}], folder=tmp_path)
    assert code == 0, output[-2000:]
