"""--shard-optimizer: two gloo processes that share masters and moments out do what one does with all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import start, update, wait
from safetensors.torch import load_file
from test_parallel import KEPT, model, turns_of

from engine import parallel
from engine.config import Config
from engine.errors import UserError
from engine.masters import MasterAdamW
from engine.sharding import ShardedAdamW

ROOT = Path(__file__).parents[2]


def updates(dtype: str, kind: type, rank: int = 0, processes: int = 1) -> tuple[torch.Tensor, MasterAdamW]:
    """The weights after five updates of which the second half goes on from a state that was taken out and put back."""
    config = Config(documents=5, update_batch=3, train_tokens=40)
    policy = model().to(getattr(torch, dtype))
    optimizer = kind(policy, 1e-3)
    for step, kept in enumerate(KEPT):
        mine = [turn for place in kept if place % processes == rank for turn in turns_of(step, place)]
        update(policy, optimizer, mine, 1e-3, config)
        if step == 2:
            parts, weights = parallel.gather(optimizer.tensors()), policy.state_dict()
            policy = model(seed=1).to(policy.dtype)
            policy.load_state_dict(weights)
            optimizer = kind(policy, 1e-3)
            optimizer.load(parts[0])
    return torch.cat([p.detach().float().flatten() for p in policy.parameters()]), optimizer


def shared_out(folder: Path) -> None:
    """What each of the two processes does: the same, sharded and not, and what it then holds."""
    parallel.start()
    rank, processes = parallel.rank(), parallel.count()
    found = {}
    for dtype in ("float32", "bfloat16"):
        for kind in (MasterAdamW, ShardedAdamW):
            shard = kind is ShardedAdamW
            found[f"{dtype} {shard}"], optimizer = updates(dtype, kind, rank, processes)
            tensors = optimizer.tensors()
            assert not shard or bool(tensors) == (rank == 0)
            found |= {f"{dtype} {shard} {name}": tensor.detach().clone() for name, tensor in tensors.items()}
        held = [master.to_local().shape[0] for master in optimizer.masters]
        for part in [master.to_local() for master in optimizer.masters]:  # and no view of the whole
            assert part.untyped_storage().nbytes() == 4 * part.numel()
        found[f"{dtype} rows"] = torch.tensor(held)
        found[f"{dtype} all"] = torch.tensor([optimizer.whole(master).shape[0] for master in optimizer.masters])
    torch.save(found, folder / f"{rank}.pt")
    parallel.stop()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    assert wait(start(shared_out, folder, ranks=2)) == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharded_weights_are_those_of_one_process(ranks, dtype):
    """And of two that share nothing out, also after a checkpoint; masters and moments come back whole. The norm that
    clips adds up in another order, so the last digit may differ."""
    first, second = ranks
    sharded, plain = first[f"{dtype} True"], first[f"{dtype} False"]
    assert torch.equal(sharded, second[f"{dtype} True"])
    close = {"atol": 1e-6, "rtol": 1e-5} if dtype == "float32" else {"atol": 0, "rtol": 2**-7}  # one step of bfloat16
    torch.testing.assert_close(sharded, plain, **close)
    alone, _ = updates(dtype, MasterAdamW)
    moved = alone - torch.cat([p.detach().flatten() for p in model().parameters()])
    # In bfloat16 each process rounds its own part of a gradient, and Adam magnifies that.
    assert (sharded - alone).norm() < (1e-4 if dtype == "float32" else 0.2) * moved.norm()
    names = [name for name in first if name.startswith(f"{dtype} True ")]
    assert sum(name.endswith("exp_avg_sq") for name in names) == len(first[f"{dtype} all"])
    for name in names:
        if (other := name.replace("True", "False")) in first:  # float32 weights are their own masters, unsharded
            torch.testing.assert_close(first[name], first[other], atol=1e-5, rtol=1e-3)


def test_each_process_holds_its_rows_alone(ranks):
    """Together all rows, each once, and no process more than half of a matrix."""
    first, second = ranks
    held = first["bfloat16 rows"], second["bfloat16 rows"]
    assert torch.equal(held[0] + held[1], first["bfloat16 all"])
    assert (held[0] - held[1]).abs().max() <= 1


def test_one_process_has_nothing_to_share():
    """It is refused without torchrun, and beside --offload-optimizer."""
    with pytest.raises(UserError, match="--shard-optimizer True: needs torchrun"):
        ShardedAdamW(model(), 1e-3)
    with pytest.raises(UserError, match="--offload-optimizer True does the same in CPU memory; give one"):
        ShardedAdamW(model(), 1e-3, offload=True)


@pytest.mark.slow
def test_a_sharded_run_resumes_unsharded(tmp_path):
    """`torchrun ... --shard-optimizer True`, stopped after a step, goes on in one process without it."""
    size = "--chunks 2 --documents 2 --g1 2 --g2 2 --memory_tokens 16 --eval_documents 0 --steps 3".split()
    size += "--fast True --save_every 1 --dtype bfloat16 --keep 9 --out".split() + [str(tmp_path / "run")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(ROOT / "memtrain.py")
    how = {"capture_output": True, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    done = subprocess.run([*launch, script, *size, "--shard_optimizer", "True"], **how)
    assert done.returncode == 0, done.stderr
    checkpoints = sorted((tmp_path / "run/checkpoints").iterdir())
    tensors = load_file(checkpoints[0] / "training.safetensors")
    assert any(name.endswith(".master") for name in tensors) and len(checkpoints) == 3
    (tmp_path / "run/finished").unlink()
    for folder in checkpoints[1:]:
        folder.rename(tmp_path / folder.name)
    done = subprocess.run([sys.executable, script, *size], **how)
    assert done.returncode == 0 and "resuming after step 1" in done.stdout, done.stderr
