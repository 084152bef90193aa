import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lit_compress import (
    CompressionReport,
    CompressionSummary,
    MagnitudeSparsity,
    QuantizationAwareTraining,
    Schedule,
    WeightClustering,
    load_compressed,
)
from tests.callbacks.nets import Net, loader, same_weights, trainer

WEIGHTS = 72 + 128 + 256


def fit(summary, *, begin=0.5, end=0.75, module=None, ckpt_path=None, callbacks=(), **kwargs):
    torch.manual_seed(1)
    module = module or Net()
    sparsity = MagnitudeSparsity(0.75, schedule=Schedule(begin=begin, end=end))
    runner = trainer(callbacks=[sparsity, *callbacks, summary], **kwargs)
    runner.fit(module, loader(), loader(32), ckpt_path=ckpt_path)
    return module, runner


def summary_in(folder, **kwargs):
    return CompressionSummary(folder, **({"latency": False, "plots": False} | kwargs))


def test_the_report_compares_before_and_after(tmp_path):
    summary = summary_in(tmp_path, latency=True)
    module, _ = fit(summary)
    report = summary.report
    assert report.dense.sparsity == 0.0
    gone = round(0.75 * WEIGHTS)
    assert report.compressed.num_nonzero_params == report.dense.num_params - gone
    assert report.dense.macs == report.compressed.macs > 0
    assert report.dense.latency[0].batch_size == report.compressed.latency[0].batch_size == 1
    assert report.dense.metrics.keys() == report.compressed.metrics.keys() == {"val_loss"}
    loss = nn.functional.cross_entropy
    module.eval()
    expected = sum(loss(module(x), y).item() for x, y in loader(32)) / 4
    assert report.compressed.metrics["val_loss"] == pytest.approx(expected, abs=1e-5)
    assert report.dense.metrics["val_loss"] != report.compressed.metrics["val_loss"]
    assert any("no speed" in f or "nothing" in f for f in report.findings)


def test_the_files_are_written_and_come_back(tmp_path):
    summary = summary_in(tmp_path, plots=True)
    fit(summary)
    text = (tmp_path / "compression_report.json").read_text()
    assert CompressionReport.from_json(text) == summary.report
    assert (tmp_path / "compression_report.md").read_text() == summary.report.to_markdown()
    assert {p.name for p in tmp_path.glob("*.png")} == {"summary.png", "layers.png"}


def test_the_report_is_shown(tmp_path, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(summary_in(tmp_path))
    assert "zeros in weights" in caplog.text
    assert str(tmp_path) in caplog.text


def test_a_whole_sanity_check_gives_the_dense_metrics(tmp_path):
    summary = summary_in(tmp_path)
    fit(summary, begin=0, num_sanity_val_steps=-1)
    assert summary.report.dense.metrics.keys() == {"val_loss"}
    summary = summary_in(tmp_path)
    fit(summary, begin=0, num_sanity_val_steps=1)
    assert summary.report.dense.metrics == {}


def test_stale_metrics_are_not_reported(tmp_path):
    summary = summary_in(tmp_path)
    fit(summary, begin=0, check_val_every_n_epoch=3, num_sanity_val_steps=0, max_epochs=4)
    assert summary.report.compressed.metrics.keys() == {"val_loss"}
    summary = summary_in(tmp_path)
    fit(summary, begin=0, end=1.0, check_val_every_n_epoch=2, num_sanity_val_steps=0, max_epochs=3)
    assert summary.report.compressed.metrics == {}
    assert "not validated after" in summary.report.notes[0]


def test_a_resumed_run_keeps_the_dense_side(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    whole = summary_in(tmp_path / "a", latency=True)
    module, _ = fit(whole, callbacks=[save], enable_checkpointing=True)
    resumed = summary_in(tmp_path / "b", latency=True)
    other, _ = fit(resumed, ckpt_path=tmp_path / "step=24.ckpt")
    assert same_weights(module, other)
    assert resumed.report.dense.num_nonzero_params == whole.report.dense.num_nonzero_params
    assert resumed.report.dense.metrics == whole.report.dense.metrics
    assert resumed.report.compressed.metrics == whole.report.compressed.metrics
    assert "was resumed" in resumed.report.notes[0]


def test_watching_changes_nothing(tmp_path):
    module, _ = fit(summary_in(tmp_path))
    torch.manual_seed(1)
    alone = Net()
    sparsity = MagnitudeSparsity(0.75, schedule=Schedule(begin=0.5, end=0.75))
    trainer(callbacks=[sparsity]).fit(alone, loader(), loader(32))
    assert same_weights(module, alone)
    assert not module.model._forward_hooks
    assert "forward" not in vars(module)


def test_a_module_without_a_network_child_is_measured_itself(tmp_path):
    class Inline(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.model(x) * self.scale

    summary = summary_in(tmp_path)
    module, _ = fit(summary, module=Inline())
    assert summary.report.dense.num_params == sum(p.numel() for p in module.parameters())
    assert summary.report.dense.macs > 0


def test_a_compiled_module_has_a_report_without_inputs(tmp_path):
    summary = summary_in(tmp_path)
    torch.manual_seed(0)
    sparsity = MagnitudeSparsity(0.75)
    runner = trainer(callbacks=[sparsity, summary], max_epochs=1)
    runner.fit(torch.compile(Net(), backend="eager"), loader())
    assert summary.report.dense.macs is None
    assert summary.report.compressed.num_nonzero_params < summary.report.dense.num_params


def test_the_default_folder_is_the_loggers(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(CompressionSummary(latency=False, plots=False), logger=logger)
    file = tmp_path / "lightning_logs" / "version_0" / "compression_report.json"
    assert json.loads(file.read_text())["dense"]["num_params"] > 0


def test_tensorboard_gets_the_table(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", version="0")
    fit(summary_in(tmp_path), logger=logger)
    events = b"".join(f.read_bytes() for f in (tmp_path / "run" / "0").glob("events*"))
    assert b"compression/report" in events
    assert b"sparsity/total" in events


def test_an_unknown_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'modl' is no module of Net; the nearest are 'model'"):
        fit(summary_in(tmp_path, network="modl"))


def test_it_can_be_used_again(tmp_path):
    summary = summary_in(tmp_path)
    fit(summary)
    first = summary.report
    fit(summary)
    assert summary.report == first


def bare(module):
    """A network of the same kind with other weights."""
    return type(module)()


@pytest.mark.parametrize(
    "callback",
    [
        QuantizationAwareTraining(num_calibration_batches=1),
        WeightClustering(4, preserve_sparsity=False),
    ],
    ids=["quantized", "clustered"],
)
def test_integers_and_clusters_are_packed_and_their_file_opens(callback, tmp_path):
    torch.manual_seed(1)
    module, summary = Net(), summary_in(tmp_path)
    trainer(callbacks=[callback, summary]).fit(module, loader(), loader(32))
    sizes = summary.report.compressed.compressed_size_bytes
    file = tmp_path / "packed.ckpt"
    assert sizes["packed"] == file.stat().st_size
    assert "packed" not in summary.report.dense.compressed_size_bytes
    assert "packed" in str(summary.report)
    again = load_compressed(file, bare(module)).eval()
    images = next(iter(loader()))[0]
    with torch.no_grad():
        assert torch.equal(again(images), module.eval()(images))


def test_a_sparse_network_is_not_packed(tmp_path):
    summary = summary_in(tmp_path)
    fit(summary)
    assert "packed" not in summary.report.compressed.compressed_size_bytes
    assert not (tmp_path / "packed.ckpt").exists()
