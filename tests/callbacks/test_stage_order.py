import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_compress import ChannelPruning, MagnitudeSparsity, Schedule
from lit_compress.callbacks.stage_order import check_stage_order
from lit_compress.callbacks.weight_clustering import WeightClustering
from lit_compress.compress.quantization.network import is_quantized
from tests.callbacks.channel_fits import HALF, fit, pruning, widths
from tests.callbacks.nets import Net, trainer
from tests.callbacks.quantized_fits import qat

ORDER = "ChannelPruning, MagnitudeSparsity, WeightClustering, then quantization"


def check(*callbacks, module=None):
    check_stage_order(trainer(callbacks=list(callbacks)), module or Net())


@pytest.mark.parametrize(
    ("callbacks", "later", "earlier"),
    [
        ([qat(), ChannelPruning(0.5)], "ChannelPruning", "QuantizationAwareTraining"),
        ([qat(), MagnitudeSparsity(0.5)], "MagnitudeSparsity", "QuantizationAwareTraining"),
        ([qat(), WeightClustering()], "WeightClustering", "QuantizationAwareTraining"),
        ([WeightClustering(), MagnitudeSparsity(0.5)], "MagnitudeSparsity", "WeightClustering"),
        ([WeightClustering(), ChannelPruning(0.5)], "ChannelPruning", "WeightClustering"),
    ],
)
def test_callbacks_in_another_order_are_refused_in_setup(callbacks, later, earlier):
    message = f"{later} comes after {earlier}.*{ORDER}"
    for callback in callbacks:
        with pytest.raises(MisconfigurationException, match=message):
            callback.setup(trainer(callbacks=callbacks), Net(), "fit")


@pytest.mark.parametrize(
    "callbacks",
    [
        [],
        [qat()],
        [ChannelPruning(0.5), MagnitudeSparsity(0.5), qat()],
        [MagnitudeSparsity(0.5), ChannelPruning(0.5), qat()],
        [ChannelPruning(0.5), WeightClustering(), qat()],
        [pruning(at=4), WeightClustering(begin=4), qat(begin=4)],
        [WeightClustering(begin=0.5), qat(begin=0.5)],
        [ChannelPruning(0.5, schedule=Schedule(end=0.5)), qat(begin=20)],  # known later
    ],
    ids=lambda callbacks: " ".join(type(c).__name__ for c in callbacks),
)
def test_legal_orders_pass(callbacks):
    check(*callbacks)
    assert not any(c.stage_span(resolved=True) for c in callbacks[:-1])


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            [pruning(at=5), qat(begin=4)],
            "rounds from step 4 on, and channels are cut by ChannelPruning until step 5",
        ),
        ([pruning(at=5), qat()], "rounds from 0.0 of the run on"),
        (
            [ChannelPruning(0.5, schedule=Schedule(end=0.5)), qat(begin=0.4)],
            "channels are cut by ChannelPruning until 0.5 of the run",
        ),
        (
            [WeightClustering(begin=0.5), qat(begin=0)],
            "weights are clustered by WeightClustering until 0.5 of the run",
        ),
    ],
)
def test_stages_that_come_after_rounding_began_are_refused_in_setup(callbacks, message):
    order = "prune, sparsify, cluster, quantize: let QuantizationAwareTraining begin later"
    with pytest.raises(MisconfigurationException, match=f"{message}.*{order}"):
        check(*callbacks)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            [ChannelPruning(0.5, schedule=Schedule("linear", 0, 0.5, 1)), qat(begin=7)],
            "from step 7 on, and channels are cut by ChannelPruning until step 8",
        ),
        (
            [
                pruning(
                    schedule=Schedule("constant", begin=1, end=1, update_every=1, unit="epoch")
                ),
                qat(begin=7),
            ],
            "until epoch 1",
        ),
        ([WeightClustering(begin=0.5), qat(begin=7)], "weights are clustered .* until step 8"),
        ([WeightClustering(begin=9), qat(begin=1, unit="epoch")], "rounds from epoch 1 on"),
    ],
)
def test_moments_of_different_kinds_are_compared_when_the_fit_begins(callbacks, message):
    module = Net()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(MisconfigurationException, match=message):
        fit(*callbacks, module=module)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "stage", [ChannelPruning(0.5), WeightClustering(4), MagnitudeSparsity(0.5)]
)
def test_stages_on_a_module_that_is_quantized_are_refused(stage):
    module = fit(qat(), max_epochs=1)
    name = type(stage).__name__
    message = f"'model' was quantized in an earlier stage, and {name}.*prune, sparsify, cluster"
    with pytest.raises(MisconfigurationException, match=message):
        stage.setup(trainer(callbacks=[stage]), module, "fit")
    if not isinstance(stage, MagnitudeSparsity):
        with pytest.raises(MisconfigurationException, match=message):
            fit(stage, qat(), module=module, max_epochs=1)


def test_a_checkpoint_of_an_earlier_quantization_is_refused_too(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8)
    fit(qat(), save, enable_checkpointing=True, max_epochs=1)
    with pytest.raises(MisconfigurationException, match="quantized in an earlier stage"):
        fit(pruning(), qat(), ckpt_path=tmp_path / "step=8.ckpt")


def test_a_run_of_all_stages_is_resumed_in_the_same_module(tmp_path):
    def callbacks():
        return [pruning(at=2), MagnitudeSparsity(0.5), qat(begin=3)]

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8)
    module = fit(*callbacks(), save, enable_checkpointing=True, max_epochs=1)
    fit(*callbacks(), module=module, ckpt_path=tmp_path / "step=8.ckpt", max_epochs=2)
    assert widths(module) == HALF
    assert is_quantized(module.model)
