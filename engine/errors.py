"""A user's mistake ends with one line (what, where, what to do) and exit code 2; a bug keeps its traceback."""

import errno
import os
import re
import sys

import torch

REQUEST_ID = re.compile(r"""['"]?\(?\brequest[ -]?id\b[:=]?\s*[^\s()'"]*\)?['"]?""", re.IGNORECASE)


class UserError(Exception):
    """A user's mistake; its message is that one line, which `run_script` prints."""


def reason_of(error: Exception) -> str:
    """The reason in `error`: its first two lines with words, joined into one of at most 300 characters.

    Without such lines, its type's name. Request ids in the hub's errors are removed. If the hub has refused a request
    (403, 429, ...), that is the reason: the errors raised from it only mention missing files.
    """
    cause = error
    while cause := cause.__cause__ or cause.__context__:
        if getattr(getattr(cause, "response", None), "status_code", None) not in (None, 401, 404):
            error = cause
    lines = [REQUEST_ID.sub("", line).strip() for line in str(error).splitlines()]
    reason = " ".join([line for line in lines if re.search(r"\w", line)][:2]) or type(error).__name__
    return reason if len(reason) <= 300 else reason[:297] + "..."


def run_script(main, help: str = "") -> None:
    """Call a script's `main`. A UserError, too little GPU memory and a full disk end with one line and exit code 2.

    `help` is what --help prints, for a script without flags.
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
            f"out of GPU memory ({reason_of(error)}): reduce --rollout-tokens or --chunk-tokens; in training also "
            "--train-tokens, or set --gradient-checkpointing, --offload-optimizer or --offload-reference to True"
        )
    except KeyboardInterrupt:  # where a run doesn't catch it: before its first step, or the second time
        print("stopped; rerun the same command", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `--explain | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush fails, too
        message = "the program that the output was piped to has ended; rerun the same command, without it"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"the disk is full ({error}): free some space and rerun the same command"
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
