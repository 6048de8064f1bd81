"""Hub ids: pinned, and every way they can fail said clearly.

The hub itself is not reached: its library is replaced where it would be, and run offline.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import omega_qvla as oq
from omega_qvla.checkpoints import hub
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.errors import PolicyError, ResourceError
from omega_qvla.policies.full_precision import load_policy

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
# The package gives its submodules as attributes only once somebody has imported them.
hub_errors = importlib.import_module("huggingface_hub.errors")
hub_constants = importlib.import_module("huggingface_hub.constants")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (f"owner/name@{COMMIT}", ("owner/name", COMMIT)),
        (f"hf:owner/name@{COMMIT}", ("owner/name", COMMIT)),
        ("lerobot/pi05_libero@v1.0", ("lerobot/pi05_libero", "v1.0")),
        ("nvidia/GR00T-N1.5-3B@n1.5-release", ("nvidia/GR00T-N1.5-3B", "n1.5-release")),
        ("owner/name", None),
        ("some/long/path@x", None),
        ("policy", None),
    ],
)
def test_a_hub_id_is_a_name_and_a_revision(source: str, expected: Any) -> None:
    assert hub.parse_hub_id(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name@main", "main is a branch, which moves; pin it"),
        ("hf:owner/name@master", "master is a branch"),
        ("hf:owner/name", r"no revision is given; pin it .* owner/name@<commit>"),
        ("hf:name@x", "not of the form"),
        ("owner/name", r"no policy at .*pin the revision: owner/name@<commit>"),
    ],
)
def test_an_unpinned_id_is_refused_before_anything_is_fetched(
    source: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_library", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(PolicyError, match=expected):
        oq.load_policy(source)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Replaces the download by a folder, or by an error."""

    def install(outcome: Any) -> list[Any]:
        calls: list[Any] = []

        def download(name: str, **options: Any) -> str:
            calls.append((name, options))
            if isinstance(outcome, BaseException):
                raise outcome
            return str(outcome)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return calls

    return install


def test_a_policy_is_read_from_its_pinned_snapshot(
    fake_hub: Callable[[Any], list[Any]], lerobot_directory: Callable[..., Path]
) -> None:
    calls = fake_hub(lerobot_directory())
    assert load_policy(f"lerobot/pi05@{COMMIT}", CheckpointOptions()).config.horizon == 4
    ((name, options),) = calls
    assert (name, options["revision"]) == ("lerobot/pi05", COMMIT)
    assert not any(
        pattern.endswith((".py", ".bin", ".pt")) for pattern in options["allow_patterns"]
    )


def hub_error(kind: str) -> BaseException:
    """An error as the library raises it; its constructors want a response."""
    error = getattr(hub_errors, kind)
    made = error.__new__(error)
    made.args = ("404 Client Error.\nmore",)
    return made


@pytest.mark.parametrize(
    ("kind", "error", "expected"),
    [
        ("GatedRepoError", PolicyError, r"is gated: accept its terms .*hf auth login"),
        ("RepositoryNotFoundError", PolicyError, "does not exist on the hub, or is private"),
        ("RevisionNotFoundError", PolicyError, f"has no revision {COMMIT}"),
        ("HfHubHTTPError", ResourceError, "could not be fetched"),
        ("LocalEntryNotFoundError", ResourceError, rf"hf download owner/name --revision {COMMIT}"),
        ("OfflineModeIsEnabled", ResourceError, "could not be fetched"),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_remedy(
    kind: str, error: type[Exception], expected: str, fake_hub: Callable[[Any], list[Any]]
) -> None:
    fake_hub(hub_error(kind))
    with pytest.raises(error, match=expected):
        oq.load_policy(f"owner/name@{COMMIT}")


def test_offline_the_cache_is_asked_and_the_network_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ResourceError, match="not in the cache and could not be fetched"):
        oq.load_policy(f"owner/name@{COMMIT}")


def test_a_revision_that_the_hub_knows_as_a_branch_is_refused(
    monkeypatch: pytest.MonkeyPatch, fake_hub: Callable[[Any], list[Any]], tmp_path: Path
) -> None:
    class References:
        branches = (type("Branch", (), {"name": "dev"}),)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_refs", lambda self, name: References)
    calls = fake_hub(tmp_path)
    with pytest.raises(PolicyError, match="dev is a branch"):
        oq.load_policy("owner/name@dev")
    assert not calls


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ResourceError, match=r"pip install 'huggingface-hub>=.*extra 'hub'"):
        oq.load_policy(f"owner/name@{COMMIT}")
    assert hub.cached_file("owner/name", "tokenizer.model") is None
