import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn

from lit_compress import CompressionSummary, Distillation, MagnitudeSparsity, load_compressed
from lit_compress.callbacks.weight_clustering import WeightClustering
from lit_compress.compress.quantization.network import is_quantized
from lit_compress.compress.schedules import Schedule
from tests.callbacks.channel_fits import HALF, Watch, fit, pruning, widths
from tests.callbacks.nets import Net, loader, trainer
from tests.callbacks.quantized_fits import Steps, integers, qat, quantizers, same_state

IMAGES = loader().dataset[:16][0]
NAMES = ["0.weight", "4.weight", "8.weight"]


def scales(module):
    return {name: quantizers(module).weight(name).scale.numel() for name in NAMES}


# --- Channels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_a_cut_before_the_first_step_is_what_is_calibrated(ranges):
    module = fit(pruning(0.5), qat(4, ranges=ranges), max_epochs=1)
    assert widths(module) == HALF
    assert scales(module) == {"0.weight": 4, "4.weight": 8, "8.weight": 4}


@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_a_cut_in_mid_fit_takes_the_scales_along(tmp_path, ranges):
    def callbacks():
        return [EMAWeightAveraging(decay=0.8), pruning(0.5, at=3), qat(4, ranges=ranges, begin=5)]

    watch, seen = Watch(), Steps(scales)
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    whole = fit(*callbacks(), watch, seen, save, enable_checkpointing=True)
    assert watch.firsts == [8, 8, *[4] * 14]
    assert [s["4.weight"] for s in seen.seen] == [16, 16, *[8] * 14]
    resumed = fit(*callbacks(), ckpt_path=tmp_path / "step=8.ckpt", seed=2)
    assert same_state(whole, resumed)
    assert int(integers(whole, "4.weight").abs().max()) == 7
    loaded = load_compressed(tmp_path / "step=16.ckpt", Net)
    assert torch.equal(loaded.eval()(IMAGES), whole.eval()(IMAGES))


def test_a_module_that_an_earlier_fit_cut(tmp_path):
    slim = fit(pruning(0.5), max_epochs=1)
    module = fit(qat(), module=slim, max_epochs=1)
    runner = trainer()
    runner.strategy.connect(module)
    runner.save_checkpoint(tmp_path / "slim.ckpt")
    loaded = load_compressed(tmp_path / "slim.ckpt", Net)
    assert widths(loaded) == HALF
    assert scales(loaded) == {"0.weight": 4, "4.weight": 8, "8.weight": 4}
    assert torch.equal(loaded.eval()(IMAGES), module.eval()(IMAGES))


def test_a_checkpoint_before_the_cut_loads_into_the_module_after_it(tmp_path):
    class Tested(Net):
        test_step = Net.validation_step

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    module = fit(
        pruning(0.5, at=4), qat(begin=6), save, module=Tested, max_epochs=1,
        enable_checkpointing=True,
    )  # fmt: skip
    assert scales(module)["4.weight"] == 8
    runner = trainer(callbacks=[qat(begin=6)])
    runner.test(module, loader(), ckpt_path=tmp_path / "step=2.ckpt", verbose=False)
    assert scales(module) == {"0.weight": 8, "4.weight": 16, "8.weight": 4}


# --- Weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_masked_weights_are_zero_integers(ranges):
    def look(module):
        masked = [module.model.get_parameter(name) == 0 for name in NAMES]
        return [
            (int(mask.sum()), bool((integers(module, name)[mask] == 0).all()))
            for name, mask in zip(NAMES, masked, strict=True)
        ]

    steps = Steps(look)
    sparsity = MagnitudeSparsity(0.5, schedule=Schedule(begin=2, end=6, update_every=1))
    fit(sparsity, qat(4, ranges=ranges), steps, max_epochs=1)
    assert all(exact for found in steps.seen for _, exact in found)
    assert [count for count, _ in steps.seen[-1]] == [36, 64, 128]


@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_clusters_stay_clusters_in_integers(ranges):
    def look(module):
        return quantizers(module).quantizing and [
            (
                len(module.model.get_parameter(name).unique()),
                len(integers(module, name).unique()),
                quantizers(module).weight(name).axis,
            )
            for name in NAMES
        ]

    steps = Steps(look)
    clustering = WeightClustering(5, begin=2, layers=["model.0", "model.4", "model.8"])
    fit(clustering, qat(8, ranges=ranges, begin=3), steps, max_epochs=1)
    for found in steps.seen[2:]:
        for values, whole, axis in found:
            assert 2 <= whole <= values <= 5
            assert axis is None
    assert quantizers(fit(qat(8), max_epochs=1)).weight("4.weight").axis == 0


# --- Teachers, averages, reports ------------------------------------------------------------------


def test_a_snapshot_teacher_stays_in_floating_point(tmp_path):
    class Teacher(Steps):
        def on_train_batch_end(self, trainer, pl_module, *args):
            (distillation,) = (c for c in trainer.callbacks if isinstance(c, Distillation))
            network = distillation._teachers[0].network
            self.seen.append([module for module in network.modules() if is_quantized(module)])
            self.weight = network.state_dict()["8.weight"].clone()

    def callbacks():
        return [Distillation(), qat(4)]

    first = Teacher()
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    whole = fit(*callbacks(), first, save, enable_checkpointing=True)
    assert first.seen == [[]] * 16
    resumed = Teacher()
    module = fit(*callbacks(), resumed, ckpt_path=tmp_path / "step=8.ckpt", seed=2)
    assert resumed.seen == [[]] * 8
    assert torch.equal(first.weight, resumed.weight)
    assert same_state(whole, module)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_an_exponential_average_is_quantized_and_has_the_ranges(ranges, first):
    ema = EMAWeightAveraging(decay=0.8)
    found = []

    class Look(Steps):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            if trainer.sanity_checking:
                return
            own = quantizers(pl_module)  # the average is in the module's place
            average = quantizers(ema._average_model.module)
            found.append((own.quantizing, average.quantizing))
            for name, quantizer in own.activations.items():
                live = average.activations[name]
                found.append((torch.equal(quantizer.zero_point, live.zero_point),
                              torch.equal(quantizer.low, live.low)))  # fmt: skip

    callbacks = [ema, qat(4, ranges=ranges, begin=2)]
    module = Net()
    runner = trainer(
        callbacks=[*(callbacks if first else reversed(callbacks)), Look()], max_epochs=2
    )
    runner.fit(module, loader(), loader(8))
    assert len(found) > 4
    assert set(found) == {(True, True)}
    assert all(q.scale.isfinite().all() for q in quantizers(module).quantizers)
    assert int(integers(module, "4.weight").abs().max()) == 7


def test_the_extra_epoch_of_a_stochastic_average_takes_new_statistics():
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    counts = Steps(lambda module: module.model[1].training)
    module = fit(swa, qat(freeze_batch_norm=0.25), counts, max_epochs=2)
    assert counts.seen[:16] == [True] * 4 + [False] * 12
    assert counts.seen[16:] == [True] * 8
    assert not torch.equal(module.model[1].running_var, torch.ones(8))


def test_the_summary_reports_the_network_without_its_quantizers(tmp_path):
    summary = CompressionSummary(tmp_path, latency=False, plots=False)
    fit(summary, qat(4, ranges="learned"), max_epochs=1)
    report = summary.report
    assert report.compressed.num_params == report.dense.num_params
    assert report.compressed.macs == report.dense.macs > 0
    assert (tmp_path / "compression_report.json").exists()


def test_prune_sparsify_cluster_and_quantize_with_distillation_in_one_trainer(tmp_path):
    sparsity = Schedule(begin=3, end=5, update_every=1)
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=16)
    module = fit(
        Distillation(),
        pruning(0.5, at=2),
        MagnitudeSparsity(0.5, schedule=sparsity),
        WeightClustering(6, begin=6),
        qat(6, begin=8),
        save,
        enable_checkpointing=True,
    )
    assert widths(module) == HALF
    for name in NAMES:
        weight = module.model.get_parameter(name)
        whole = integers(module, name)
        assert 2 <= len(weight.unique()) <= 6
        assert int((weight == 0).sum()) >= weight.numel() // 3
        assert bool((whole[weight == 0] == 0).all())
        assert len(whole.unique()) <= 6
    loaded = load_compressed(tmp_path / "step=16.ckpt", Net)
    assert torch.equal(loaded.eval()(IMAGES), module.eval()(IMAGES))
    assert nn.functional.cross_entropy(module(IMAGES), loader().dataset[:16][1]).isfinite()
