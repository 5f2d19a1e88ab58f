"""The `handsigns` command: thin verbs over flows and tasks.

Nothing heavy is imported before a verb needs it, so that help is instant.
"""

import io
import logging
import sys
from typing import NoReturn

import typer

from flows.commands import champion, data, deployment, keys, models, runs, service
from flows.commands.terminal import err
from flows.loopback.proxy import spare_loopback
from tasks.errors import HandsignsError
from tasks.garbage import rare_collection

INTERRUPTED = 130
"""What the command ends with after Ctrl-C, as shells have it."""

app = typer.Typer(
    name="handsigns",
    help="Keep a hand-sign classifier fresh: import photos, retrain, promote what is better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verbs in (data, runs, models, champion, deployment, service):
    app.add_typer(_verbs.app)
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Run the command; whatever is refused or fails ends in one line and exit code 1."""
    _show_logs()
    spare_loopback()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of a terminal that knows few letters
            stream.reconfigure(errors="backslashreplace")
    try:
        with rare_collection():
            app()
    except HandsignsError as error:
        _fail(str(error))
    except OSError as error:
        _fail(
            f"{error.strerror or error}. Received: {error.filename or 'an operation'}. "
            "Give permission or make room, then run again."
        )
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _interrupted()
        raise


def _show_logs() -> None:
    """What flows and tasks have to say goes to standard error, in plain lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("flows", "tasks"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)


def _interrupted() -> NoReturn:
    _say("Interrupted. What was there before is whole; run again to go on.")
    sys.exit(INTERRUPTED)


def _fail(line: str) -> None:
    _say(line)
    sys.exit(1)


def _say(line: str) -> None:
    err.print(" ".join(line.split()), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
