"""From the words that were typed to an exit status.

0 done; 1 a check failed; 2 bad input or usage; 3 not enough memory, disk or device, or a package or
simulator that is not installed; 130 or 143 interrupted by Ctrl-C or SIGTERM.

Only the module of the command that was typed is imported, and what it computes with when it runs:
help and refusals of what was typed need no PyTorch.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from omega_qvla.cli.commands import COMMANDS, command_class, overview
from omega_qvla.errors import CalibrationWarning, OmegaError, UsageError, did_you_mean

_PIPE_CLOSED, _INTERRUPTED, _TERMINATED = 141, 130, 143
"""What a shell reports of a program that SIGPIPE, SIGINT or SIGTERM ended."""


class _TerminatedError(BaseException):
    """SIGTERM, as an exception: what is open is closed, and what is finished stays."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, and exit with the documented status."""
    try:
        status = _parse_and_run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_output()
        status = _PIPE_CLOSED
    sys.exit(status)


def _parse_and_run(arguments: Sequence[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("--help", "-h"):
        print(overview())
        return 0 if arguments else UsageError.exit_status
    if name == "--version":
        print(f"omega-qvla {version('omega-qvla')}")
        return 0
    try:
        if name == "--print-completion":
            return _print_completion(arguments[1:])
        if name not in COMMANDS:
            raise UsageError(_no_such_command(name))
        kind = command_class(name)
        _require_known_options(name, kind, arguments[1:])
    except UsageError as error:
        print(f"omega-qvla: {error}", file=sys.stderr)
        return error.exit_status
    return _run(_parse(name, kind, arguments[1:]), arguments)


def _parse(name: str, kind: Any, words: Sequence[str]) -> Any:
    import tyro

    try:
        single = (tyro.conf.FlagCreatePairsOff,)
        return tyro.cli(kind, args=words, prog=f"omega-qvla {name}", config=single)
    except SystemExit as stop:  # after --help, or a message about the usage
        if not stop.code:
            print("\n".join(["examples:", *(f"  {line}" for line in kind.examples), ""]))
        sys.stdout.flush()
        raise


def _no_such_command(name: str) -> str:
    if name.startswith("-"):
        return f"{name} is no option here: options come after the command, see omega-qvla --help"
    return f"no command {name!r}{did_you_mean(name, COMMANDS)} (omega-qvla --help lists them)"


def _require_known_options(name: str, kind: Any, words: Sequence[str]) -> None:
    """Refuse a mistyped option by name, and say which was perhaps meant.

    Raises:
        UsageError: the first that the command does not have.
    """
    known = {f"--{field.name.replace('_', '-')}" for field in fields(kind)}
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        if not option.startswith("--") or option == "--help":
            continue
        if option not in known:
            raise UsageError(
                f"{name} has no option {option}{did_you_mean(option, known)}; "
                f"omega-qvla {name} --help lists them"
            )


def _print_completion(words: Sequence[str]) -> int:
    """A shell's completion of all commands.

    Raises:
        UsageError: not one shell's name.
    """
    import tyro.extras

    shells = ("bash", "zsh")
    if len(words) != 1 or words[0] not in shells:
        raise UsageError(f"--print-completion: give one of {', '.join(shells)}")
    with suppress(SystemExit):  # when it has printed
        tyro.extras.subcommand_cli_from_dict(
            {name: command_class(name) for name in COMMANDS},
            args=["--tyro-print-completion", words[0]],
            prog="omega-qvla",
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    return 0


def _run(command: Any, arguments: Sequence[str]) -> int:
    from omega_qvla.cli.options import require_in_range, to_standard_output
    from omega_qvla.cli.outputs import claimed_files
    from omega_qvla.cli.screen import screen_of

    try:
        require_in_range(command)
        with (
            _terminable(),
            claimed_files(command.files, command.overwrite),
            warnings.catch_warnings(),
        ):
            # The commands print what is found, once and before the work.
            warnings.simplefilter("ignore", CalibrationWarning)
            return command.run(screen_of(sys.stderr if to_standard_output(command.json) else None))
    except OmegaError as error:
        status, message = error.exit_status, in_options(str(error), command)
    except KeyboardInterrupt:
        status, message = _INTERRUPTED, _how_to_go_on("interrupted", command, arguments)
    except _TerminatedError:
        status, message = _TERMINATED, _how_to_go_on("terminated", command, arguments)
    except BrokenPipeError:
        message = _how_to_go_on("stopped, as nobody reads the output", command, arguments)
        print(f"omega-qvla: {message}", file=sys.stderr)
        raise
    except MemoryError:
        status, message = 3, "out of memory; use a machine with more, or a smaller policy"
    except OSError as error:
        status, message = 3, f"the system refused: {error}"
    if command.debug:
        traceback.print_exc()
    print(f"omega-qvla: {message}", file=sys.stderr)
    return status


def in_options(message: str, command: Any) -> str:
    """A message of the library with its parameters as the command's options.

    The library names them in Python's words: ```out`` is ``--out``, ```overwrite=True`` is
    ``--overwrite``, ```protocol='full'`` is ``--protocol full``.  What is no option of the command
    stays as it is.
    """
    names = {field.name for field in fields(command)}

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in names:
            return found.group()
        words = "" if value in (None, "True", "...") else f" {value.strip(chr(39))}"
        return f"--{name.replace('_', '-')}{words}"

    return re.sub(r"`(\w+)(?:=([^`]*))?`", option, message)


def _how_to_go_on(what: str, command: Any, arguments: Sequence[str]) -> str:
    """One line: what is kept, and what to type."""
    try:
        kept = command.kept()
    except OmegaError as error:
        kept = str(error)
    if kept is None:
        return f"{what}; nothing is kept, run the command again"
    words = list(arguments)
    if hasattr(command, "resume") and not command.resume:
        words.append("--resume")
    return f"{what}; {kept}; continue with: {shlex.join(['omega-qvla', *words])}"


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does; a server handles both itself."""

    def stop(_number: int, _frame: object) -> None:
        raise _TerminatedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _forget_output() -> None:
    """Nobody reads it any more; what is still buffered must not be tried again at the end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)
