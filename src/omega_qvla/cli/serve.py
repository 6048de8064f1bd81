"""``serve``: a policy for robots."""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from time import time
from typing import IO, TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro
from tyro.extras import literal_type_from_choices

from omega_qvla.cli.options import (
    COUNT,
    MAGNITUDE,
    PORT,
    PROCESSES,
    SEED,
    STEPS,
    Checkpoint,
    Common,
    PolicyName,
    Positional,
    Range,
    Threads,
    option,
    save,
)
from omega_qvla.extras import require
from omega_qvla.real_time_chunking import DEFAULT_CHUNKING, WeightSchedule
from omega_qvla.serving.server.protocols import PROTOCOLS

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen

    ProtocolName = str
else:
    ProtocolName = literal_type_from_choices(PROTOCOLS)

_SWITCH_S = 0.0005
"""How long a thread may keep Python's lock while others wait.  The policy's thread takes it again
after every operation of a chunk; with the usual 5 ms a queue of requests to be refused, read by the
other thread, makes it wait each time."""


@dataclass(frozen=True)
class Serve(Checkpoint, Common):
    """Serve an artifact, or a policy in full precision, over openpi's protocol or GR00T's."""

    examples: ClassVar[tuple[str, ...]] = (
        "omega-qvla serve out/mine",
        "omega-qvla serve out/mine --host 0.0.0.0 --token-file TOKEN",
        "omega-qvla serve builtin:tiny-pi05 --port 8001",
    )
    policy: Positional[PolicyName] = tyro.MISSING
    protocol: Annotated[ProtocolName, option(help="what robots speak")] = "openpi"
    host: Annotated[
        str, option(metavar="ADDRESS", help="others than loopback need --token-file")
    ] = "127.0.0.1"
    port: Annotated[int | None, option(metavar="N", help="8000, or 5555 for gr00t"), PORT] = None
    token_file: Annotated[Path | None, option(metavar="FILE", help="what clients must show")] = None
    metrics_port: Annotated[
        int | None,
        option(metavar="N", help="of gr00t: /healthz and /metrics over HTTP; off by default"),
        PORT,
    ] = None
    metrics_host: Annotated[
        str, option(metavar="ADDRESS", help="others than loopback need --token-file")
    ] = "127.0.0.1"
    tls_certificate: Annotated[Path | None, option(metavar="FILE", help="PEM; with --tls-key")] = (
        None
    )
    tls_key: Annotated[Path | None, option(metavar="FILE", help="PEM")] = None
    layout: Annotated[
        Literal["native", "aloha", "droid", "libero"] | None,
        option(
            help="how robots name observations; by default as the policy's training configuration "
            "says, else native"
        ),
    ] = None
    batch: Annotated[
        int, option(metavar="N", help="robots computed in one pass at most"), PROCESSES
    ] = 8
    waiting: Annotated[
        int | None,
        option(metavar="N", help="robots that may wait; by default whoever is in time"),
        COUNT,
    ] = None
    deadline_ms: Annotated[
        float | None,
        option(
            metavar="MS", help="oldest observation that is answered; by default four full batches"
        ),
        Range(0.001, 1e9),
    ] = None
    limits: Annotated[
        str | None,
        option(metavar="FILE|none", help="action limits as JSON; by default the statistics'"),
    ] = None
    limit_margin: Annotated[
        float,
        option(metavar="SHARE", help="how far beyond the statistics, as a share of their range"),
        MAGNITUDE,
    ] = 0.25
    steps: Annotated[
        int | None, option(metavar="N", help="denoising steps; the policy's own"), STEPS
    ] = None
    threads: Threads = None
    kernel: Annotated[
        str | None, option(metavar="NAME", help="integer kernel; the best by default")
    ] = None
    execution_horizon: Annotated[
        int, option(metavar="N", help="actions guided by a robot's last chunk at most"), COUNT
    ] = DEFAULT_CHUNKING.execution_horizon
    max_guidance_weight: Annotated[
        float, option(metavar="X", help="how strongly they are guided at most"), Range(1e-6, 1e6)
    ] = DEFAULT_CHUNKING.max_guidance_weight
    guidance_schedule: Annotated[
        WeightSchedule, option(help="how that falls from the delay to the horizon")
    ] = DEFAULT_CHUNKING.schedule
    seed: Annotated[
        int | None, option(metavar="N", help="of the noise; drawn by default"), SEED
    ] = None
    drain_s: Annotated[
        float,
        option(metavar="SECONDS", help="to finish in at the end"),
        Range(0, 86_400),
    ] = 3.0

    def run(self, screen: Screen) -> int:
        packages = PROTOCOLS[self.protocol].package, "msgpack", "prometheus_client"
        require("serving", "serve", *packages)
        from omega_qvla.results.summaries import Served
        from omega_qvla.serving.server.service import Service, Settings, run_until_signal

        sys.setswitchinterval(_SWITCH_S)
        service = Service.build(
            self.policy,
            Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)}),
            partial(_log_line, screen.console.file),
            self.choices,
        )
        # What is there now stays.  A full collection would walk all of PyTorch's objects each time,
        # with every thread waiting: a quarter of a second, once per thousand connections or so.
        gc.collect()
        gc.freeze()
        finished = run_until_signal(service)
        save(self.json, Served(**service.totals(), drained=finished).to_json())
        if not finished:
            # A forward pass is still running, and nothing can interrupt it: leave without it.
            sys.stdout.flush()
            os._exit(0)
        return 0


def _log_line(stream: IO[str], event: str, **fields: Any) -> None:
    """One event, one line of JSON: what a log collector reads."""
    print(json.dumps({"time": time(), "event": event, **fields}), file=stream, flush=True)
