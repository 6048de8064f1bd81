"""Running the frozen benchmark: a comparison of each of its policies, as one document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from omega_qvla.calibration.observations import Observations
from omega_qvla.claims import Claim, require_free_file
from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.benchmark import (
    BENCHMARK,
    METHODS,
    QUICK_METHODS,
    Definition,
    FrozenPolicy,
    benchmark_document,
)
from omega_qvla.evaluation.closed_loop import Episodes, Resources
from omega_qvla.evaluation.comparison import compare, planned_rows
from omega_qvla.evaluation.comparison_folder import (
    Planned,
    require_free_comparison,
    require_kept,
)
from omega_qvla.evaluation.execution.evaluate import Progress
from omega_qvla.evaluation.speed.kernel_speed import machine_name
from omega_qvla.evaluation.subjects import Say
from omega_qvla.files import write_json
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.quantization.pipeline import weights_fingerprint
from omega_qvla.results.rows import Comparison


def benchmark(
    policies: Sequence[str] = tuple(BENCHMARK.policies),
    recipes: Sequence[str] | None = None,
    *,
    quick: bool = False,
    out: str | Path = "out/benchmark",
    resume: bool = False,
    overwrite: bool = False,
    resources: Resources | None = None,
    command: str = "omega_qvla.benchmark",
    say: Say = lambda _line: None,
    progress: Progress = lambda _what, _done, _total: None,
) -> Comparison:
    """All methods on the embedded policies, plain and with outliers, as the definition fixes it.

    Args:
        policies: of the benchmark's, by name.
        recipes: names or YAML files; None: all methods.
        quick: a smoke test of the same shape, of three methods; it ranks nothing.
        out: a folder per policy and the whole document go here.
        resume: go on with what is there, if it was made from the same.
        overwrite: replace what is there.
        resources: where policies compute; ``workers`` is the definition's.
        command: what the document says is to be typed for the same rows.
        say: told what is found and decided on the way.
        progress: called with (what, done, all).

    Returns:
        What is in ``out`` then, in :func:`target_of`; docs/json.md describes it.

    Raises:
        OutputError: ``out`` has results that would be lost, or another process writes there.
        PolicyError: a policy is not the benchmark's, or other than it was frozen.
        As :func:`~omega_qvla.evaluation.comparison.compare`.
    """
    definition = BENCHMARK.quick() if quick else BENCHMARK
    methods = QUICK_METHODS if quick else METHODS
    chosen, folder = recipes or methods, Path(out)
    names = list(dict.fromkeys(policies))
    _require_known(names, definition)
    resources = replace(resources or Resources(), workers=definition.together)
    resources.require()
    target = target_of(folder, quick=quick)
    with Claim(target):
        plans = {name: _planned(name, chosen, definition) for name in names}
        for name, planned in plans.items():
            require_free_comparison(
                folder / definition.version / name,
                planned,
                "benchmark",
                resume=resume,
                overwrite=overwrite,
            )
        _require_free(target, list(plans.values()), resume=resume, overwrite=overwrite)
        for name in names:
            definition.require(name, _found(name))
        documents: list[Comparison] = []
        for name in names:
            say(f"benchmark {definition.version}, {name}")
            documents.append(
                compare(
                    f"builtin:{name}",
                    chosen,
                    episodes=Episodes(definition.episodes, definition.tasks),
                    stress=definition.magnitudes,
                    held_out=definition.heldout,
                    noises=definition.noises,
                    reference="once",
                    out=folder / definition.version / name,
                    resume=resume,
                    overwrite=overwrite,
                    resources=resources,
                    command="benchmark",
                    say=say,
                    progress=progress,
                )
            )
        document = benchmark_document(
            definition,
            documents,
            methods=methods,
            machine=machine_name(),
            library=f"omega-qvla {version('omega-qvla')}",
            command=command,
        )
        write_json(document.to_json(), target)
        return document


def target_of(out: Path, *, quick: bool) -> Path:
    """The file of the whole document."""
    definition = BENCHMARK.quick() if quick else BENCHMARK
    return out / f"benchmark-{definition.version}.json"


def _require_known(names: Sequence[str], definition: Definition) -> None:
    unknown = [name for name in names if name not in definition.policies]
    if unknown or not names:
        raise PolicyError(
            f"{', '.join(unknown) or 'no policy'}: benchmark {definition.version} has "
            f"{', '.join(definition.policies)}; others are compared with `omega-qvla compare`"
        )


def _planned(name: str, recipes: Sequence[str], definition: Definition) -> Planned:
    return planned_rows(
        f"builtin:{name}",
        recipes,
        (0.0, *definition.magnitudes),
        "all",
        episodes=definition.episodes * len(definition.tasks),
        noises=definition.noises,
        held_out=definition.heldout,
    )


def _require_free(target: Path, plans: Sequence[Planned], *, resume: bool, overwrite: bool) -> None:
    """Refuse a document that would be lost.

    Raises:
        OutputError: it is there, or has rows that are not measured again.
    """
    if overwrite or not target.exists():
        return
    if resume:
        cells = [cell for planned in plans for cell in planned.cells]
        require_kept(target, replace(plans[0], cells=cells))
    else:
        require_free_file(target, overwrite)


def _found(name: str) -> FrozenPolicy:
    """What is installed under a name of the benchmark's."""
    source = f"builtin:{name}"
    return FrozenPolicy(
        weights_fingerprint(load_policy(source)),
        Observations.load(source).fingerprint,
        Observations.load(source, split="heldout").fingerprint,
    )
