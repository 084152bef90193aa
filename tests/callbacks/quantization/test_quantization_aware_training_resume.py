import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lit_compress import load_compressed
from lit_compress.compress.quantization.network import is_quantized
from tests.callbacks.channel_fits import fit
from tests.callbacks.nets import Net, loader, trainer
from tests.callbacks.quantized_fits import DropNet, integers, qat, quantizers, same_state

IMAGES = loader().dataset[:16][0]


class Counting:
    """A loader that Lightning resumes in mid-epoch: its state is how many batches it gave."""

    def __init__(self):
        self.batches = list(loader(48))
        self.given = 0

    def __iter__(self):
        self.given %= len(self.batches)
        while self.given < len(self.batches):
            self.given += 1
            yield self.batches[self.given - 1]

    def __len__(self):
        return len(self.batches)

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


def saved(folder, **options):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)


# --- Resuming -------------------------------------------------------------------------------------

# Without dropout, whose random numbers Lightning does not resume.
TRAINED = {
    "observed-sgd": ("observed", "sgd", False),
    "learned-sgd": ("learned", "sgd", False),
    "learned-adamw": ("learned", "adamw", False),
    "observed-ema": ("observed", "sgd", True),
    "learned-ema": ("learned", "adamw", True),
}


@pytest.mark.parametrize("trained", TRAINED)
def test_a_run_resumed_at_any_step_is_bit_identical(tmp_path, trained):
    ranges, optimizer, averaging = TRAINED[trained]

    def callbacks():
        plan = {"begin": 3, "freeze_batch_norm": 8, "freeze_ranges": 10, "initial_weight_bits": 6}
        averages = [EMAWeightAveraging(decay=0.8)] if averaging else []
        return [*averages, qat(4, ranges=ranges, **plan)]

    def module():
        made = DropNet(optimizer)
        made.model[6][1].p = 0.0
        return made

    save = saved(tmp_path, every_n_train_steps=1)
    options = {"module": module, "max_epochs": 2}
    whole = fit(*callbacks(), save, data=Counting(), enable_checkpointing=True, **options)
    for step in (2, 3, 6, 9):  # before, at and after the beginning; 6 is the end of an epoch
        file = tmp_path / f"step={step}.ckpt"
        resumed = fit(*callbacks(), data=Counting(), ckpt_path=file, seed=2, **options)
        assert same_state(whole, resumed), step


def test_optimizer_states_find_their_parameters_behind_the_scales(tmp_path):
    class Tail(Net):
        """Its optimizer gets the scales of a checkpoint between others, in another group."""

        def __init__(self):
            super().__init__()
            self.tail = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.tail(self.model(x))

        def configure_optimizers(self):
            small = [p for p in self.parameters() if p.dim() < 2]
            large = [p for p in self.parameters() if p.dim() >= 2]
            groups = [{"params": small}, {"params": large, "weight_decay": 0.0}]
            return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)

    def callback():
        return qat(4, ranges="learned", network="model")

    save = saved(tmp_path, every_n_train_steps=8)
    whole = fit(callback(), save, module=Tail, enable_checkpointing=True)
    resumed = fit(callback(), module=Tail, ckpt_path=tmp_path / "step=8.ckpt", seed=2)
    assert same_state(whole, resumed)
    fit(callback(), module=whole, max_epochs=1)  # once more, with none of the old scales
    again = trainer(max_epochs=1, callbacks=[callback()])
    again.fit(whole, loader())
    held = [p for g in again.optimizers[0].param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in whole.parameters()}
    assert len(held) == len(list(whole.parameters()))


def test_a_run_in_epochs_resumes_exactly(tmp_path):
    def callback():
        return qat(4, begin=1, freeze_batch_norm=2, freeze_ranges=2, unit="epoch")

    save = saved(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True)
    options = {"max_epochs": 3, "limit_train_batches": 3}
    whole = fit(callback(), save, enable_checkpointing=True, **options)
    for step in (3, 6):
        resumed = fit(callback(), ckpt_path=tmp_path / f"step={step}.ckpt", seed=2, **options)
        assert same_state(whole, resumed), step


def test_a_resumed_run_keeps_its_moments_when_it_is_made_longer(tmp_path):
    save = saved(tmp_path, every_n_train_steps=8)
    fit(qat(begin=0.5), save, enable_checkpointing=True, max_epochs=1)
    callback = qat(begin=0.5)
    fit(callback, ckpt_path=tmp_path / "step=8.ckpt", max_epochs=3)
    assert callback._training.plan.begin == 4


@pytest.mark.parametrize("averaging", [False, True], ids=["plain", "ema"])
def test_a_float_run_goes_on_with_learned_scales(tmp_path, averaging):
    averages = [EMAWeightAveraging(decay=0.8)] if averaging else []
    save = saved(tmp_path, every_n_train_steps=8)
    fit(*averages, save, enable_checkpointing=True, max_epochs=1)
    averages = [EMAWeightAveraging(decay=0.8)] if averaging else []
    module = fit(
        *averages, qat(4, ranges="learned"), ckpt_path=tmp_path / "step=8.ckpt", max_epochs=2
    )
    assert quantizers(module).quantizing
    assert all(q.scale.isfinite().all() for q in quantizers(module).quantizers)
    assert int(integers(module, "4.weight").abs().max()) == 7


def test_observed_ranges_are_prepared_anew_under_other_arguments(tmp_path):
    save = saved(tmp_path, every_n_train_steps=8)
    fit(qat(8), save, enable_checkpointing=True, max_epochs=1)
    module = fit(qat(3, ranges="learned"), ckpt_path=tmp_path / "step=8.ckpt", max_epochs=2)
    assert int(integers(module, "4.weight").abs().max()) == 3


def test_learned_scales_of_other_arguments_are_refused(tmp_path):
    save = saved(tmp_path, every_n_train_steps=8)
    fit(qat(4, ranges="learned"), save, enable_checkpointing=True, max_epochs=1)
    with pytest.raises(MisconfigurationException, match="trains scales .* other arguments .*begin"):
        fit(qat(3, ranges="learned"), ckpt_path=tmp_path / "step=8.ckpt", max_epochs=2)


# --- Loading --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["observed", "learned"])
def run(request, tmp_path_factory):
    """A module that was trained, and the weights-only checkpoint of its last step."""
    folder = tmp_path_factory.mktemp("run")
    save = saved(folder, every_n_train_steps=8, save_weights_only=True)
    callback = qat(4, ranges=request.param, activation_bits=6, begin=2)
    module = fit(callback, save, enable_checkpointing=True, max_epochs=1)
    return module.eval(), folder / "step=8.ckpt"


def test_a_checkpoint_of_weights_alone_loads_into_class_instance_and_network(run):
    module, file = run
    assert "lit_compress_quantization" in torch.load(file, weights_only=True)
    expected = module(IMAGES)
    for target in (Net, Net(), Net().model):
        loaded = load_compressed(file, target).eval()
        assert torch.equal(loaded(IMAGES), expected)
        assert same_state(getattr(loaded, "model", loaded), module.model)


def test_a_checkpoint_without_its_quantizers_is_refused_by_lightning_by_their_name(run):
    _, file = run
    with pytest.raises(RuntimeError, match=r"Unexpected key.*model\.quantization\."):
        Net.load_from_checkpoint(file, weights_only=True)
    assert not is_quantized(Net.load_from_checkpoint(file, weights_only=True, strict=False).model)


class WithTest(Net):
    def test_step(self, batch, batch_idx):
        self.log("loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.parametrize("quantized_before", [False, True])
def test_the_trainer_tests_a_checkpoint(run, quantized_before):
    module, file = run
    images, labels = loader().dataset[:]
    expected = float(torch.nn.functional.cross_entropy(module(images), labels).detach())
    tested = WithTest()
    if quantized_before:
        fit(qat(8, layer_bits={"8": 3}), module=tested, max_epochs=1)
    runner = trainer(callbacks=[qat(4)])
    (found,) = runner.test(tested, loader(), ckpt_path=file, verbose=False)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    (again,) = trainer().test(tested, loader(), verbose=False)
    assert again == found


def test_a_float_checkpoint_makes_the_module_float_again(tmp_path):
    save = saved(tmp_path, every_n_train_steps=8)
    fit(save, enable_checkpointing=True, max_epochs=1)
    module = fit(qat(), module=WithTest, max_epochs=1)
    trainer(callbacks=[qat()]).test(
        module, loader(), ckpt_path=tmp_path / "step=8.ckpt", verbose=False
    )
    assert not is_quantized(module.model)
    assert module.state_dict().keys() == Net().state_dict().keys()
