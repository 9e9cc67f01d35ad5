"""Several processes, one a GPU: each reads its own documents, and their gradients are summed by hand.

No DistributedDataParallel: it wants equally many backward passes on every process, and a process that kept fewer
samples has fewer. Every process runs what it has, and gradients meet in one place: in `sum_gradients`, or where an
optimizer that is shared out takes each process's rows of their sum.
`torchrun --nproc_per_node N` sets the environment that `start` reads; without it all of this is one process.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.errors import UserError


def start() -> str:
    """Join this process to the others if torchrun started it -> its device. Raises UserError."""
    cuda = torch.cuda.is_available()
    if "LOCAL_RANK" not in os.environ:
        return "cuda" if cuda else "cpu"
    number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if cuda and number >= gpus:
        raise UserError(f"torchrun --nproc_per_node: more processes than the {gpus} GPUs here; start one for each")
    if cuda:
        torch.cuda.set_device(number)
    # Reading times differ between documents, so the fast ones wait; a rollout of long documents can take an hour.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=4))
    return f"cuda:{number}" if cuda else "cpu"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def stop() -> None:
    """Called by all processes at a run's end. Waits for all of them: torchrun treats an early exit as a failure."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gather(value) -> list:
    """`value` of every process, in the order of their ranks, on all of them. Any picklable object."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_gradients(gradients: list[torch.Tensor]) -> None:
    """Add up each gradient over all processes, in place: afterwards all hold the same."""
    if dist.is_initialized():
        works = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
        for work in works:
            work.wait()
