"""``bench``: speed and memory, W4A4 against what PyTorch offers."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from omega_qvla.cli.options import (
    COUNT,
    PROCESSES,
    Common,
    PolicyName,
    Positional,
    option,
    require_cpu,
    save,
    to_standard_output,
)
from omega_qvla.errors import RecipeError, UsageError
from omega_qvla.extras import require

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen

_ONLY = {"policy": ("artifact", "roofline"), "kernels": ("llama_cpp", "sites", "figure")}
"""What would do nothing for the other of the two."""


@dataclass(frozen=True)
class Bench(Common):
    """Measure kernels or a whole policy, W4A4 against what PyTorch offers."""

    what: Positional[Literal["kernels", "policy"]] = tyro.MISSING
    examples: ClassVar[tuple[str, ...]] = (
        "omega-qvla bench policy --policy builtin:tiny-pi05 --artifact out/tiny",
        "omega-qvla bench kernels --threads 1 --json out/kernels.json --figure out/kernels.png",
        "omega-qvla bench policy --policy random:pi05 --roofline orin",
    )
    policy: PolicyName = "builtin:tiny-pi05"
    artifact: Annotated[
        Path | None,
        option(metavar="DIR", help="for `policy`: the same policy as a W4A4 artifact"),
    ] = None
    kernel: Annotated[
        str | None, option(metavar="NAME", help="our integer kernel; the best by default")
    ] = None
    llama_cpp: Annotated[
        Path | None,
        option(metavar="DIR", help="for `kernels`: llama.cpp's libraries, to measure its Q4_0"),
    ] = None
    threads: Annotated[
        int | None,
        option(metavar="N", help="of every peer; every core by default"),
        PROCESSES,
    ] = None
    rounds: Annotated[int, option(metavar="N", help="turns that every peer takes"), COUNT] = 9
    sites: Annotated[
        str, option(metavar="TEXT", help="for `kernels`: only sites containing this")
    ] = ""
    figure: Annotated[
        Path | None, option(metavar="FILE", help="for `kernels`: roofline as PNG")
    ] = None
    roofline: Annotated[
        Literal["orin", "thor", "4090", "h200"] | None,
        option(help="for `policy`: measure nothing; calculate the least time on this device"),
    ] = None
    device: Annotated[str, option(metavar="cpu", help="what is measured")] = "cpu"

    @property
    def files(self) -> list[Path]:
        return [*super().files, *([] if self.figure is None else [self.figure])]

    def run(self, screen: Screen) -> int:
        for name in _ONLY["policy" if self.what == "kernels" else "kernels"]:
            if getattr(self, name):
                words = name.replace("_", "-")
                raise UsageError(
                    f"--{words} would do nothing for `bench {self.what}`: leave it out"
                )
        if self.figure is not None:
            require("drawing the roofline", "report", "matplotlib")
        require_cpu(self.device)
        if self.roofline is not None:
            return self._roofline(screen, self.roofline)
        return self._kernels(screen) if self.what == "kernels" else self._policy(screen)

    @property
    def _threads(self) -> int:
        from omega_qvla.threads import available_cores

        return self.threads or available_cores()

    def _roofline(self, screen: Screen, device: str) -> int:
        from omega_qvla.evaluation.speed.device_roofline import roofline
        from omega_qvla.report.table import bound_table
        from omega_qvla.results.speed import Roofline

        calculated = roofline(device, policy=self.policy, artifact=self.artifact)
        found = Roofline(library=version("omega-qvla"), **calculated)
        screen.table(bound_table(found))
        save(self.json, found.to_json())
        return 0

    def _kernels(self, screen: Screen) -> int:
        import torch

        from omega_qvla.evaluation.speed.kernel_speed import (
            SHAPES,
            measure_bandwidth,
            measure_contention,
            measure_peaks,
            measure_shape,
            summarise,
        )
        from omega_qvla.evaluation.speed.llama_cpp import Ggml
        from omega_qvla.report.roofline import roofline_figure
        from omega_qvla.report.table import kernel_table
        from omega_qvla.results.speed import KernelBench
        from omega_qvla.threads import available_cores

        if self.figure is not None and (self.json is None or to_standard_output(self.json)):
            raise RecipeError("--figure is drawn from the saved JSON: give --json FILE as well")
        shapes = [shape for shape in SHAPES if self.sites in shape.site]
        if not shapes:
            known = ", ".join(dict.fromkeys(shape.site for shape in SHAPES))
            raise RecipeError(f"no site contains {self.sites!r}; sites: {known}")
        peaks = measure_peaks(self._threads)
        ggml = None if self.llama_cpp is None else Ggml(self.llama_cpp)
        rows: list[dict[str, Any]] = []
        with screen.bar("measuring") as step:
            for done, shape in enumerate(shapes):
                step(done, len(shapes), shape.site)
                rows += measure_shape(
                    shape,
                    rounds=self.rounds,
                    threads=self._threads,
                    peaks=peaks,
                    kernel=self.kernel,
                    llama_cpp=ggml,
                )
        found = KernelBench.model_validate(
            {
                **_measurement(self._threads),
                "peak_gmacs": {name: rate / 1e9 for name, rate in peaks.items()},
                "memory_gbytes": measure_bandwidth(self._threads) / 1e9,
                "int8_engine": torch.backends.quantized.engine,
                "llama_cpp": None if ggml is None else ggml.version,
                "rows": rows,
                "summary": summarise(rows),
                "contention": [
                    measure_contention(calls=400, threads=threads, kernel=self.kernel)
                    for threads in range(1, available_cores() + 1)
                ],
            }
        )
        screen.table(kernel_table(found.summary))
        for entry in found.contention:
            screen.say(
                f"{entry.threads} thread(s), a call of {entry.idle_p50_us:.0f} µs: p99 "
                f"{entry.idle_p99_us:.0f} µs idle, {entry.busy_p99_us:.0f} µs with every core busy"
            )
        save(self.json, found.to_json())
        if self.figure is not None and self.json is not None:
            roofline_figure(self.json, self.figure)
        return 0

    def _policy(self, screen: Screen) -> int:
        from omega_qvla.evaluation.speed.policy_speed import Subject, measure_policies
        from omega_qvla.report.table import policy_table
        from omega_qvla.results.speed import PolicyBench

        subjects = [Subject(self.policy, "fp32", self.policy, self._threads)]
        if self.artifact is not None:
            source = str(self.artifact)
            subjects.append(Subject(self.policy, "w4a4", source, self._threads, self.kernel))
        with screen.bars() as bars:
            rows = measure_policies(subjects, rounds=self.rounds, progress=bars)
        found = PolicyBench.model_validate({**_measurement(self._threads), "rows": rows})
        screen.table(policy_table(found.rows))
        save(self.json, found.to_json())
        return 0


def _measurement(threads: int) -> dict[str, Any]:
    """What every benchmark says of itself."""
    import torch

    from omega_qvla.evaluation.speed.kernel_speed import machine_name

    return {
        "machine": machine_name(),
        "threads": threads,
        "torch": torch.__version__,
        "library": version("omega-qvla"),
    }
