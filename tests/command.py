"""The scripts as commands, without the seconds that a new process spends on its imports."""

import contextlib
import importlib
import io
import sys
import traceback
from types import SimpleNamespace
from unittest import mock

from engine import checkpoints
from engine.config import Config, run_with_flags


def command(*arguments, script="memtrain"):
    """`python {script}.py *arguments` in this process: its returncode, stdout and stderr, a traceback included."""
    module = importlib.import_module(script)
    flags, follow_model = (Config, False) if script == "memtrain" else (module.Evaluation, True)
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = [f"{script}.py", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_with_flags(module.main, flags, follow_model)
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            checkpoints.release_signals()
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
