"""Several processes, one per GPU: each reads its own documents, and their gradients are summed explicitly.

No DistributedDataParallel: it needs the same number of backward passes on every process, and a process that kept fewer
samples has fewer. Each process runs its own, and gradients meet in one place: in `sum_gradients`, or in the sharded
optimizer, which takes each process's rows of their sum.
`torchrun --nproc_per_node N` sets the environment that `start` reads; without it there is one process.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.errors import UserError


def has_gpu() -> bool:
    """Whether there is a GPU; if so, sets torch up for it. Call this before anything else touches CUDA."""
    # torch reads this when CUDA starts. It reduces the fragmentation caused by batches of varying size.
    if os.environ.keys().isdisjoint(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if not torch.cuda.is_available():
        return False
    # torch tries it first on newer cards, and it builds a plan for each new shape, hence for each sampled token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return True


def start() -> str:
    """Join the other processes, if torchrun started any -> "cuda", "cuda:N" or "cpu". Raises UserError."""
    cuda = has_gpu()
    if "LOCAL_RANK" not in os.environ:
        return "cuda" if cuda else "cpu"
    number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if cuda and number >= gpus:
        raise UserError(f"torchrun --nproc_per_node: more processes than the {gpus} GPUs here; start one per GPU")
    if cuda:
        torch.cuda.set_device(number)
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"LOCAL_RANK is set but {missing[0]} is not; start with torchrun, or run `unset LOCAL_RANK`")
    # Fast processes wait for slow ones: a rollout of long documents can take an hour.
    wait, device = timedelta(hours=4), f"cuda:{number}" if cuda else "cpu"
    own = torch.device(device) if cuda else None  # or a barrier guesses this process's GPU
    dist.init_process_group("nccl" if cuda else "gloo", timeout=wait, device_id=own)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def stop() -> None:
    """Called by all processes at the end of a run. Waits for all: torchrun treats an early exit as a failure."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gather(value) -> list:
    """Every process's `value`, any picklable object, ordered by rank; the same list on all of them."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_gradients(gradients: list[torch.Tensor]) -> None:
    """Sum each gradient over all processes, in place: afterwards all processes hold the same."""
    if dist.is_initialized():
        works = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
        for work in works:
            work.wait()
