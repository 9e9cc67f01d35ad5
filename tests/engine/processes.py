"""Processes of their own for the tests, forked from a server that has all imports behind it: a second and not six."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
from torch.distributed import TCPStore

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
    store = None
    if ranks > 1:
        # They meet in a store that is open here, as with torchrun: a free port may be taken before rank 0 binds it.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
            "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
        }
        environments = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    serve()
    started = [context.Process(target=begin, args=(each, function, arguments), daemon=True) for each in environments]
    for process in started:
        process.start()
        process.store = store  # so it lives as long as they are known
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
    """Run memtrain.py; rank 0 prints to `log`.

    "function:n" kills it at the n-th call of that function of engine/checkpoints.py, "function:n:TERM" asks it to end;
    of several processes the last. "anything:n" kills it at the n-th call of any function, Python's or C's; with n = 0
    the number of all calls is printed in the end.
    """
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if deadly and rank == ranks - 1:
        name, n, *gently = deadly.split(":")
        calls = [0]

        def count() -> None:
            calls[0] += 1
            if calls[0] == int(n):
                os.kill(os.getpid(), signal.SIGTERM if gently else signal.SIGKILL)

        if name == "anything":
            sys.setprofile(lambda frame, event, _: event in ("call", "c_call") and count())
        else:
            real = getattr(checkpoints, name)

            def counted(*more):
                count()
                return real(*more)

            setattr(checkpoints, name, counted)
    sys.argv = ["memtrain.py", *map(str, arguments)]
    if rank == 0:
        sys.stdout = sys.stderr = open(log, "w")
    run_with_flags(memtrain.main, Config)
    if deadly == "anything:0":
        sys.setprofile(None)
        print(f"{calls[0]} calls")
    sys.stdout.flush()
