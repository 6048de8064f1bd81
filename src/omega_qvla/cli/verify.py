"""``verify``: every byte of an artifact against its SHA-256."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import tyro

from omega_qvla.cli.inspect import ArtifactDirectory
from omega_qvla.cli.options import Common, Positional, save

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen


@dataclass(frozen=True)
class Verify(Common):
    """Check every byte of an artifact against its SHA-256."""

    examples: ClassVar[tuple[str, ...]] = ("omega-qvla verify out/mine",)
    directory: Positional[ArtifactDirectory] = tyro.MISSING

    def run(self, screen: Screen) -> int:
        from omega_qvla.artifact import verify_artifact
        from omega_qvla.results.memory import Verification
        from omega_qvla.runtime.inspection import site_failures

        report = verify_artifact(self.directory)
        if report.ok:
            report = replace(report, failures=site_failures(self.directory))
        for failure in report.failures:
            screen.say(f"FAILED {failure}")
        screen.say(f"{report.checked} checked, {len(report.failures)} failed")
        save(self.json, Verification.model_validate(report.to_json()).model_dump())
        return 0 if report.ok else 1
