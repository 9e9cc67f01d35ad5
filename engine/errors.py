"""A user's mistake is one line that says what, where and what to do, and exit code 2; a bug keeps its traceback."""

import errno
import os
import re
import sys

import torch

REQUEST_ID = re.compile(r"""['"]?\(?\brequest[ -]?id\b[:=]?\s*[^\s()'"]*\)?['"]?""", re.IGNORECASE)


class UserError(Exception):
    """A mistake of the user's, as that one line; `run_script` prints it."""


def reason_of(error: Exception) -> str:
    """The reason in `error`: its first two lines that say something, as one of at most 300 characters.

    Its type's name where there are none. A hub's errors have an id of the request, often on the first line. Where the
    hub has refused (403, 429, ...), that is the reason: what is raised from it speaks of files that aren't there.
    """
    cause = error
    while cause := cause.__cause__ or cause.__context__:
        if getattr(getattr(cause, "response", None), "status_code", None) not in (None, 401, 404):
            error = cause
    lines = [REQUEST_ID.sub("", line).strip() for line in str(error).splitlines()]
    reason = " ".join([line for line in lines if re.search(r"\w", line)][:2]) or type(error).__name__
    return reason if len(reason) <= 300 else reason[:297] + "..."


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
            f"out of GPU memory ({reason_of(error)}): give smaller --rollout-tokens or --chunk-tokens; in training "
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
