"""What the benchmark runs: its methods, and the tasks that a policy's provenance file admitted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from omega_qvla.errors import PolicyError
from omega_qvla.policies.loading import builtin_directory
from omega_qvla.recipe import ablation_names

PROVENANCE = "provenance.json"

METHODS = (
    "rtn",
    "gptq",
    "smoothquant",
    "quarot",
    "duquant",
    "svdquant",
    "quantvla",
    "foldquant",
    "omega-paper",
    "omega-w4a4",
)
"""All methods in the order of the tables; a new one is a recipe and a line here."""


def expand_recipes(names: Sequence[str]) -> list[str]:
    """Recipe names as given, with ``methods`` and ``ablations`` standing for all of their kind."""
    groups = {"methods": METHODS, "ablations": tuple(ablation_names())}
    expanded = [name for given in names for name in groups.get(given, (given,))]
    return list(dict.fromkeys(expanded))


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
