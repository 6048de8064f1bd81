"""Policies on the Hugging Face hub: ``owner/name@revision``, or ``hf:owner/name@revision``.

A policy moves a robot, so what is loaded must not change behind its user's back: the revision is a
commit or a tag, never a branch.  Only files that this project reads are fetched; nothing that
could run code is among them.  huggingface_hub does the fetching, with its own cache, its login and
its offline mode.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from omega_qvla.errors import PolicyError, ResourceError
from omega_qvla.extras import needing

PATTERNS = ("*.json", "*.safetensors", "*.model", "merges.txt", "params/*", "_CHECKPOINT_METADATA")
"""Files to fetch; training state, code and other formats stay where they are."""

IGNORED = ("*optimizer*", "*training_state/*", "*rng_state*", "checkpoint-*")

_ID = re.compile(r"(?:hf:)?(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")
_UNPINNED = re.compile(r"(?:hf:)?(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BRANCHES = ("main", "master", "HEAD")


class HubId(NamedTuple):
    """A repository on the hub and what fixes its contents."""

    name: str
    revision: str


def parse_hub_id(source: str) -> HubId | None:
    """The hub id that a text is, or None where it is something else (a path, a builtin name).

    Raises:
        PolicyError: a hub id without revision, or whose revision is a branch.
    """
    match = _ID.fullmatch(source)
    if match is not None:
        found = HubId(match["name"], match["revision"])
        if found.revision in _BRANCHES:
            raise _unpinned(found.name, f"{found.revision} is a branch, which moves")
        return found
    if source.startswith("hf:"):
        name = source.removeprefix("hf:").partition("@")[0]
        if _UNPINNED.fullmatch(source):
            raise _unpinned(name, "no revision is given")
        raise PolicyError(f"{source!r} is not of the form hf:owner/name@revision")
    return None


def looks_unpinned(source: str) -> bool:
    """Whether a text that is no directory might be a hub id without revision."""
    return _UNPINNED.fullmatch(source) is not None


def fetch(identity: HubId) -> Path:
    """The directory of a repository at its revision, fetched where it is not in the cache.

    Raises:
        PolicyError: the repository or the revision does not exist, may not be read, or the
            revision is a branch.
        ResourceError: huggingface_hub is not installed, or the hub cannot be reached.
    """
    hub = _library()
    errors = hub.errors
    try:
        if not _COMMIT.fullmatch(identity.revision):
            _require_tag(hub, identity)
        return Path(
            hub.snapshot_download(
                identity.name,
                revision=identity.revision,
                allow_patterns=list(PATTERNS),
                ignore_patterns=list(IGNORED),
            )
        )
    except errors.GatedRepoError as error:
        raise PolicyError(
            f"{identity.name} is gated: accept its terms at https://huggingface.co/{identity.name} "
            "and log in with: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise PolicyError(
            f"{identity.name} does not exist on the hub, or is private; if it is yours, log in "
            "with: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise PolicyError(f"{identity.name} has no revision {identity.revision}") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise ResourceError(
            f"{identity.name} at {identity.revision} is not in the cache and could not be fetched: "
            f"{_first_line(error)}. On a machine with network run: hf download {identity.name} "
            f"--revision {identity.revision} --local-dir DIR, and give DIR"
        ) from error


def cached_file(name: str, file: str) -> Path | None:
    """A file of a repository that is on this machine already, at whatever revision; else None."""
    try:
        hub = _library()
    except ResourceError:
        return None
    found = hub.try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def _require_tag(hub: Any, identity: HubId) -> None:
    """Refuse a revision that is a branch, as far as that can be asked."""
    try:
        references = hub.HfApi().list_repo_refs(identity.name)
    except hub.errors.OfflineModeIsEnabled:
        return  # what is in the cache under this name was put there earlier
    if identity.revision in {branch.name for branch in references.branches}:
        raise _unpinned(identity.name, f"{identity.revision} is a branch, which moves")


def _unpinned(name: str, why: str) -> PolicyError:
    return PolicyError(
        f"{name}: {why}; pin it to a commit or a tag, as in {name}@<commit> (the commits are at "
        f"https://huggingface.co/{name}/commits)"
    )


def _library() -> Any:
    with needing("reading a policy from the hub", "hub"):
        import huggingface_hub
        import huggingface_hub.errors  # pyright: ignore[reportUnusedImport]
    return huggingface_hub


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
