"""The `cosmos-fast` command: finds sub-commands, and turns errors into one line and an exit status."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from unicodedata import category

import click

from cosmos_fast.cli.lazy import LazyGroup
from cosmos_fast.utils.errors import UserError
from cosmos_kernels.kernel_errors import KernelError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def _version() -> str:
    try:
        return version("cosmos-fast")
    except PackageNotFoundError:
        return "unknown (not installed)"


command = LazyGroup(
    "cosmos-fast",
    package="cosmos_fast.cli",
    summaries={
        "train": "Train COSMOS or plain CLIP on image-caption shards.",
        "eval": "Retrieval, classification, segmentation, and the report.",
        "visualize": "Pictures: attention, retrieval, segmentation.",
        "data": "Make, index and inspect shards.",
        "plan": "Estimate time, memory and communication on many GPUs.",
        "launch": "Print the command that starts a run on a cluster.",
        "bench": "Measure an operation or a whole step.",
        "export": "Write weights in another format.",
        "doctor": "Show what this machine can run, and why.",
    },
    help="Train and use COSMOS vision-language models. Exit status: 0 success, 2 a mistake in input, 130 interrupted.",
)
command = click.version_option(_version(), prog_name="cosmos-fast")(command)


def _shown(message: str) -> str:
    """On one line, whatever names a file or a path has: control characters as Python writes them."""
    kinds = ("Zl", "Zp", "C")  # ends of lines, and all kinds of control
    return "".join(repr(one)[1:-1] if category(one).startswith(kinds) else one for one in message)


def _mistake(message: str) -> int:
    """Of the error that is being handled."""
    if os.environ.get("COSMOS_DEBUG") == "1":
        traceback.print_exc()
    print(f"error: {_shown(message)}", file=sys.stderr)
    return EXIT_USER_ERROR


def _point_stdout_elsewhere() -> None:
    """So that closing it does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _no_room(error: OSError) -> str:
    """What to say of a disk that is full; it may be the one that stdout is written to."""
    try:
        sys.stdout.flush()
    except OSError:
        _point_stdout_elsewhere()
    return f"{error.filename or 'the output'} cannot be written ({error.strerror}): make room, or write it elsewhere"


def run(entry: click.Command, arguments: Sequence[str] | None = None, name: str = "cosmos-fast") -> int:
    """Run a command; returns the exit status. COSMOS_DEBUG=1 adds the traceback of a user's mistake."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
    try:
        status = entry.main(args=arguments, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (click.exceptions.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (UserError, KernelError) as error:
        return _mistake(str(error))
    except BrokenPipeError:
        _point_stdout_elsewhere()  # the reader of the output has gone (`| head`)
        return 1
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        return _mistake(_no_room(error))


def main() -> None:
    """Console entry point."""
    sys.exit(run(command))


if __name__ == "__main__":
    main()
