"""How a worker process comes by the policy of a comparison's row: the factories of its blueprint.

Full precision is loaded from where the user named it and its weights are compared with those the
comparison was started with.  A recipe's integers are quantized once, saved, and from then on loaded
by anyone from the artifact, whose content hash must be the one that was saved.  A simulation cannot
be saved as a policy; what is kept of it is the journal of its sites, from which any process puts it
together again without quantizing.

Beside an artifact lies what it was made from, its origin.  A comparison that is resumed takes an
artifact again if the origin is its own and the content is what was written then; anything else is
quantized anew.

Arguments are JSON values and arrays (``blueprint.py``), so observations travel with the request and
need to lie nowhere; a policy, the artifacts and the journals are read from their paths.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omega_qvla.api import quantize
from omega_qvla.calibration.observations import Observations
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.errors import ArtifactError, OmegaError, PolicyError
from omega_qvla.evaluation.execution.blueprint import Blueprint, Built, Report
from omega_qvla.evaluation.footprints import artifact_footprint, full_footprint
from omega_qvla.evaluation.outlier_injection import outlier_injected
from omega_qvla.files import write_json
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.quantization.journal import discard_journal
from omega_qvla.quantization.pipeline import weights_fingerprint
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.engine import QuantizedPolicy, SimulatedPolicy
from omega_qvla.runtime.load import load

Load = Callable[[], NativePolicy]

_HERE = "omega_qvla.evaluation.execution.building"


def full_blueprint(
    source: str,
    choices: CheckpointOptions,
    weights: str,
    magnitude: float,
    *,
    seed: int,
    probe: Any | None,
    checkpoint_bytes: int | None,
) -> Blueprint:
    """Full precision, with outliers injected or without.

    Args:
        source: name, absolute directory or hub id of the policy.
        weights: fingerprint that the weights must have.
        magnitude, seed, probe: see :func:`outlier_injection.outlier_injected`.
        checkpoint_bytes: size of its checkpoint.
    """
    answers = {
        name: _absolute(str(answer)) if isinstance(answer, str | Path) else answer
        for name, answer in asdict(choices).items()
    }
    arguments = {
        "source": _absolute(source),
        "choices": answers,
        "weights": weights,
        "magnitude": magnitude,
        "seed": seed,
        "probe": probe,
        "checkpoint_bytes": checkpoint_bytes,
    }
    return Blueprint(f"{_HERE}:full_precision", arguments)


def quantized_blueprint(
    full: Blueprint,
    recipe: Recipe,
    calibration: Observations,
    folder: Path,
    label: str,
    *,
    resume: bool = False,
) -> Blueprint:
    """A recipe on a policy of :func:`full_blueprint`.

    Args:
        folder: the artifact's directory; of a simulation the journal lies beside it.
        label: of the progress reports.
        resume: take an artifact that is there already, if it was made from the same.
    """
    arguments = {
        "full": dict(full.arguments),
        "recipe": recipe.model_dump(mode="json"),
        "calibration": [dict(observation) for observation in calibration],
        "label": label,
    }
    if recipe.realizable:
        arguments |= {"artifact": str(folder.absolute()), "resume": resume}
        return Blueprint(f"{_HERE}:quantized", arguments)
    journal = str(journal_of_simulation(folder).absolute())
    return Blueprint(f"{_HERE}:simulated", {**arguments, "journal": journal, "resume": False})


def artifact_blueprint(directory: Path, content_hash: str | None) -> Blueprint:
    """A policy that was quantized and saved before."""
    arguments = {"directory": str(directory.absolute()), "content_hash": content_hash}
    return Blueprint(f"{_HERE}:saved", arguments)


def journal_of_simulation(folder: Path) -> Path:
    """Where the sites of a simulation are kept, beside where an artifact would be."""
    return folder.with_name(f".{folder.name}.journal")


def full_precision(report: Report, *, loaded: Load | None = None, **arguments: Any) -> Built:
    """Factory of :func:`full_blueprint`.

    Args:
        loaded: gives the policy, where this process has it already; as in all factories here.

    Raises:
        PolicyError: the policy is not here, or has other weights.
    """
    del report
    policy = _load_full(**arguments) if loaded is None else loaded()
    footprint = full_footprint(policy, arguments["checkpoint_bytes"])
    return Built(policy, footprint, Blueprint(f"{_HERE}:full_precision", arguments))


def quantized(
    report: Report,
    *,
    loaded: Load | None = None,
    full: Mapping[str, Any],
    recipe: Mapping[str, Any],
    calibration: Sequence[Any],
    label: str,
    artifact: str,
    resume: bool,
) -> Built:
    """Factory of :func:`quantized_blueprint` for a recipe with integers.

    The policy is quantized and saved, and what is given is what was loaded from the artifact alone.
    """
    chosen, observations = Recipe.model_validate(recipe), Observations(calibration)
    origin = {
        "weights": full["weights"],
        "magnitude": full["magnitude"],
        "seed": full["seed"],
        "recipe_hash": chosen.content_hash,
        "calibration": observations.fingerprint,
        "library": version("omega-qvla"),
    }
    directory = Path(artifact)
    beside = origin_of(directory)
    found: Any = _made_before(directory, beside, origin) if resume else None
    if found is None:
        beside.unlink(missing_ok=True)
        made = quantize(
            _load_full(**full) if loaded is None else loaded(),
            observations,
            chosen,
            progress=lambda done, total, _site: report(label, done, total),
            allow_mismatch=True,  # whoever compares has seen what was found
        )
        assert not isinstance(made, SimulatedPolicy)
        found = load(made.save_pretrained(directory))
        del made
        write_json({**origin, "content_hash": found.content_hash}, beside)
    again = artifact_blueprint(directory, found.content_hash)
    return Built(found, artifact_footprint(found, directory), again)


def saved(report: Report, *, directory: str, content_hash: str | None) -> Built:
    """Factory of :func:`artifact_blueprint`.

    Raises:
        ArtifactError: another worker wrote something else, or nothing, as seen from here.
    """
    del report
    policy: Any = load(directory)
    if content_hash is not None and policy.content_hash != content_hash:
        raise ArtifactError(
            f"{directory} is not the artifact that was written for this comparison (content hash "
            f"{policy.content_hash}, expected {content_hash}): the output directory must be on a "
            "file system that all machines share, and nothing else may write there"
        )
    return Built(
        policy,
        artifact_footprint(policy, Path(directory)),
        artifact_blueprint(Path(directory), content_hash),
    )


def simulated(
    report: Report,
    *,
    loaded: Load | None = None,
    full: Mapping[str, Any],
    recipe: Mapping[str, Any],
    calibration: Sequence[Any],
    label: str,
    journal: str,
    resume: bool,
) -> Built:
    """Factory of :func:`quantized_blueprint` for a recipe that cannot exist as integers."""
    if not resume:
        discard_journal(Path(journal))  # what a killed comparison left
    policy: Any = quantize(
        _load_full(**full) if loaded is None else loaded(),
        Observations(calibration),
        Recipe.model_validate(recipe),
        work_directory=journal if loaded is None else None,
        resume=resume,
        progress=lambda done, total, _site: None if resume else report(label, done, total),
        allow_mismatch=True,  # whoever compares has seen what was found
    )
    footprint = artifact_footprint(policy, None)
    if loaded is not None:
        return Built(policy, footprint)
    arguments = {
        "full": full,
        "recipe": recipe,
        "calibration": calibration,
        "label": label,
        "journal": journal,
        "resume": True,
    }
    return Built(policy, footprint, Blueprint(f"{_HERE}:simulated", arguments))


def origin_of(artifact: Path) -> Path:
    """The file that says what an artifact of a comparison was made from."""
    return artifact.with_name(f".{artifact.name}.origin.json")


def _made_before(artifact: Path, beside: Path, origin: Mapping[str, Any]) -> QuantizedPolicy | None:
    """The artifact, if it is whole and was made from the same."""
    try:
        known = json.loads(beside.read_text("utf-8"))
        found = load(artifact)
    except (OSError, ValueError, OmegaError):
        return None
    return found if known == {**origin, "content_hash": found.content_hash} else None


def _absolute(name: str) -> str:
    """Paths mean the same in every working directory; names stay as they are."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _answers(content: Mapping[str, Any]) -> CheckpointOptions:
    """CheckpointOptions after their way through JSON, which has neither paths nor tuples."""
    tokenizer = content["tokenizer"]
    typed: dict[str, Any] = {
        "tokenizer": None if tokenizer is None else Path(tokenizer),
        "ignore_settings": tuple(content["ignore_settings"]),
    }
    return CheckpointOptions(**{**content, **typed})


def _load_full(
    *,
    source: str,
    choices: Mapping[str, Any],
    weights: str,
    magnitude: float,
    seed: int,
    probe: Any | None,
    checkpoint_bytes: int | None,
) -> NativePolicy:
    del checkpoint_bytes
    policy = load_policy(source, _answers(choices))
    if weights_fingerprint(policy) != weights:
        raise PolicyError(
            f"{source} has other weights here than where the comparison was started; every machine "
            "must find the same policy under that name"
        )
    return outlier_injected(policy, magnitude, seed=seed, probe=probe)
