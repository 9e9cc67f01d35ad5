"""The optimizer of engine/masters.py, sharded over the processes as in FSDP2, with torch's DTensor.

Every process keeps its rows of each master and its moments: 12 bytes per parameter in total, not on each GPU. A row's
gradient is summed on the process that keeps the row, and updated weights are gathered.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor, init_device_mesh

from engine.errors import UserError
from engine.masters import MasterAdamW
from engine.parallel import rank


class ShardedAdamW(MasterAdamW):
    """MasterAdamW of which each process holds its own rows. Raises UserError without torchrun or with `offload`."""

    def __init__(self, model, lr: float, offload: bool = False):
        if offload or not dist.is_initialized():
            why = "--offload-optimizer True does the same in CPU memory; give one" if offload else "needs torchrun"
            raise UserError(f"--shard-optimizer True: {why}")
        self.mesh, self.device = init_device_mesh(model.device.type, (dist.get_world_size(),)), model.device
        super().__init__(model, lr)

    def own_part(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process's rows of a tensor that all processes have."""
        return distribute_tensor(tensor.to(self.device), self.mesh, [Shard(0)], src_data_rank=None)

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """All rows of a tensor, which may be sharded."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def set_gradients(self, gradients: list[torch.Tensor]) -> None:
        """Give each process the summed gradient of its own rows, freeing the full gradients one by one."""
        for n, master in enumerate(self.masters):
            gradient, gradients[n] = gradients[n], None
            summed = DTensor.from_local(gradient, self.mesh, [Partial()]).redistribute(placements=[Shard(0)])
            master.grad = summed.to(master.device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Called by all processes; process 0 gets the complete tensors, in CPU memory, the others {}."""
        kept = {}
        for name, tensor in super().tensors().items():  # one at a time: together they don't fit on a GPU
            tensor = self.whole(tensor)
            if rank() == 0:
                kept[name] = tensor.detach().cpu()
        return kept
