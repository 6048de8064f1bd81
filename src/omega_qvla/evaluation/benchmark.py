"""Which tasks a policy is benchmarked on: those its provenance file admitted."""

from __future__ import annotations

import json
from pathlib import Path

from omega_qvla.errors import PolicyError
from omega_qvla.policies.loading import builtin_directory

PROVENANCE = "provenance.json"


def benchmark_tasks(source: str) -> list[str]:
    """The admitted tasks of a policy, from the provenance file beside it.

    Args:
        source: ``builtin:NAME`` or a directory.

    Raises:
        PolicyError: there is no such file; the tasks then have to be named.
    """
    scheme, _, name = source.partition(":")
    directory = builtin_directory(name) if scheme == "builtin" else Path(source)
    try:
        content = json.loads((directory / PROVENANCE).read_text("utf-8"))
        tasks = [str(task) for task in content["admitted"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PolicyError(
            f"{source} has no {PROVENANCE} that names its tasks; give them with --tasks a,b,c"
        ) from error
    if not tasks:
        raise PolicyError(f"{source}: {PROVENANCE} admits no task; give some with --tasks a,b,c")
    return tasks
