"""Run vision-language-action policies in 4 bits: quantize, check, compare and serve them.

Exit status: 0 done; 1 a check failed; 2 bad input or usage; 3 not enough memory, disk or device.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from omega_qvla.cli.benchmarking import Benchmark
from omega_qvla.cli.comparing import Compare, Demo
from omega_qvla.cli.evaluating import Eval
from omega_qvla.cli.looking import Diagnose, Report
from omega_qvla.cli.measuring import Bench
from omega_qvla.cli.quantizing import Inspect, Quantize, Verify
from omega_qvla.cli.screen import Screen
from omega_qvla.cli.serving import Serve
from omega_qvla.cli.training import Train
from omega_qvla.cli.unseen import Unseen
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
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Train, tyro.conf.subcommand("train")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, and exit with the documented status."""
    command = tyro.cli(
        Command,
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
        prog="omega-qvla",
        description=__doc__,
    )
    sys.exit(_run(command))


def _run(command: Any) -> int:
    try:
        return command.run(Screen())
    except OmegaError as error:
        status, message = error.exit_status, str(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted; what was finished is kept, continue with --resume"
    except MemoryError:
        status, message = 3, "out of memory; use a machine with more, or a smaller policy"
    except OSError as error:
        status, message = 3, f"the system refused: {error}"
    if command.debug:
        traceback.print_exc()
    print(f"omega-qvla: {message}", file=sys.stderr)
    return status
