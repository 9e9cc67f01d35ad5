"""engine/optimizer.py, engine/masters.py: AdamW in float32, against torch's own, and behind a bfloat16 policy."""

import pytest
import torch

from engine.masters import MasterAdamW
from engine.optimizer import AdamW


def network(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).to(dtype)


@pytest.mark.parametrize("offload", [False, True])
def test_float32_policy_is_plain_adamw(offload):
    """Ten updates, accumulated over two backward passes each, equal torch.optim.AdamW with torch's own clipping."""
    ours, theirs, x = network(torch.float32), network(torch.float32), torch.randn(10, 2, 4, 5)
    optimizer = MasterAdamW(ours, 1e-2, offload=True) if offload else AdamW(ours, 1e-2)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    for batch in x:
        for half in batch:
            ours(half).square().sum().backward()
            theirs(half).square().sum().backward()
        norm = optimizer.step(1e-2, 0.3)
        wanted = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        reference.step()
        reference.zero_grad()
        assert norm == pytest.approx(wanted.item(), rel=1e-5) and all(p.grad is None for p in ours.parameters())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("offload", [False, True])
def test_a_step_of_1e_6_does_not_round_away(offload):
    """A bfloat16 weight of 1.0 moves in steps of 2^-8: 4000 updates of 1e-6 must add up to 0.004, one step of it."""
    policy = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        policy.weight.fill_(1.0)
    optimizer = MasterAdamW(policy, 1e-6, offload)
    for _ in range(4000):
        policy(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()  # its gradient is 1: AdamW moves by lr
        optimizer.step(1e-6, 10.0)
    assert optimizer.masters[0].item() == pytest.approx(1 - 0.004, abs=1e-4)  # float32 itself rounds by 3 % here
    assert policy.weight.item() == 1 - 2**-8 and policy.weight.dtype == torch.bfloat16
    plain = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(4000):
        plain -= 1e-6
    assert plain.item() == 1.0  # what would happen without masters


def test_gradients_accumulate_in_float32():
    """256 gradients of 1/256 beside one of 1 add up to 2; a bfloat16 sum would stay at 1."""
    policy = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = MasterAdamW(policy, 1e-3)
    for value in [1.0] + [1 / 256] * 256:
        policy(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
        assert policy.weight.grad is None
    assert optimizer.step(1e-3, 10.0) == pytest.approx(2.0)


def test_no_clipping():
    """0 clips nothing: the update is that of a bound which is never met."""
    found = []
    for clip in (0.0, 1e9):
        policy = network(torch.float32)
        before = [p.detach().clone() for p in policy.parameters()]
        policy(torch.ones(4, 5)).square().sum().backward()
        AdamW(policy, 1e-2).step(1e-2, clip)
        found.append([p.detach().clone() for p in policy.parameters()])
        assert not torch.equal(found[-1][0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_round_trip(dtype):
    """A fresh optimizer with the saved tensors takes the very steps that the old one would have taken."""

    def policy():
        torch.manual_seed(0)
        return torch.nn.Linear(5, 3).to(dtype)

    def step(model, optimizer, n):
        model(torch.full((2, 5), 0.1 * n, dtype=dtype)).float().square().sum().backward()
        optimizer.step(1e-2, 1.0)

    first = policy()
    kind = AdamW if dtype == torch.float32 else MasterAdamW
    optimizer = kind(first, 1e-2)
    for n in range(3):
        step(first, optimizer, n)
    second = policy()
    second.load_state_dict(first.state_dict())
    fresh = kind(second, 1e-2)
    fresh.load({name: tensor.clone() for name, tensor in optimizer.tensors().items()})
    for n in range(3, 6):
        step(first, optimizer, n)
        step(second, fresh, n)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(optimizer.masters, fresh.masters, strict=True))
