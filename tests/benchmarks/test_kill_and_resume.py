"""A run that is killed again and again ends as one that is not; the script notices if not."""

import os

import kill_and_resume
import pytest
import torch

TRIAL = {
    "kind": "one-shot",
    "seed": 0,
    "finished": True,
    "resumed_at": [3],
    "kills": 2,
    "unreadable": 0,
    "lost": 0,
    "identical": True,
    "first_difference": None,
    "reloads": True,
    "params_ratio": 0.5,
}


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    trial = kill_and_resume.Trial("progressive + sparsity", seed=2)
    result = kill_and_resume.run_trial(trial, tmp_path)
    assert kill_and_resume.check({"trials": [result]}) == []
    assert result["kills"] >= 1
    assert result["resumed_at"] == sorted(result["resumed_at"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", kill_and_resume.KINDS)
def test_every_schedule_can_be_made(kind):
    callbacks = kill_and_resume.KINDS[kind]()
    assert "ChannelPruning" in [type(callback).__name__ for callback in callbacks]


def test_half_written_checkpoints_are_passed_over(tmp_path):
    assert kill_and_resume.newest_readable(tmp_path) == (None, 0)
    for number in range(3):
        path = tmp_path / f"{number}.ckpt"
        torch.save({"global_step": number, "weight": torch.ones(1000)}, path)
        os.utime(path, ns=(number, number))
    half = (tmp_path / "2.ckpt").read_bytes()[:2000]
    (tmp_path / "2.ckpt").write_bytes(half)
    assert kill_and_resume.newest_readable(tmp_path) == (tmp_path / "1.ckpt", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finished": False, "error": "size mismatch"}, "did not finish: size mismatch"),
        ({"lost": 1}, "1 times no checkpoint could be read"),
        ({"identical": False, "first_difference": "0.weight"}, "0.weight differs"),
        ({"reloads": False}, "another structure"),
        ({"params_ratio": 1.0}, "nothing was cut"),
        ({"kills": 0}, "only 0 kills in 1 trials"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_goes_wrong_is_named(changes, message):
    assert kill_and_resume.check({"trials": [TRIAL]}) == []
    missed = kill_and_resume.check({"trials": [TRIAL | changes]})
    assert len(missed) == 1
    assert message in missed[0]
