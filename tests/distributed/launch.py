"""Run a script in two gloo processes on the CPU."""

import os
import socket
from pathlib import Path

import torch

from tests.processes import run_script


def run_in_two_processes(script: str, folder: Path) -> list[str]:
    """Run ``script folder`` in two processes; what each wrote to ``folder/rank<N>.txt``."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # What torchrun would tell them.
    shared = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    ended = run_script(Path(script), str(folder), environments=ranks, folder=folder)
    assert [code for code, _ in ended] == [0, 0], "\n".join(log[-4000:] for _, log in ended)
    return [(folder / f"rank{rank}.txt").read_text() for rank in range(2)]


def report(folder: Path, results: dict[str, bool]) -> None:
    """Leave this process's results where :func:`run_in_two_processes` finds them, and finish.

    A process that exits with a live group aborts now and then, when gloo's threads outlive it.
    """
    (folder / f"rank{os.environ['RANK']}.txt").write_text(str(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
