"""AdamW over float32 master weights, for a policy that computes in bfloat16, on the GPU or in CPU memory.

bfloat16 has 8 bits of mantissa: a weight of 0.02 moves in steps of 1e-4, so updates of 1e-6 would be lost to rounding,
and so would most small gradients added to a bfloat16 sum. So weights, moments and the gradient sums over micro-batches
are float32 here, and the policy holds a rounded copy.
"""

import torch

from engine.optimizer import AdamW


class MasterAdamW(AdamW):
    """AdamW on float32 copies of the weights, the masters; with `offload`, masters and moments are in CPU memory."""

    def __init__(self, model, lr: float, offload: bool = False):
        self.offload, self.sums = offload, {}
        super().__init__(model, lr)
        for weight in self.weights:
            weight.register_post_accumulate_grad_hook(self.accumulate)

    def make_masters(self) -> list[torch.nn.Parameter]:
        device = "cpu" if self.offload else None
        copies = (weight.detach().to(device, torch.float32, copy=True) for weight in self.weights)
        return [torch.nn.Parameter(self.own_part(copy)) for copy in copies]

    def accumulate(self, weight) -> None:
        """Add a new gradient to its float32 sum, where small gradients aren't rounded away."""
        if weight in self.sums:
            self.sums[weight] += weight.grad
        else:
            self.sums[weight] = weight.grad.float()
        weight.grad = None

    def gradient(self, weight) -> torch.Tensor:
        return self.sums.pop(weight) if weight in self.sums else torch.zeros_like(weight, dtype=torch.float32)

    def write_back(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.data.copy_(self.whole(master.data))

    def tensors(self) -> dict[str, torch.Tensor]:
        return super().tensors() | {f"{n}.master": master for n, master in enumerate(self.masters)}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from `tensors()`; masters that a float32 run didn't save are made from the policy's weights."""
        for n, (weight, master) in enumerate(zip(self.weights, self.masters, strict=True)):
            master.data.copy_(self.own_part(tensors.get(f"{n}.master", weight.detach().float())))
        # Step counts are scalars.
        super().load({key: self.own_part(tensor) if tensor.dim() else tensor for key, tensor in tensors.items()})

    def own_part(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor that this process keeps: here all of it, in engine/sharding.py its rows."""
        return tensor
