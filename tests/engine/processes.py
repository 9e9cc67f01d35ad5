"""Processes of their own for the tests, forked from a server that has all imports behind it: a second and not six."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch

import memtrain
from engine import checkpoints
from engine.config import Config, run_with_flags

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["processes"])


def serve() -> None:
    """Start the server, which then imports by itself; nothing where it runs already."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # it gets sys.path in no other way
        forkserver.ensure_running()


def start(function, *arguments, ranks: int = 1) -> list:
    """`function(*arguments)` in `ranks` new processes, joined as torchrun would join them if there are several."""
    environments: list[dict] = [{}]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environments = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    serve()
    started = [context.Process(target=begin, args=(each, function, arguments), daemon=True) for each in environments]
    for process in started:
        process.start()
    return started


def begin(environment: dict, function, arguments: tuple) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(100, file=sys.__stderr__)  # so a process that waits for ever says where
    function(*arguments)


def wait(started: list, seconds: float = 120) -> list[int | None]:
    """The exit codes of the processes, None for one that is still there after so many seconds: it is killed."""
    codes, end = [], time.monotonic() + seconds
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
        codes.append(process.exitcode)
        process.kill()
    return codes


def run(arguments: list, log: Path, deadly: str | None = None) -> None:
    """memtrain.py, which prints to `log`, of several processes rank 0 alone.

    "function:n" kills it at the n-th call of that function of engine/checkpoints.py, "function:n:TERM" asks it to end;
    of several processes the last.
    """
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if deadly and rank == ranks - 1:
        name, n, *gently = deadly.split(":")
        real, calls = getattr(checkpoints, name), [0]

        def counted(*more):
            calls[0] += 1
            if calls[0] == int(n):
                os.kill(os.getpid(), signal.SIGTERM if gently else signal.SIGKILL)
            return real(*more)

        setattr(checkpoints, name, counted)
    sys.argv = ["memtrain.py", *map(str, arguments)]
    if rank == 0:
        sys.stdout = sys.stderr = open(log, "w")
    run_with_flags(memtrain.main, Config)
    sys.stdout.flush()
