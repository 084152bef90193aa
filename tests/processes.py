"""Scripts in processes of their own, which need not import torch and Lightning again.

A process that imports the library is started once, when the first test asks for it; those of the
tests are forked from it. It has computed nothing by then, so nothing that a fork would break is in
it: no threads, no device. On systems without fork, each process starts from the beginning.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import time
import traceback
from pathlib import Path

import torch

LIBRARY = ["lit_compress", "lit_compress.cli", "lit_compress.tasks"]


def run_script(
    script: Path, *arguments: str, environments: list[dict[str, str]], folder: Path
) -> list[tuple[int | None, str]]:
    """Run a script as ``python script arguments`` would, in as many processes as environments.

    Returns the exit code and the output of each. When one fails, those that wait for it are ended.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(LIBRARY)
    logs = [folder / f"process{number}.log" for number in range(len(environments))]
    processes = [
        context.Process(
            target=_run, args=(str(script), arguments, dict(os.environ) | added, str(log))
        )
        for added, log in zip(environments, logs, strict=True)
    ]
    for process, log in zip(processes, logs, strict=True):
        log.touch()
        process.start()
    ends = time.monotonic() + 240
    while any(process.is_alive() for process in processes):
        if time.monotonic() > ends or any(process.exitcode for process in processes):
            break
        processes[0].join(0.05)
        time.sleep(0.01)
    for process in processes:
        process.join(0.5)
        if process.is_alive():
            process.kill()
            process.join()
    return [(p.exitcode, log.read_text()) for p, log in zip(processes, logs, strict=True)]


def _run(script: str, arguments: tuple[str, ...], environment: dict[str, str], log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    root = str(Path(__file__).parents[1])
    sys.path[:] = [root, *(path for path in sys.path if path != root)]
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
