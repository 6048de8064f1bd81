"""The library as plain pip installs it, beside busy processes: as fast as with tuned variables?

    python benchmarks/installed.py --python FRESH_VENV/bin/python --out results.json

Four processes of another interpreter, in whose environment the package was installed, take turns:
without any variable; the same where the program imported torch first; and, for comparison, with
``OMP_WAIT_POLICY=PASSIVE`` and one thread or all of them.  Two processes that do nothing but run
keep the processors busy meanwhile, beside whatever else the machine does.  Each turn is

* ``chunk``: action chunks of ``tiny-pi05`` quantized with ``rtn``, of which the median counts;
* ``quantize``: that policy quantized, in ``--quantize`` rounds after those of chunks.

A ratio is that of two medians over rounds, the lower one being the better tuned process's.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro

from omega_qvla.evaluation.speed.kernel_speed import machine_name
from omega_qvla.openmp import THE_USERS
from omega_qvla.results.writing import write_json
from omega_qvla.threads import available_cores

INSTALLED, TORCH_FIRST, ONE, ALL = "installed", "torch first", "passive, one", "passive, all"

PROGRAM = """
import sys
{first}
from time import perf_counter
import omega_qvla as oq

policy = oq.load_policy("builtin:tiny-pi05")
observations = oq.Observations.load("builtin:tiny-pi05")
made = oq.quantize(policy, [observations[0]], "rtn")

def chunk():
    made.sample_actions(observations[0])

def quantize():
    oq.quantize(policy, observations, "rtn")

print("ready", flush=True)
for line in sys.stdin:
    call = dict(chunk=chunk, quantize=quantize)[line.strip()]
    begin = perf_counter()
    call()
    print(perf_counter() - begin, flush=True)
"""


@dataclass(frozen=True)
class Options:
    """What is measured, and how long.

    Attributes:
        python: of an environment with the package installed.
        out: the JSON.
        rounds: of chunks.
        quantize: rounds that quantize, too.
        chunks: of a turn.
        busy: processes that keep processors busy.
    """

    python: Path
    out: Path
    rounds: int = 15
    quantize: int = 5
    chunks: int = 9
    busy: int = 2


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with nothing about threads but ``variables``."""
    about = (*THE_USERS, "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if name not in about} | variables


WAYS: Mapping[str, dict[str, str]] = {
    INSTALLED: {},
    TORCH_FIRST: {},
    ONE: {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
    ALL: {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(available_cores())},
}


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but run."""
    others = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


class Peer:
    """A process that computes when it is asked to."""

    def __init__(self, python: Path, way: str, folder: str) -> None:
        code = PROGRAM.replace("{first}", "import torch" if way == TORCH_FIRST else "")
        self._process = subprocess.Popen(
            [str(python), "-c", code],
            env=environment(**WAYS[way]),
            cwd=folder,  # away from any checkout
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def seconds(self, call: str) -> float:
        """How long one call took."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{call}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a process ended; its last words are above")
        return line


def main(options: Options) -> None:
    """Measure, and write down what there is after every round."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of ending the processes
    seconds: dict[str, dict[str, list[float]]] = {"chunk": {}, "quantize": {}}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        peers = {way: stack.enter_context(Peer(options.python, way, folder)) for way in WAYS}
        stack.enter_context(busy(options.busy))
        for number in range(options.rounds + options.quantize):
            for way, peer in peers.items():
                if number < options.rounds:
                    times = [peer.seconds("chunk") for _ in range(options.chunks)]
                    seconds["chunk"].setdefault(way, []).append(median(times))
                else:
                    seconds["quantize"].setdefault(way, []).append(peer.seconds("quantize"))
            results = {part: compared(times) for part, times in seconds.items() if times}
            write_json({**surroundings(options), "results": results}, options.out)
            print(json.dumps(results, indent=1), flush=True)


def compared(seconds: Mapping[str, Sequence[float]]) -> dict[str, object]:
    """Per way: the median, over the better tuned way's, and the seconds of every round."""
    medians = {way: median(values) for way, values in seconds.items()}
    best = min(medians[ONE], medians[ALL])
    return {
        way: {"median_s": medians[way], "over_best": medians[way] / best, "seconds": list(values)}
        for way, values in seconds.items()
    }


def surroundings(options: Options) -> dict[str, object]:
    """Where and how it was measured."""
    return {
        "schema": 1,
        "machine": machine_name(),
        "cores": available_cores(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "busy": options.busy,
        "chunks": options.chunks,
    }


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
