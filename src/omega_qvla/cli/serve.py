"""``serve``: a policy for robots."""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    Positional,
    Range,
    save,
)
from omega_qvla.cli.screen import Screen
from omega_qvla.extras import require
from omega_qvla.results.summaries import Served
from omega_qvla.serving.server.protocols import PROTOCOLS

if TYPE_CHECKING:
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

    policy: Positional[str] = tyro.MISSING
    protocol: Annotated[ProtocolName, tyro.conf.arg(help="what robots speak")] = "openpi"
    host: Annotated[str, tyro.conf.arg(help="others than loopback need --token-file")] = "127.0.0.1"
    port: Annotated[int | None, tyro.conf.arg(help="8000, or 5555 for gr00t"), PORT] = None
    token_file: Annotated[Path | None, tyro.conf.arg(help="what clients must show")] = None
    metrics_port: Annotated[
        int | None,
        tyro.conf.arg(help="of gr00t: /healthz and /metrics over HTTP; off by default"),
        PORT,
    ] = None
    metrics_host: Annotated[str, tyro.conf.arg(help="others than loopback need --token-file")] = (
        "127.0.0.1"
    )
    tls_certificate: Annotated[Path | None, tyro.conf.arg(help="PEM; with --tls-key")] = None
    tls_key: Annotated[Path | None, tyro.conf.arg(help="PEM")] = None
    layout: Annotated[
        Literal["native", "aloha", "droid", "libero"] | None,
        tyro.conf.arg(
            help="how robots name observations; by default as the policy's training configuration "
            "says, else native"
        ),
    ] = None
    batch: Annotated[int, tyro.conf.arg(help="robots computed in one pass at most"), PROCESSES] = 8
    waiting: Annotated[
        int | None,
        tyro.conf.arg(help="robots that may wait; by default whoever is in time"),
        COUNT,
    ] = None
    deadline_ms: Annotated[
        float | None,
        tyro.conf.arg(help="oldest observation that is answered; by default four full batches"),
        Range(0.001, 1e9),
    ] = None
    limits: Annotated[
        str | None,
        tyro.conf.arg(help="action limits as JSON file, or none; by default the statistics'"),
    ] = None
    limit_margin: Annotated[
        float,
        tyro.conf.arg(help="how far beyond the statistics, as a share of their range"),
        MAGNITUDE,
    ] = 0.25
    steps: Annotated[int | None, tyro.conf.arg(help="denoising steps; the policy's own"), STEPS] = (
        None
    )
    threads: Annotated[int, tyro.conf.arg(help="threads of the policy"), PROCESSES] = 1
    kernel: Annotated[str | None, tyro.conf.arg(help="integer kernel; the best by default")] = None
    seed: Annotated[int | None, tyro.conf.arg(help="of the noise; drawn by default"), SEED] = None
    drain_s: Annotated[
        float, tyro.conf.arg(help="seconds to finish in at the end"), Range(0, 86_400)
    ] = 3.0

    def run(self, screen: Screen) -> int:
        packages = PROTOCOLS[self.protocol].package, "msgpack", "prometheus_client"
        require("serving", "serve", *packages)
        from omega_qvla.serving.server.service import Service, Settings, run_until_signal

        sys.setswitchinterval(_SWITCH_S)
        service = Service.build(
            self.policy,
            Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)}),
            _log_line,
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


def _log_line(event: str, **fields: Any) -> None:
    """One event, one line of JSON: what a log collector reads."""
    print(json.dumps({"time": time(), "event": event, **fields}), flush=True)
