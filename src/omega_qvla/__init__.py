"""Omega-QVLA: vision-language-action policies in 4 bits, weights and activations.

The whole public API; importing it starts no CUDA.  It lets PyTorch's idle threads sleep instead of
spin, unless an environment variable says how they wait (``openmp.py``).

    import omega_qvla as oq

    policy = oq.load_policy("builtin:tiny-pi05")
    observations = oq.Observations.load("builtin:tiny-pi05")
    quantized = oq.quantize(policy, observations, recipe="omega-w4a4")
    quantized.save_pretrained("out")
    chunk = oq.load("out").sample_actions(observations[0])
"""

from __future__ import annotations

from omega_qvla.openmp import let_idle_threads_sleep

let_idle_threads_sleep()  # before anything below imports torch

from omega_qvla.api import quantize
from omega_qvla.calibration.mismatch import CalibrationWarning
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import OmegaError
from omega_qvla.evaluation.benchmark_run import benchmark
from omega_qvla.evaluation.closed_loop import Episodes, Resources
from omega_qvla.evaluation.comparison import compare
from omega_qvla.evaluation.evaluation import evaluate
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.torch_module import TorchPolicy
from omega_qvla.real_time_chunking import RealTimeChunking
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.engine import QuantizedPolicy, SimulatedPolicy
from omega_qvla.runtime.load import load

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
