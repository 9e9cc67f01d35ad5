"""AdamW over float32 master weights, for a policy that computes in bfloat16, on the GPU or in CPU memory.

bfloat16 has 8 bits of mantissa: a weight of 0.02 moves in steps of 1e-4, so updates of 1e-6 would all round away, and
so would most of what accumulates in a bfloat16 gradient. So weights, moments and the gradients that add up over
micro-batches are float32 here, and the policy holds a rounded copy. A float32 policy is its own master: then this is
plain AdamW.

Sharded, every process keeps its rows of each master and of its moments, as FSDP2 does (torch's DTensor): 12 bytes a
parameter in all, not on each GPU. Gradients are summed where they are needed, and fresh weights are gathered.
"""

import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor, init_device_mesh

from engine.errors import UserError
from engine.parallel import rank, sum_gradients


class MasterAdamW:
    """AdamW whose `step` takes the gradients accumulated so far and writes the rounded weights back to the policy."""

    def __init__(self, model, lr: float, offload: bool = False, shard: bool = False):
        if shard and (offload or not dist.is_initialized()):
            why = "--offload-optimizer True does the same in CPU memory; give one" if offload else "needs torchrun"
            raise UserError(f"--shard-optimizer True: {why}")
        self.updates = 0  # since this process began
        self.mesh = init_device_mesh(model.device.type, (dist.get_world_size(),)) if shard else None
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.separate = offload or shard or any(p.dtype != torch.float32 for p in self.weights)
        if not self.separate:
            self.masters = self.weights
        else:
            device = "cpu" if offload else None
            copies = (p.detach().to(device, torch.float32, copy=True) for p in self.weights)
            self.masters = [torch.nn.Parameter(self._shared_out(copy)) for copy in copies]
            self.sums: dict[torch.Tensor, torch.Tensor] = {}
            for weight in self.weights:
                weight.register_post_accumulate_grad_hook(self._accumulate)
        # Fused: one pass over memory instead of one for each of AdamW's operations.
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0, fused=True)

    def _shared_out(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process's rows of a tensor that all have; all of it where nothing is sharded."""
        return distribute_tensor(tensor, self.mesh, [Shard(0)], src_data_rank=None) if self.mesh else tensor

    def _accumulate(self, weight) -> None:
        """Move a fresh gradient into its float32 sum, where small ones don't vanish beside large ones."""
        if weight in self.sums:
            self.sums[weight] += weight.grad
        else:
            self.sums[weight] = weight.grad.float()
        weight.grad = None

    def step(self, lr: float, grad_clip: float) -> float:
        """One update by the gradients of all processes, or none if they are not finite -> their norm, unclipped."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        gradients = []
        for weight in self.weights:
            gradient = self.sums.pop(weight, None) if self.separate else weight.grad
            # Every process must bring every gradient, also one that kept no sample.
            gradients.append(torch.zeros_like(weight, dtype=torch.float32) if gradient is None else gradient)
        if not self.mesh:
            sum_gradients(gradients)
        for n, master in enumerate(self.masters):
            gradient, gradients[n] = gradients[n], None  # sharded, the whole of it is let go of
            if self.mesh:  # each process gets the sum of its own rows
                gradient = DTensor.from_local(gradient, self.mesh, [Partial()]).redistribute(placements=[Shard(0)])
            master.grad = gradient.to(master.device)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.masters, grad_clip or math.inf))
        if norm.isfinite():  # the same on every process: it is of the sum
            self.adamw.step()
            self.updates += 1
        self.adamw.zero_grad(set_to_none=True)
        if self.separate and norm.isfinite():
            with torch.no_grad():
                for weight, master in zip(self.weights, self.masters, strict=True):
                    weight.copy_(whole(master))
        return norm.item()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the next step depends on, beside the policy: moments, step counts and separate masters.

        Sharded, all processes call it, and process 0 gets them, whole and in CPU memory.
        """
        state = self.adamw.state_dict()["state"]
        found = {f"{n}.{name}": tensor for n, values in state.items() for name, tensor in values.items()}
        found |= {f"{n}.master": master for n, master in enumerate(self.masters)} if self.separate else {}
        if not self.mesh:
            return found
        kept = {}
        for name, tensor in found.items():  # one at a time: together they don't fit on a GPU
            tensor = whole(tensor)
            if rank() == 0:
                kept[name] = tensor.detach().cpu()
        return kept

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from `tensors()`. The policy must have its weights back: masters that are missing are made of them."""
        if self.separate:
            for weight, master in zip(self.weights, self.masters, strict=True):
                master.data.copy_(self._shared_out(weight.detach().float()))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            n, name = key.split(".")
            if tensor.dim():  # but for step counts
                tensor = self._shared_out(tensor.to(self.weights[0].device) if self.mesh else tensor)
            if name == "master":
                self.masters[int(n)].data.copy_(tensor)
            else:
                state.setdefault(int(n), {})[name] = tensor
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows of a tensor, which processes may share."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
