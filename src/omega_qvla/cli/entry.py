"""Run vision-language-action policies in 4 bits: quantize, check, compare and serve them.

Exit status: 0 done; 1 a check failed; 2 bad input or usage; 3 not enough memory, disk or device,
or a package or simulator that is not installed; 130 or 143 interrupted by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import tyro

from omega_qvla.calibration.mismatch import CalibrationWarning
from omega_qvla.cli.backbone import Backbone
from omega_qvla.cli.bench import Bench
from omega_qvla.cli.benchmark import Benchmark
from omega_qvla.cli.compare import Compare
from omega_qvla.cli.demo import Demo
from omega_qvla.cli.diagnose import Diagnose
from omega_qvla.cli.eval import Eval
from omega_qvla.cli.inspect import Inspect
from omega_qvla.cli.options import require_in_range
from omega_qvla.cli.outputs import claimed_files
from omega_qvla.cli.quantize import Quantize
from omega_qvla.cli.report import Report
from omega_qvla.cli.screen import Screen
from omega_qvla.cli.serve import Serve
from omega_qvla.cli.train import Train
from omega_qvla.cli.unseen import Unseen
from omega_qvla.cli.verify import Verify
from omega_qvla.errors import OmegaError

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Quantize, tyro.conf.subcommand("quantize")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Benchmark, tyro.conf.subcommand("benchmark")]
    | Annotated[Unseen, tyro.conf.subcommand("unseen")]
    | Annotated[Backbone, tyro.conf.subcommand("backbone")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Train, tyro.conf.subcommand("train")]
)


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
    try:
        command = tyro.cli(
            Command,
            args=arguments,
            config=(tyro.conf.OmitSubcommandPrefixes,),
            prog="omega-qvla",
            description=__doc__,
        )
    except SystemExit:  # after --help, or a message about the usage
        sys.stdout.flush()
        raise
    return _run(command, arguments)


def _run(command: Any, arguments: Sequence[str]) -> int:
    try:
        require_in_range(command)
        with (
            _terminable(),
            claimed_files(command.files, command.overwrite),
            warnings.catch_warnings(),
        ):
            # The commands print what is found, once and before the work.
            warnings.simplefilter("ignore", CalibrationWarning)
            return command.run(Screen())
    except OmegaError as error:
        status, message = error.exit_status, str(error)
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
