"""What the measurements of the server share: a server in a process of its own, bars, one JSON.

A *bar* is a requirement with its figure: what was measured, what is allowed, and whether it holds.
A document is written again after every part, so that a run that is cut short loses one part at
most, and says which command on which machine it came from.  What was not measured is NaN while it
is computed with and null where it is written; a bar on it does not hold.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import omega_qvla as oq
from omega_qvla.evaluation.speed.kernel_speed import machine_name
from omega_qvla.results.writing import write_json

POLICY = "builtin:tiny-pi05"
Bar = dict[str, Any]


def build_artifact(folder: Path, policy: str = POLICY, recipe: str = "rtn") -> Path:
    """An embedded policy, quantized; by default with the quickest recipe."""
    observations = list(oq.Observations.load(policy))
    observations = observations[:4] if recipe == "rtn" else observations
    quantized = oq.quantize(oq.load_policy(policy), observations, recipe=recipe)
    return quantized.save_pretrained(folder / "artifact")


def robot_observations() -> list[dict[str, Any]]:
    """What robots send: the embedded policy's observations, many images and instructions."""
    return [
        {key: one[key] for key in ("images", "state", "prompt")}
        for one in oq.Observations.load(POLICY)
    ]


@dataclass
class Served:
    """A running server.

    Attributes:
        port, pid: of it.
        status: its exit status, once it has ended.
        drain_s: how long the drain took, by the server's own clock: how long the interpreter takes
            to leave is the machine's affair.
    """

    port: int
    pid: int
    status: int | None = None
    drain_s: float = float("nan")


@contextlib.contextmanager
def served(artifact: Path, *arguments: str) -> Iterator[Served]:
    """``omega-qvla serve`` for the length of a block, ended with SIGTERM.

    Whoever ends this process with SIGTERM ends the server with it.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    command = [sys.executable, "-m", "omega_qvla.cli", "serve", str(artifact), "--port", "0"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "ready":
                break
        else:
            raise SystemExit("the server did not become ready")
        server = Served(event["port"], process.pid)
        yield server
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
        times = {event["event"]: event["time"] for event in map(json.loads, rest.splitlines())}
        server.status = process.returncode
        server.drain_s = times.get("drained", float("inf")) - times.get("draining", 0.0)
    finally:
        process.kill()
        process.wait()
        signal.signal(signal.SIGTERM, before)


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Count, p50, p99 and maximum in milliseconds."""
    values = 1e3 * np.asarray(seconds or [float("nan")])
    p50, p99, most = np.quantile(values, [0.5, 0.99, 1.0])
    return {
        "count": len(seconds),
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "max_ms": float(most),
    }


def at_most(name: str, measured: float | None, limit: float | None) -> Bar:
    """A figure that must not exceed its limit; what was not measured does not pass."""
    passed = number(measured) <= number(limit)
    return {**nulled({"name": name, "measured": measured, "at_most": limit}), "passed": passed}


def at_least(name: str, measured: float | None, limit: float | None) -> Bar:
    """A figure that must reach its limit; what was not measured does not pass."""
    passed = number(measured) >= number(limit)
    return {**nulled({"name": name, "measured": measured, "at_least": limit}), "passed": passed}


def number(value: float | None) -> float:
    """A figure to compute with: NaN where there is none."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def nulled(value: Any) -> Any:
    """A value to write: null where a figure is none."""
    if isinstance(value, Mapping):
        return {key: nulled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nulled(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def new_document(settings: dict[str, Any]) -> dict[str, Any]:
    """The head of a result: command, machine, and the settings that fix what is measured."""
    return {
        "schema": 3,
        "command": shlex.join(["python", *sys.argv]),
        "machine": {
            "processor": machine_name(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "load_average_at_start": os.getloadavg()[0],
        },
        "settings": json.loads(json.dumps(settings)),
        "parts": {},
        "bars": [],
    }


def resumed(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The document at a path, to be continued, or a new one, which is written at once: that a path
    cannot be written to should not turn up hours later.

    Raises:
        SystemExit: the file is a result of other settings.
        ResourceError: it cannot be written.
    """
    fresh = new_document(settings)
    if not path.exists():
        write_json(fresh, path)
        return fresh
    found = nulled(json.loads(path.read_text()))
    if found.get("settings") != fresh["settings"]:
        raise SystemExit(
            f"{path} is a result of other settings ({found.get('settings')}); give another --out "
            "or remove it"
        )
    return found


def measure_missing(
    path: Path, document: dict[str, Any], experiments: Mapping[str, Callable[[], Any]]
) -> dict[str, Any]:
    """The parts of a document, after those that it lacks were measured, each written when done."""
    parts = document["parts"]
    for name, experiment in experiments.items():
        if name not in parts:
            parts[name] = nulled(experiment())
            write_json(document, path)
    return parts


def finish(path: Path, document: dict[str, Any]) -> None:
    """Write, show the bars, and exit with status 1 if one does not hold."""
    write_json(document, path)
    for bar in document["bars"]:
        limit = number(bar.get("at_most", bar.get("at_least")))
        sign = "≤" if "at_most" in bar else "≥"
        verdict = "pass" if bar["passed"] else "FAIL"
        print(f"{verdict}  {bar['name']}: {number(bar['measured']):.6g} {sign} {limit:.6g}")
    print(f"written to {path}")
    if not all(bar["passed"] for bar in document["bars"]):
        raise SystemExit(1)


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
