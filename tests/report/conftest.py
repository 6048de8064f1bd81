from __future__ import annotations

import json

import pytest

from omega_qvla.results.reading import load_comparison


def make_row(recipe, condition="plain", successes=90, **changes):
    """An invented row; such numbers exist only in these tests' temporary files."""
    success = {"a": [successes // 2, 50], "b": [successes - successes // 2, 50]}
    counts = changes.get("success", success)
    return {
        "policy": "invented",
        "recipe": recipe,
        "condition": condition,
        "realizable": True,
        "success": success,
        "success_mean": successes / 100,
        "success_ci95": [max(0.0, successes / 100 - 0.06), min(1.0, successes / 100 + 0.05)],
        "action_error": 0.004,
        "noise_floor": 0.3,
        "action_error_ci95": None,
        "action_errors": None,
        "error_vs_default": None,
        "noises": 8,
        "smoothness": 1.05,
        "drift": None,
        "checkpoint_bytes": 3_900_000,
        "resident_bytes": 4_400_000,
        "ms_per_chunk": 31.25,
        "seeds": list(range(50)),
        "episodes": sum(pair[-1] for pair in counts.values()) if isinstance(counts, dict) else 0,
        "smoke": True,
        "paired_vs_reference": None,
        **changes,
    }


def make_paired(difference, interval, p_value):
    """An invented comparison of 100 episodes with full precision."""
    counts = {"episodes": 100, "only_row": 1, "only_reference": 3}
    return {**counts, "difference": difference, "ci95": interval, "mcnemar_p": p_value}


@pytest.fixture(scope="session")
def paired():
    return make_paired


@pytest.fixture(scope="session")
def row():
    return make_row


@pytest.fixture
def save(tmp_path):
    def write(*rows, **changes):
        path = tmp_path / "run.json"
        document = {"schema": 1, "policy": "invented", "rows": list(rows), **changes}
        path.write_text(json.dumps(document))
        return path

    return write


@pytest.fixture
def read(save):
    """Saves rows and gives back what a report is made of."""
    return lambda *rows: load_comparison(save(*rows)).rows


@pytest.fixture
def saved(row, save):
    paired = make_paired(-0.02, [-0.05, 0.01], 0.25)
    return save(
        row("fp32", successes=95, action_error=0.0, checkpoint_bytes=20_100_000),
        row("omega-w4a4-static", successes=93, paired_vs_reference=paired),
        row("fp32", "stress:30", successes=95, action_error=0.0),
        row("rtn", "stress:30", successes=0, action_error=0.8, realizable=False),
    )


def make_site(name, component, steps=1, **changes):
    """An invented site of invented diagnostics."""
    per_step = component == "action_head"
    times = [1 - i / steps for i in range(steps)]
    return {
        "name": name,
        "component": component,
        "per_step": per_step,
        "in_features": 64,
        "out_features": 64,
        "times": times if per_step else None,
        "error": [0.02] * steps,
        "local_error": [0.01] * steps,
        "absmax": [30.0 + i for i in range(steps)],
        "rms": [1.0] * steps,
        "transformed_absmax": [4.0] * steps,
        "transformed_rms": [1.0] * steps,
        "limit": [3.0] * steps if per_step else None,
        **changes,
    }


ONE_PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYPgPAAEDAQAIicLsAAAAAElFTkSuQmCC"
)


def make_diagnostics(recipe="omega-w4a4-static", condition="plain", **changes):
    """Invented diagnostics of a network of two blocks, with episodes and a film."""
    positions = [[0.0, 0.5 + 0.01 * i, 0.2] for i in range(11)]
    elsewhere = [[x + 0.003, y, z] for x, y, z in positions]
    film = {"task": "reach", "seed": 0, "success": True, "frames": [{"step": 0, "png": ONE_PIXEL}]}
    return {
        "schema": 1,
        "kind": "diagnostics",
        "library": "0.1.0",
        "policy": "invented",
        "recipe": recipe,
        "recipe_hash": "0" * 64,
        "scope": "all",
        "condition": condition,
        "realizable": True,
        "observations": 5,
        "action_error": 0.004,
        "noise_floor": 0.3,
        "sites": [
            make_site("language_model.layers.0.mlp.down_proj", "backbone"),
            make_site("language_model.layers.1.self_attn.kv_proj", "backbone"),
            make_site("gemma_expert.layers.0.mlp.down_proj", "action_head", steps=4),
            make_site("gemma_expert.layers.1.mlp.down_proj", "action_head", steps=4),
        ],
        "profiles": [
            {
                "site": "gemma_expert.layers.0.mlp.down_proj",
                "component": "action_head",
                "channels": 64,
                "transformed_channels": 64,
                "before": [1.0] * 63 + [30.0],
                "after": [2.0] * 64,
            }
        ],
        "memory": {
            "components": [
                {
                    "name": "backbone",
                    "params": 1000,
                    "bits": 4.5,
                    "bytes": 562,
                    "reference_bytes": 2000,
                }
            ],
            "total_bytes": 562,
            "reference_bytes": 2000,
            "reduction": 0.719,
            "paper_scope_reduction": 0.72,
        },
        "rollouts": {
            "environment": "invented:Environment",
            "execute": 5,
            "episodes": [
                {
                    "recipe": name,
                    "task": "reach",
                    "seed": 0,
                    "success": True,
                    "steps": 10,
                    "positions": path,
                }
                for name, path in (("fp32", positions), (recipe, elsewhere))
            ],
            "films": [{"recipe": "fp32", **film}, {"recipe": recipe, **film}],
        },
        **changes,
    }


def make_bench():
    """An invented ``bench policy``."""
    row = {"policy": "invented", "source": "invented", "kernel": "torch", "threads": 1}
    row |= {"vision_ms": 1.0, "prefix_ms": 2.0, "denoise_ms": 3.0, "total_ms": 6.0, "rounds": 5}
    row |= {"load_s": 1.0, "weight_bytes_read": 5, "checkpoint_bytes": 5, "peak_rss_bytes": None}
    row |= {"prefix_tokens": 8, "horizon": 4, "steps": 2}
    rows = [{**row, "precision": "fp32"}, {**row, "precision": "w4a4", "total_ms": 2.0}]
    head = {"schema": 1, "machine": "invented", "threads": 1, "torch": "2", "library": "0.1.0"}
    return {**head, "rows": rows}


def make_kernels():
    """An invented ``bench kernels`` of no rows."""
    head = {name: make_bench()[name] for name in ("schema", "machine", "threads", "torch")}
    head |= {"library": "0.1.0", "peak_gmacs": {"avx2": 100.0}, "memory_gbytes": 20.0}
    summary = {"site": "s", "gmacs": 1, "vs_fp32": 2, "vs_int8_dynamic": 1}
    more = {"int8_engine": "x86", "llama_cpp": None, "rows": [], "contention": []}
    return {**head, **more, "summary": [summary]}


@pytest.fixture(scope="session")
def diagnostics():
    return make_diagnostics


@pytest.fixture(scope="session")
def site():
    return make_site


@pytest.fixture(scope="session")
def bench():
    return make_bench


@pytest.fixture(scope="session")
def kernels():
    return make_kernels


@pytest.fixture
def put(tmp_path):
    """Writes a document, or text as it is, and returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write
