"""Add a LoRA adapter to its base model's weights, for programs that don't support adapters.

    python -m recipes.merge runs/X/checkpoint runs/X/merged

The merged model is written in float32: in bfloat16 most of what a small learning rate taught would be rounded away.
"""

import sys
from pathlib import Path

from engine import lora
from engine.errors import UserError, run_script
from engine.models import is_adapter, load_model
from recipes.folders import check_new, save_new


def merged(model):
    """Add the adapter to the model's weights, in place -> the model. Bfloat16 would round small changes away."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()
            model.set_submodule(name, module.base_layer)
    model._hf_peft_config_loaded = False  # or it would save an adapter only
    del model.peft_config
    return model


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("give two folders: python -m recipes.merge ADAPTER MERGED")
    source, out = sys.argv[1], Path(sys.argv[2])
    if not is_adapter(source):
        raise UserError(f"{source}: has no {lora.CONFIG}, so it is not an adapter")
    check_new(out)
    model, tokenizer = load_model(source, "cpu", given="merge")
    save_new(merged(model), tokenizer, out)
    print(f"{out}: the merged model, in float32")


if __name__ == "__main__":
    run_script(main, __doc__)
