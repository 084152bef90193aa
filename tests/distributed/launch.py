"""Run a script in two gloo processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def run_in_two_processes(script: str, folder: Path) -> list[str]:
    """Run ``script folder`` in two processes; what each wrote to ``folder/rank<N>.txt``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, script, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [(folder / f"rank{rank}.txt").read_text() for rank in range(2)]


def report(folder: Path, results: dict[str, bool]) -> None:
    """Leave this process's results where :func:`run_in_two_processes` finds them, and finish.

    A process that exits with a live group aborts now and then, when gloo's threads outlive it.
    """
    (folder / f"rank{os.environ['RANK']}.txt").write_text(str(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
