"""What the benchmark runs: a frozen definition, its methods, and the tasks of a policy.

A result is worth comparing with another only if both measured the same thing.  ``BENCHMARK`` is
therefore frozen: policies and observations by their SHA-256, tasks, seeds, noises, stress and the
drawing of its outliers, and how episodes are run.  A change of any of them is another version, with
a name of its own; methods may come and go, since a row does not depend on the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.outlier_injection import condition_name
from omega_qvla.policies.full_precision import builtin_directory
from omega_qvla.recipe import DEFAULT_RECIPE, ablation_names
from omega_qvla.results.rows import BenchmarkRun, Comparison, Row

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
    "omega-w4a4-static",
    "omega-w4a4-no-prior",
    "omega-w4a4",
    "omega-w4a8",
)
"""All methods in the order of the tables; a new one is a recipe and a line here."""

QUICK_METHODS = ("rtn", "quarot", DEFAULT_RECIPE)
"""Of the quick form, whose minutes are spent quantizing: nothing against outliers, a rotation, and
the default."""


@dataclass(frozen=True)
class FrozenPolicy:
    """A policy and its observations, by their fingerprints.

    Attributes:
        weights: of its weights.
        calibration, heldout: of its observations, all of each.
    """

    weights: str
    calibration: str
    heldout: str


@dataclass(frozen=True)
class Definition:
    """What a version of the benchmark fixes.

    Attributes:
        version: its name.
        policies: embedded policies, by name.
        tasks: of both policies, in the order of the tables.
        magnitudes: of the stress conditions, beside the plain one.
        episodes: per task, with the seeds 0, 1, ...
        heldout: held-out observations of the action error.
        noises: of each of them, drawn from seed 0.
        stress_seed: draws the channels and factors of the outliers.
        execute: actions carried out of each chunk.
        together: episodes that share the policy's passes (``rollout.py``).
    """

    version: str
    policies: Mapping[str, FrozenPolicy]
    tasks: tuple[str, ...]
    magnitudes: tuple[float, ...]
    episodes: int
    heldout: int
    noises: int
    stress_seed: int = 0
    execute: int = 5
    together: int = 8

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything above: what a result names."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def quick(self) -> Definition:
        """A smoke test of the same shape: one stress condition, few of everything."""
        return replace(
            self,
            version=f"{self.version}-quick",
            magnitudes=self.magnitudes[1:2],
            episodes=2,
            heldout=12,
            noises=2,
        )

    def require(self, name: str, found: FrozenPolicy) -> None:
        """Refuse a policy or observations that are not the definition's.

        Raises:
            PolicyError: names what differs.
        """
        frozen = asdict(self.policies[name])
        wrong = [part for part, value in asdict(found).items() if frozen[part] != value]
        if wrong:
            raise PolicyError(
                f"builtin:{name} is not the policy of benchmark {self.version}: other "
                f"{', '.join(wrong)}. Install the release again, or compare with `omega-qvla "
                "compare`"
            )


BENCHMARK = Definition(
    version="v1",
    policies={
        "tiny-pi05": FrozenPolicy(
            weights="d554af7c39de6b00c518ead847a78c666ccff9cffd38f303e8faaa3439653ea2",
            calibration="4d38819c2ce79601dada9d70b7cc4e2377677afb04d1b772c10037236ce84882",
            heldout="f062a4c7a094dd2012023a847ae341b392430a84583e754b853ae56738b76f27",
        ),
        "tiny-gr00t": FrozenPolicy(
            weights="6fbdc7be8829ce600eb07e84d0cad07ac0862d1e3286cfbee2be1f256baec3a0",
            calibration="9009b501444a46a57fd808d7fe65a153a4ea693327b08d4457220fe01673b25c",
            heldout="389f4f84ffea56c3eca25dc83f4fb808e9851e48b4285dea436649b24c3f39e2",
        ),
    },
    tasks=("drawer-open-v3", "faucet-open-v3", "door-open-v3", "faucet-close-v3"),
    magnitudes=(10.0, 30.0, 100.0),
    episodes=100,
    heldout=96,
    noises=8,
)


def benchmark_document(
    definition: Definition,
    documents: Sequence[Comparison],
    *,
    methods: Sequence[str] = METHODS,
    machine: str,
    library: str,
    command: str,
) -> Comparison:
    """Comparisons of one policy each as one document.

    Args:
        documents: of ``sweep.run_sweep``, made with the definition's settings.
        methods: what a whole run has.
        machine, library, command: what made them.

    Returns:
        Their rows, with what the run says of itself.
    """
    rows = [row for document in documents for row in document.rows]
    return Comparison(
        policy=", ".join(dict.fromkeys(row.policy for row in rows)),
        rows=rows,
        benchmark=BenchmarkRun(
            version=definition.version,
            definition=definition.fingerprint,
            machine=machine,
            library=library,
            command=command,
            missing=missing_cells(definition, rows, methods),
        ),
    )


def missing_cells(
    definition: Definition, rows: Sequence[Row], methods: Sequence[str] = METHODS
) -> list[str]:
    """What is not measured, or not over all episodes: whole conditions, else single methods."""
    episodes = definition.episodes * len(definition.tasks)
    whole = {
        (row.policy, row.condition, row.recipe)
        for row in rows
        if row.episodes == episodes and row.noises == definition.noises
    }
    missing: list[str] = []
    for name in definition.policies:
        for magnitude in (0.0, *definition.magnitudes):
            cell = f"builtin:{name}", condition_name(magnitude)
            absent = [method for method in methods if (*cell, method) not in whole]
            if len(absent) == len(methods):
                missing.append(", ".join(cell))
            else:
                missing += [", ".join((*cell, method)) for method in absent]
    return missing


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
            f"{source} has no {PROVENANCE} that names its tasks; give them as `tasks`"
        ) from error
    if not tasks:
        raise PolicyError(f"{source}: {PROVENANCE} admits no task; give some as `tasks`")
    return tasks
