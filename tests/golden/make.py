"""Writes the files of this folder, with what becomes of each in ``expected.json``.

They are of commit d3625d0 and show that checkpoints of that time go on loading. They must NOT be
made again when the code changes: a test that fails here says that users' checkpoints are lost.

    PYTHONPATH=. python tests/golden/make.py
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint

from lit_compress import load_compressed
from lit_compress.cli import main
from tests.golden import runs


def make() -> dict[str, object]:
    """All files, in the working folder.

    Returns:
        What becomes of them, by their names.
    """
    dense = runs.fit([save := ModelCheckpoint(".", save_on_train_epoch_end=True)], max_epochs=20)
    Path(save.best_model_path).rename("dense.ckpt")
    expected: dict[str, object] = {"dense.ckpt": loaded(dense)}
    for name, callbacks in runs.RUNS.items():
        save = ModelCheckpoint("saved", every_n_epochs=2, save_top_k=-1, filename="{epoch}")
        whole = runs.fit([*callbacks(), save])
        for file in ("packed.ckpt", "compression_report.json"):
            if Path("summary", file).is_file():
                Path("summary", file).rename(f"{name}_{file}")
        for snapshot in Path("saved").glob("*.pt"):
            snapshot.replace(snapshot.name)
        Path("saved/epoch=1.ckpt").rename(f"{name}.ckpt")
        shutil.rmtree("saved")
        resumed = runs.fit(callbacks(), f"{name}.ckpt")
        assert runs.digest(resumed) == runs.digest(whole), name
        half_way = loaded(load_compressed(f"{name}.ckpt", runs.GoldenNet))
        longer = runs.fit(callbacks(), f"{name}.ckpt", runs.LONGER)
        end = {"outputs": runs.outputs(longer), "kept": runs.kept(longer)}
        expected[f"{name}.ckpt"] = {**half_way, "end": end}
        if Path(f"{name}_packed.ckpt").is_file():
            packed = load_compressed(f"{name}_packed.ckpt", runs.GoldenNet())
            expected[f"{name}_packed.ckpt"] = loaded(packed)
    for name, method in runs.METHODS.items():
        module = runs.fit([runs.after(**method)], max_epochs=0)
        Path("quantized.ckpt").rename(f"{name}.ckpt")
        (logged,) = runs.trainer([runs.after(**method)]).validate(module, verbose=False)
        expected[f"{name}.ckpt"] = {**loaded(module), "validated": logged}
    assert main(runs.analysis()) == 0
    search = runs.search("channels", 6, target_macs_ratio=0.5)
    search.folder = Path(shutil.copytree("channels", tempfile.mkdtemp(), dirs_exist_ok=True))
    runs.fit([search], max_epochs=0)
    expected["channels/state.pt"] = runs.episodes(search)
    return expected


def loaded(module: runs.GoldenNet) -> dict[str, object]:
    """What a module is like."""
    return {"digest": runs.digest(module), "outputs": runs.outputs(module)}


if __name__ == "__main__":
    target = runs.FOLDER / "expected.json"
    if target.is_file():
        raise SystemExit("The files are there, and are not to be made again.")
    os.chdir(tempfile.mkdtemp())
    target.write_text(json.dumps(make(), indent=1) + "\n")
    wanted = ("*.ckpt", "*.pt", "*.json", "channels/*.pt", "*/search.json", "*/plan.json")
    results = ("*/sparsities.json", "*/layer_bits.json", "*/sensitivity.json")
    for file in {file for pattern in wanted + results for file in Path().glob(pattern)}:
        (runs.FOLDER / file).parent.mkdir(exist_ok=True)
        shutil.copy(file, runs.FOLDER / file)
