"""Omega-QVLA: vision-language-action policies in 4 bits, weights and activations.

The whole public API.  A name is imported when it is first used, so that ``import omega_qvla`` costs
nothing and imports no PyTorch; nothing here starts CUDA.  Whenever PyTorch is imported after this
package, its idle threads sleep instead of spin, unless an environment variable says how they wait
(``openmp.py``).

    import omega_qvla as oq

    policy = oq.load_policy("builtin:tiny-pi05")
    observations = oq.Observations.load("builtin:tiny-pi05")
    quantized = oq.quantize(policy, observations, recipe="omega-w4a4")
    quantized.save_pretrained("out")
    chunk = oq.load("out").sample_actions(observations[0])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from omega_qvla.openmp import let_idle_threads_sleep

if TYPE_CHECKING:
    from omega_qvla.api import quantize
    from omega_qvla.calibration.observations import Observations
    from omega_qvla.errors import CalibrationWarning, OmegaError
    from omega_qvla.evaluation.benchmark_run import benchmark
    from omega_qvla.evaluation.closed_loop import Episodes, Resources
    from omega_qvla.evaluation.comparison import compare
    from omega_qvla.evaluation.evaluation import evaluate
    from omega_qvla.flow_time import FlowClock
    from omega_qvla.policies.any_policy import load_policy
    from omega_qvla.policies.torch_module import TorchPolicy
    from omega_qvla.real_time_chunking import RealTimeChunking
    from omega_qvla.recipe import Recipe
    from omega_qvla.runtime.engine import QuantizedPolicy, SimulatedPolicy
    from omega_qvla.runtime.load import load

__version__: str
__all__ = [
    "CalibrationWarning",
    "Episodes",
    "FlowClock",
    "Observations",
    "OmegaError",
    "QuantizedPolicy",
    "RealTimeChunking",
    "Recipe",
    "Resources",
    "SimulatedPolicy",
    "TorchPolicy",
    "benchmark",
    "compare",
    "evaluate",
    "load",
    "load_policy",
    "quantize",
]
_HOMES = {
    "CalibrationWarning": "errors",
    "Episodes": "evaluation.closed_loop",
    "FlowClock": "flow_time",
    "Observations": "calibration.observations",
    "OmegaError": "errors",
    "QuantizedPolicy": "runtime.engine",
    "RealTimeChunking": "real_time_chunking",
    "Recipe": "recipe",
    "Resources": "evaluation.closed_loop",
    "SimulatedPolicy": "runtime.engine",
    "TorchPolicy": "policies.torch_module",
    "benchmark": "evaluation.benchmark_run",
    "compare": "evaluation.comparison",
    "evaluate": "evaluation.evaluation",
    "load": "runtime.load",
    "load_policy": "policies.any_policy",
    "quantize": "api",
}
"""Public name → the module of this package that has it."""

let_idle_threads_sleep()


def __getattr__(name: str) -> Any:
    """A public name from its module, or the installed version."""
    if name == "__version__":
        from importlib.metadata import version

        return version("omega-qvla")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "__version__"})
