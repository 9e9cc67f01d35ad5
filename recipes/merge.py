"""Add a LoRA adapter to its base model's weights, for programs that know no adapters.

    python -m recipes.merge runs/X/checkpoint runs/X/merged

The whole model is written in float32: in bfloat16 most of what a small learning rate taught would round away.
"""

import sys
from pathlib import Path

from engine import lora
from engine.errors import UserError, run_script
from engine.models import check_new, load_model, save_new


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("give two folders: python -m recipes.merge ADAPTER MERGED")
    source, out = sys.argv[1], Path(sys.argv[2])
    if lora.base_of(source, "merge") is None:
        raise UserError(f"{source}: holds no {lora.CONFIG}, so it is no adapter")
    check_new(out)
    model, tokenizer = load_model(source, "cpu", given="merge")
    save_new(lora.merged(model), tokenizer, out)
    print(f"{out}: the merged model, in float32")


if __name__ == "__main__":
    run_script(main, __doc__)
