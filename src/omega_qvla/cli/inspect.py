"""``inspect``: what an artifact holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from omega_qvla.cli.options import Common, Positional, option, save

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen
    from omega_qvla.results.memory import Inspection

ArtifactDirectory = Annotated[
    Path, option(metavar="DIR", help="what `omega-qvla quantize --out DIR` wrote")
]


@dataclass(frozen=True)
class Inspect(Common):
    """Show what an artifact holds: memory per component, recipe, sites, hash."""

    examples: ClassVar[tuple[str, ...]] = (
        "omega-qvla inspect out/mine",
        "omega-qvla inspect out/mine --json - | jq .reduction",
    )
    directory: Positional[ArtifactDirectory] = tyro.MISSING

    def run(self, screen: Screen) -> int:
        from omega_qvla.policies.lerobot_bridge.coverage import coverage_lines

        found, config = inspection(self.directory)
        recipe, sites = config["recipe"], config["sites"]
        screen.memory(found, str(self.directory))
        screen.decisions(found.decisions or {})
        for line in coverage_lines(config["policy"]["config"].get("coverage") or ()):
            screen.say(line)
        screen.say(f"recipe   {recipe['name']} ({config['recipe_hash'][:16]})")
        screen.say(f"content  {found.content_hash}")
        screen.say("tensors  not read; omega-qvla verify checks every byte")
        screen.say(f"kernel   {found.kernel}; {len(sites)} quantized sites")
        for site in sites:
            if site["note"]:
                screen.say(f"note     {site['name']}: {site['note']}")
        save(self.json, found.to_json())
        return 0


def inspection(directory: Path) -> tuple[Inspection, dict[str, Any]]:
    """The document about an artifact, and the content of its ``omega_config.json``."""
    from omega_qvla.results.memory import Inspection
    from omega_qvla.runtime.inspection import inspect_artifact

    looked = inspect_artifact(directory)
    found = Inspection.model_validate(
        {
            **looked.memory,
            "recipe": looked.config["recipe"],
            "kernel": looked.kernel,
            "sites": looked.config["sites"],
            "content_hash": looked.content_hash,
            "decisions": looked.config["policy"].get("decisions", {}),
            "coverage": looked.config["policy"]["config"].get("coverage"),
        }
    )
    return found, looked.config
