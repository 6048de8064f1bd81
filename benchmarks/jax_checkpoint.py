"""pi0.5 of full size as a step of openpi's JAX trainer: how much memory reading it takes.

    python benchmarks/jax_checkpoint.py --out DIR --tokenizer tokenizer.model

writes 6.7 GB of random bfloat16 (4.9 GB on disk), one array at a time, opens the step as `quantize`
does, and reads every parameter once, layer by layer.  The step stays, for `omega-qvla quantize`.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from orbax_steps import drawn, full_shapes, write_step

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.policies.full_precision import stream_policy

STATE, ACTIONS, ASSET = 8, 7, "physical-intelligence/libero"


@dataclass(frozen=True)
class Options:
    """Where.

    Attributes:
        out: the step; what is there already is read and not written again.
        tokenizer: a sentencepiece model, PaliGemma's or another.
    """

    out: Path
    tokenizer: Path


def main() -> None:
    """Write, open, read, and print seconds and peaks."""
    options = tyro.cli(Options, description=__doc__)
    if not options.out.exists():
        write_step(options.out, full_shapes(), drawn)
        statistics = options.out / "assets" / ASSET / "norm_stats.json"
        statistics.parent.mkdir(parents=True)
        entries = {
            name: {kind: [value] * width for kind, value in (("q01", -1.0), ("q99", 1.0))}
            for name, width in (("state", STATE), ("actions", ACTIONS))
        }
        statistics.write_text(json.dumps({"norm_stats": entries}))
        print("written; run again to read it, so that writing does not count as memory of reading")
        return
    start = time.perf_counter()
    told = CheckpointOptions(training_config="pi05_libero", tokenizer=options.tokenizer)
    policy = stream_policy(options.out, told)
    assert policy.store is not None
    _tell("opened", start)
    for name, _ in policy.module.named_parameters():
        policy.store.read(name)
    _tell("read", start)


def _tell(what: str, start: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    seconds, busy = time.perf_counter() - start, time.process_time()
    print(f"{what}: {seconds:.0f} s, {busy:.0f} s of processors, peak {peak:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
