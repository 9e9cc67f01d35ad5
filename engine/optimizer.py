"""AdamW on the summed gradients of all processes, updating the weights in place: for a float32 policy.

engine/masters.py has the optimizer for a bfloat16 policy, engine/sharding.py one that is sharded over the processes.
"""

import math

import torch

from engine.parallel import sum_gradients


class AdamW:
    """AdamW whose `step` uses the gradients accumulated so far. It updates `masters`: here, the weights themselves."""

    def __init__(self, model, lr: float):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = self.make_masters()
        # Fused: one pass over memory instead of one for each of AdamW's operations.
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0, fused=True)

    def step(self, lr: float, grad_clip: float) -> float:
        """One update with the gradients of all processes, or none if they aren't finite -> norm before clipping."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.set_gradients([self.gradient(weight) for weight in self.weights])
        norm = self.whole(torch.nn.utils.clip_grad_norm_(self.masters, grad_clip or math.inf))
        if norm.isfinite():  # the same on every process, as the gradients are summed
            self.adamw.step()
            self.write_back()
        self.adamw.zero_grad(set_to_none=True)
        return norm.item()

    def set_gradients(self, gradients: list[torch.Tensor]) -> None:
        """Give each master the sum of its gradients over all processes."""
        sum_gradients(gradients)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.to(master.device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that the next step depends on, besides the policy's weights."""
        state = self.adamw.state_dict()["state"]
        return {f"{n}.{name}": tensor for n, values in state.items() for name, tensor in values.items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from `tensors()`. The policy's weights must be loaded first."""
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            n, name = key.split(".")
            if name != "master":  # engine/masters.py's; for a float32 policy it equals the weight
                state.setdefault(int(n), {})[name] = tensor
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})

    # ---- engine/masters.py and engine/sharding.py override these

    def make_masters(self) -> list[torch.nn.Parameter]:
        return self.weights

    def gradient(self, weight) -> torch.Tensor:
        """This process's gradient of a weight: zeros if it kept no turn, as all processes must take part in the sum."""
        return torch.zeros_like(weight) if weight.grad is None else weight.grad

    def write_back(self) -> None:
        """Copy the masters into the policy."""

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """The complete tensor, of which each process may hold a part."""
        return tensor
