"""engine/errors.py: the reason in an error, as one line."""

from types import SimpleNamespace

import pytest

from engine.errors import reason_of, run_script


@pytest.mark.parametrize(
    "text, reason",
    [
        ("(Request ID: Root=1-a;b-c)\n\n403 Forbidden.\nAsk for access.\nMore.", "403 Forbidden. Ask for access."),
        ("\n429 Too Many Requests (Request ID: abc)\n \nWait.", "429 Too Many Requests Wait."),
        ("(MaxRetryError('refused'), '(Request ID: 7b-6e)')", "(MaxRetryError('refused'), )"),
        ("request-id=77\nGone.", "Gone."), ("----\nOne.\n^^^^\nTwo.\nThree.", "One. Two."), ("", "ValueError"),
        ("  \n(Request ID: 1)\n", "ValueError"), ("One line.", "One line."), ("Request denied.", "Request denied."),
        ("The identity of 7 is 1.", "The identity of 7 is 1."), ("Two\r\nlines", "Two lines"),
        ("x" * 300, "x" * 300), ("y" * 301, "y" * 297 + "..."),
    ],
)
def test_the_reason_of_an_error(text, reason):
    """Its first two lines with words, without the id of a request, short."""
    assert reason_of(ValueError(text)) == reason


STATUSES = [(403, True), (429, True), (503, True), (404, False), (401, False), (None, False)]


@pytest.mark.parametrize("status, told", STATUSES)
def test_what_the_hub_refused_is_the_reason(status, told):
    """Not what is raised from it; where there is no repository, that says it better."""
    inner = RuntimeError(f"(Request ID: 1)\n{status} from the hub")
    inner.response = SimpleNamespace(status_code=status) if status else None
    middle, outer = KeyError("cache"), OSError("No such file")
    middle.__context__, outer.__cause__ = inner, middle
    assert reason_of(outer) == (f"{status} from the hub" if told else "No such file")


@pytest.mark.parametrize("error, code, said", [(KeyboardInterrupt, 130, "stopped"), (BrokenPipeError, 2, "piped to")])
def test_what_the_user_ended_is_a_line(error, code, said, monkeypatch, capfd):
    """Ctrl-C before the first step, and `--explain | head`: no traceback."""
    def main():
        raise error

    monkeypatch.setattr("os.dup2", lambda *files: None)  # or pytest's own output would go
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    (line,) = capfd.readouterr().err.splitlines()
    assert caught.value.code == code and said in line
