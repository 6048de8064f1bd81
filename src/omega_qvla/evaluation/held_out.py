"""Whether a quantization is any good, at once: its action error beside round to nearest's.

A glance, not a comparison (``comparison.py``): few observations, two noises of each.  They are
observations that calibration did not use, where the source has any; else some of those it used,
with other noises, which flatters whatever was calibrated on them, and is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from omega_qvla.api import quantize
from omega_qvla.calibration.fingerprint import content_digest
from omega_qvla.calibration.observations import Observations
from omega_qvla.evaluation.openloop import measure_reference, measure_row, relative_error
from omega_qvla.policies.native import NativePolicy
from omega_qvla.results.memory import HeldOut
from omega_qvla.runtime.engine import QuantizedPolicy

BASELINE = "rtn"
MOST_PARAMETERS = 200_000_000
"""Of a policy that is looked at unasked: three copies of it are in memory, and one more of it is
quantized."""
NOISES, _SEED, _LOOKED_AT = 2, 0, 64


def unused(used: Observations, candidates: Iterable[Observations]) -> Observations | None:
    """Observations that calibration did not use, from the first source that has some."""
    seen = {content_digest(one) for one in used}
    for source in candidates:
        left = [one for one in source.spread(_LOOKED_AT) if content_digest(one) not in seen]
        if left:
            return Observations(left)
    return None


def measure_held_out(
    policy: NativePolicy,
    quantized: QuantizedPolicy,
    calibration: Observations,
    candidates: Iterable[Observations],
    *,
    count: int,
    threads: int | None = None,
    progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None,
) -> HeldOut:
    """The action error of a quantized policy and of the same policy rounded to nearest.

    Args:
        policy: full precision, in memory.
        quantized: what was made of it.
        calibration: what it was made with.
        candidates: sources of observations, the best first.
        count: how many observations to look at, at most.
        threads, progress: of quantizing the baseline.

    Raises:
        ObservationError, NonFiniteError: see ``openloop.sample_chunks``.
    """
    recipe = quantized.config["recipe"]
    used = calibration.spread(int(recipe["observations"]))
    apart = unused(used, candidates)
    held = (used if apart is None else apart).spread(count)
    reference = measure_reference(policy, held, _SEED, NOISES)

    def error(other: Any) -> float:
        row = measure_row(other, held, _SEED, NOISES, normalized=reference.normalized)
        return relative_error(row.chunks, reference.chunks)

    baseline = None
    if recipe["name"] != BASELINE:
        rounded = quantize(
            policy,
            calibration,
            BASELINE,
            allow_mismatch=True,
            threads=threads,
            progress=progress,
        )
        baseline = error(rounded)
    return HeldOut(
        observations=len(held),
        noises=NOISES,
        seen_in_calibration=apart is None,
        action_error=error(quantized),
        rtn_error=baseline,
        noise_floor=reference.floor,
    )
