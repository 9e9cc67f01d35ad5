"""A user's mistake is one line that says what, where and what to do, and exit code 2; a bug keeps its traceback."""

import errno
import os
import sys

import torch


class UserError(Exception):
    """A mistake of the user's, as that one line; `run_script` prints it."""


def first_line(error: Exception) -> str:
    """The first line of `error`; the name of its type where it is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def run_script(main, help: str = "") -> None:
    """Call `main`, a script's. Exits with 2 for a UserError, for a GPU that is too small and for a full disk.

    `help` is what --help prints, of a script that has no flags.
    """
    if help and {"-h", "--help"} & set(sys.argv[1:]):
        print(help.strip())
        return
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK")
        message = f"{error}" + (f" (process {rank})" if rank else "")
    except torch.OutOfMemoryError as error:
        message = (
            f"out of GPU memory ({first_line(error)}): give smaller --rollout-tokens or --chunk-tokens; in training "
            "smaller --train-tokens, --gradient-checkpointing True, --offload-optimizer True, --offload-reference True"
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"the disk is full ({error}): free some space and run the same command again"
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
