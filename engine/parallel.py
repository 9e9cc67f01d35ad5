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


def has_gpu() -> bool:
    """Whether there is a GPU, for which torch is then set up. To be asked before anything else asks for one."""
    # torch reads this when CUDA starts. Batches of ever other sizes leave less memory between them this way.
    if os.environ.keys().isdisjoint(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if not torch.cuda.is_available():
        return False
    # Newer cards try it first, and it makes a plan for each new shape: so for each token that is sampled.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return True


def start() -> str:
    """Join this process to the others if torchrun started it -> its device. Raises UserError."""
    cuda = has_gpu()
    if "LOCAL_RANK" not in os.environ:
        return "cuda" if cuda else "cpu"
    number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if cuda and number >= gpus:
        raise UserError(f"torchrun --nproc_per_node: more processes than the {gpus} GPUs here; start one for each")
    if cuda:
        torch.cuda.set_device(number)
    # Reading times differ between documents, so the fast ones wait; a rollout of long documents can take an hour.
    wait, device = timedelta(hours=4), f"cuda:{number}" if cuda else "cpu"
    own = torch.device(device) if cuda else None  # or a barrier guesses which GPU is this process's
    dist.init_process_group("nccl" if cuda else "gloo", timeout=wait, device_id=own)
    return device


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
