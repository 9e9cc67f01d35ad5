"""What a run needs on a GPU, with devices that are only said to be there: engine/parallel.py, config.check, memory."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import start, tiny_model, wait
from transformers import AutoTokenizer

from engine import checkpoints, parallel
from engine.config import Config, check, parse
from engine.errors import UserError
from engine.masters import MasterAdamW
from engine.models import as_reference

ROOT = Path(__file__).parents[2]
ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """No setting of this process or its environment outlives a test."""
    for name in (*ALLOCATOR, "CUDA_VISIBLE_DEVICES", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that it is brought back, whatever the code sets
        monkeypatch.delenv(name)
    own = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(own)


def emulate(monkeypatch, cards: int, capability: tuple[int, int] = (9, 0), built: str | None = "13.0") -> None:
    """torch as it is where it was built for this CUDA and finds so many cards."""
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Tesla T4")


# ---- where a device is chosen


@pytest.mark.parametrize("cards", [0, 1, 8])
@pytest.mark.parametrize("choose", [parallel.start, lambda: check(Config())], ids=["start", "check"])
def test_cudnn_attention_is_off_on_a_gpu_alone(choose, cards, monkeypatch):
    """By either call: evaluations and benchmarks only check their settings, and take the device themselves."""
    emulate(monkeypatch, cards)
    assert choose() in (None, "cuda" if cards else "cpu")
    assert torch.backends.cuda.cudnn_sdp_enabled() == (cards == 0)
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


EXPANDABLE = "expandable_segments:True"


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({}, EXPANDABLE), ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, EXPANDABLE), ({"PYTORCH_ALLOC": "x"}, EXPANDABLE),
        ({"PYTORCH_ALLOC_CONF": ""}, ""),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "expandable_segments:False"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, None), ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native", "PYTORCH_ALLOC_CONF": EXPANDABLE}, EXPANDABLE),
    ],
)
def test_segments_expand_unless_the_user_chose(given, wanted, monkeypatch):
    """Under either name, an empty value included: that is left as it is, and nothing is set beside it."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(asked.append(os.environ.get("PYTORCH_ALLOC_CONF"))))
    parallel.has_gpu()
    assert asked == [wanted]  # it is there before the first question about a GPU
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == given.get("PYTORCH_CUDA_ALLOC_CONF")


def settings_of_the_allocator(folder: Path) -> None:
    for name in ALLOCATOR:
        os.environ.pop(name, None)
    check(Config())
    (folder / "settings").write_text(torch._C._accelerator_getAllocatorSettings())


def test_torch_takes_the_setting_though_it_is_imported_before(tmp_path):
    """As it says itself, in a new process."""
    assert wait(start(settings_of_the_allocator, tmp_path)) == [0]
    assert (tmp_path / "settings").read_text() == EXPANDABLE


@pytest.mark.parametrize(
    "cards, number, backend, device", [(2, 0, "nccl", "cuda:0"), (8, 5, "nccl", "cuda:5"), (0, 0, "gloo", "cpu")]
)
def test_each_process_joins_with_the_gpu_that_is_its_own(cards, number, backend, device, monkeypatch):
    """The group is told, or else a barrier would guess; processes on a CPU name none."""
    emulate(monkeypatch, cards)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, str(number))
    chosen, joined = [], []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **named: joined.append((*given, named["device_id"])))
    assert parallel.start() == device
    assert joined == [(backend, torch.device(device) if cards else None)] and chosen == [number] * bool(cards)


# ---- bfloat16

DRIVER = "torch is built for CUDA 13.0 but finds no GPU: install or update the driver until `nvidia-smi` lists "
OLD = r"Tesla T4 doesn't support it \(compute capability {}, needed: 8.0\); use --dtype float32 with --lora, as "
BFLOAT16 = [  # dtype, cards, capability, CUDA that torch is built for, CUDA_VISIBLE_DEVICES, what is told
    ("bfloat16", 0, None, "13.0", None, DRIVER), ("bfloat16", 0, None, "13.0", "0", DRIVER),
    ("bfloat16", 0, None, "13.0", "NoDevFiles", DRIVER),
    ("bfloat16", 1, (7, 5), "13.0", None, OLD.format("7.5")), ("bfloat16", 4, (7, 0), "12.8", None, OLD.format("7.0")),
    ("bfloat16", 1, (6, 0), "12.6", "0", OLD.format("6.0")),
    ("bfloat16", 0, None, "13.0", "", None), ("bfloat16", 0, None, None, None, None),  # hidden; torch for CPUs
    ("bfloat16", 1, (8, 0), "13.0", None, None), ("bfloat16", 1, (8, 9), "13.0", None, None),
    ("bfloat16", 1, (12, 0), "13.0", None, None), ("bfloat16", 1, (9, 0), None, None, None),  # ROCm names no CUDA
    ("float32", 0, None, "13.0", None, None), ("float32", 1, (7, 5), "13.0", None, None),
]


@pytest.mark.parametrize("dtype, cards, capability, built, visible, told", BFLOAT16)
def test_bfloat16_needs_a_gpu_that_computes_in_it(dtype, cards, capability, built, visible, told, monkeypatch):
    """A line before any work where a GPU is missed or too old. Who hides the GPU, or has none to hide, isn't asked."""
    emulate(monkeypatch, cards, capability, built)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=f"^--dtype bfloat16: {told}") if told else nullcontext() as error:
        check(Config(dtype=dtype))
    if told:
        assert "\n" not in str(error.value) and "--dtype float32" in str(error.value)


@pytest.mark.parametrize("task", ["wiki", "longqa", "searchqa"])
def test_the_recipe_that_a_t4_is_told_to_take_runs_there(task, monkeypatch):
    """It passes the check where the recipe alone doesn't, and trains an adapter."""
    emulate(monkeypatch, 1, (7, 5))
    names = [f"{task}-24gb.args", "t4-16gb.args"]
    words = [word for name in names for word in ("--config", str(ROOT / "recipes" / name))]
    with pytest.raises(UserError, match="recipes/t4-16gb.args"):
        check(parse(Config, arguments=words[:2]))
    config = parse(Config, arguments=[*words, "--ner", "rules", "--questions", str(ROOT / "tiny/questions.jsonl")])
    config.eval_questions = config.corpus = None  # files of the user's
    assert config.lora and config.dtype == "float32" and not (config.offload_optimizer or config.offload_reference)
    config.lora = 0  # peft may be missing here
    check(config)


# ---- memory


@pytest.mark.parametrize("ends", ["well", "in it", "on the way"])
def test_an_offloaded_reference_comes_back_without_a_copy(ends):
    """To the very memory that it lay in, also after an error, which may come while half of it has been moved."""
    model, calls = tiny_model(), []
    parameters = list(model.parameters())
    held = [p.data_ptr() for p in parameters]

    def to(device):  # the copies are where a GPU's would be
        calls.append(device)
        for n, parameter in enumerate(parameters):
            if ends == "on the way" and n == 3:
                raise torch.OutOfMemoryError
            parameter.data = parameter.data.clone()

    model.to = to
    error = {"well": nullcontext(), "in it": pytest.raises(KeyError), "on the way": pytest.raises(RuntimeError)}[ends]
    with error, as_reference(model, Config(offload_reference=True), "cuda"):
        assert not set(held) & {p.data_ptr() for p in parameters}
        if ends == "in it":
            raise KeyError
    assert [p.data_ptr() for p in parameters] == held and calls == ["cuda"]


def test_a_reference_that_stays_on_the_gpu_is_never_moved():
    model = tiny_model()
    model.to = None  # would raise
    with as_reference(model, Config(), "cuda"):
        assert model(input_ids=torch.tensor([[0, 1]])).logits.isfinite().all()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the files that are mapped")
def test_a_resumed_run_does_not_keep_its_checkpoint_mapped(tmp_path):
    """Moments in CPU memory are the tensors that were read: mapped, they would hold on to the file, deleted or not."""
    policy = tiny_model().bfloat16()
    optimizer = MasterAdamW(policy, 1e-3, offload=True)
    policy(input_ids=torch.arange(8)[None]).logits.float().square().sum().backward()
    optimizer.step(1e-3, 1.0)
    tensors = {f"optimizer/{name}": tensor for name, tensor in optimizer.tensors().items()}
    tensors["random/0/cpu"] = torch.get_rng_state()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    checkpoints.save(tmp_path, {"step": 1, "processes": 1}, policy, tokenizer, 1, tensors)
    fresh = MasterAdamW(tiny_model(seed=1).bfloat16(), 1e-3, offload=True)
    checkpoints.load(checkpoints.newest(tmp_path), policy, fresh, 0, 1)
    assert all(torch.equal(fresh.tensors()[name], tensor) for name, tensor in optimizer.tensors().items())
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
