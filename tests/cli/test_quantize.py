"""``lit-compress quantize``: a run's checkpoint, before and after, in files that load."""

import json
from pathlib import Path

import pytest
import torch

from lit_compress import load_compressed
from lit_compress.cli import main
from lit_compress.compress.quantization.network import quantized_network
from lit_compress.compress.weight_files import read_checkpoint
from lit_compress.tasks import ImageClassifier


@pytest.fixture
def config(run_folder):
    return f"--config={run_folder / 'config.yaml'}"


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["quantize", *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def logits(path):
    module = load_compressed(path, ImageClassifier(model="digits_cnn", model_args={"width": 4}))
    return module.eval().model(torch.linspace(-1, 1, 128).view(2, 1, 8, 8))


def test_a_checkpoint_and_a_packed_file(capsys, checkpoint):
    files = ["--output=out/q.ckpt", "--packed=out/q.packed", "--json=out/q.json"]
    assert main(["quantize", str(checkpoint), *files]) == 0
    printed = capsys.readouterr().out
    assert "Quantized 4 layers: static, 8-bit weights, 8-bit activations, mse ranges" in printed
    found = json.loads(Path("out/q.json").read_text())
    assert set(found["metrics_before"]) == {"val_loss", "val_top1", "val_top5"}
    assert found["metrics_after"]["val_loss"] == pytest.approx(
        found["metrics_before"]["val_loss"], abs=0.05
    )
    sizes = {name: file["bytes"] for name, file in found["files"].items()}
    assert sizes == {
        "checkpoint": Path("out/q.ckpt").stat().st_size,
        "packed": Path("out/q.packed").stat().st_size,
    }
    assert sizes["packed"] < 0.5 * checkpoint.stat().st_size
    assert torch.equal(logits("out/q.ckpt"), logits("out/q.packed"))
    assert not torch.equal(logits("out/q.ckpt"), logits(checkpoint))
    # The zeros of the run's sparsity are there as they were.
    sparse = read_checkpoint(checkpoint)["state_dict"]
    packed = read_checkpoint("out/q.packed")["state_dict"]
    weights = [name for name, value in sparse.items() if value.dim() > 1]
    assert sum(int((sparse[n] == 0).sum()) for n in weights) > 700
    assert all(bool((packed[n][sparse[n] == 0] == 0).all()) for n in weights)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_options_are_those_of_the_callback(capsys, checkpoint, config, prefix):
    options = ["--weight_bits=4", f'--layer_bits={{"{prefix}0": 8}}',
               f'--ignored_layers=["{prefix}6"]',
               '--corrections=["bias_correction"]', "--ranges=percentile", "--percentile=99.9",
               "--num_calibration_batches=2", "--limit_val_batches=2"]  # fmt: skip
    assert (
        main(["quantize", "--ckpt_path", str(checkpoint), config, "--output=q.ckpt", *options]) == 0
    )
    printed = capsys.readouterr().out
    assert (
        f"4-bit weights, but {{'{prefix}0': 8}}, 8-bit activations, percentile ranges, bias_correc"
        in printed
    )
    assert "6: it is in ignored_layers" in printed
    module = ImageClassifier(model="digits_cnn", model_args={"width": 4})
    found = quantized_network(load_compressed("q.ckpt", module).model)
    bits = {n: found.weight(n).grid.bits for n in found.placement.weights.values()}
    assert bits == {"0.weight": 8, "3.weight": 4, "11.weight": 4}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method=float16"], "Quantized the network: float16."),
        (["--method=weight_only", "--weight_bits=3"], "weight_only, 3-bit weights."),
        (["--method=fixed_point", "--fixed_point.method=log", "--fixed_point.param_bits=6"],
         "FixedPoint(method='log', param_bits=6, running_stat_bits=16, activation_bits=8"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_other_methods(capsys, checkpoint, options, words):
    assert main(["quantize", str(checkpoint), "--output=q.ckpt", *options]) == 0
    assert words in capsys.readouterr().out
    assert logits("q.ckpt").dtype == torch.float32


def test_without_a_checkpoint_it_is_what_the_configuration_builds(config):
    assert main(["quantize", config, "--packed=q.packed"]) == 0
    assert logits("q.packed").isfinite().all()


def test_what_is_refused(capsys, checkpoint, config):
    output = "--output=q.ckpt"
    assert "give --output FILE" in refused(capsys, checkpoint)
    assert "is given twice" in refused(capsys, checkpoint, "--ckpt_path", checkpoint, output)
    assert "give the configuration of its run" in refused(capsys, output)
    assert "expected one of 'static'" in refused(capsys, checkpoint, output, "--method=int8")
    assert "did you mean 'weight_bits'" in refused(capsys, checkpoint, output, "--weight_bit=4")
    found = refused(capsys, checkpoint, output, "--method=float16", "--weight_bits=4")
    assert "weight_bits is 4, which method='float16' has no use for" in found
    found = refused(capsys, checkpoint, output, '--ignored_layers=["head"]')
    assert "'head', which matches none of the 4 layers" in found
    assert not Path("q.ckpt").exists()
    assert main(["quantize", str(checkpoint), output]) == 0
    found = refused(capsys, "q.ckpt", config, "--output=twice.ckpt")
    assert "'model' is quantized already" in found
    Path("bad.ckpt").write_bytes(b"no checkpoint")
    assert "cannot be read" in refused(capsys, "bad.ckpt", config, output)
    assert "There is no file" in refused(capsys, "none.ckpt", config, output)
