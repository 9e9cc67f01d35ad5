"""AdamW over float32 master weights, for a policy that computes in bfloat16, on the GPU or in CPU memory.

bfloat16 has 8 bits of mantissa: a weight of 0.02 moves in steps of 1e-4, so updates of 1e-6 would all round away, and
so would most of what accumulates in a bfloat16 gradient. So weights, moments and the gradients that add up over
micro-batches are float32 here, and the policy holds a rounded copy. A float32 policy is its own master: then this is
plain AdamW.
"""

import math

import torch

from engine.parallel import sum_gradients


class MasterAdamW:
    """AdamW whose `step` takes the gradients accumulated so far and writes the rounded weights back to the policy."""

    def __init__(self, model, lr: float, offload: bool = False, separate: bool = False):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.separate = separate or offload or any(p.dtype != torch.float32 for p in self.weights)
        self.masters, self.sums = self.weights, {}
        if self.separate:
            device = "cpu" if offload else None
            copies = (p.detach().to(device, torch.float32, copy=True) for p in self.weights)
            self.masters = [torch.nn.Parameter(self.own_part(copy)) for copy in copies]
            for weight in self.weights:
                weight.register_post_accumulate_grad_hook(self.accumulate)
        # Fused: one pass over memory instead of one for each of AdamW's operations.
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0, fused=True)

    def accumulate(self, weight) -> None:
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
            # Every process must bring every gradient, also one that kept no turn.
            gradients.append(torch.zeros_like(weight, dtype=torch.float32) if gradient is None else gradient)
        self.set_gradients(gradients)
        norm = self.whole(torch.nn.utils.clip_grad_norm_(self.masters, grad_clip or math.inf))
        if norm.isfinite():  # the same on every process: it is of the sum
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        if norm.isfinite() and self.separate:
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.data.copy_(self.whole(master.data))
        return norm.item()

    def set_gradients(self, gradients: list[torch.Tensor]) -> None:
        """Give each master the sum of its gradients over all processes."""
        sum_gradients(gradients)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.to(master.device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the next step depends on, beside the policy: moments, step counts and separate masters."""
        state = self.adamw.state_dict()["state"]
        found = {f"{n}.{name}": tensor for n, values in state.items() for name, tensor in values.items()}
        return found | ({f"{n}.master": master for n, master in enumerate(self.masters)} if self.separate else {})

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from `tensors()`. The policy must have its weights back: masters that are missing are made of them."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                master.data.copy_(self.own_part(weight.detach().float()))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            n, name = key.split(".")
            tensor = self.own_part(tensor) if tensor.dim() else tensor  # step counts have no dimension
            if name == "master":
                self.masters[int(n)].data.copy_(tensor)
            else:
                state.setdefault(int(n), {})[name] = tensor
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})

    # engine/sharding.py has its own of these two.

    def own_part(self, tensor: torch.Tensor) -> torch.Tensor:
        """What this process keeps of a tensor: all of it."""
        return tensor

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor
