"""``inspect``: what an artifact holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from omega_qvla.cli.options import (
    Common,
    Positional,
    save,
)
from omega_qvla.cli.screen import Screen
from omega_qvla.policies.lerobot_bridge.coverage import coverage_lines
from omega_qvla.results.memory import Inspection
from omega_qvla.runtime.inspection import inspect_artifact


@dataclass(frozen=True)
class Inspect(Common):
    """Show what an artifact holds: memory per component, recipe, sites, hash."""

    directory: Positional[Path] = tyro.MISSING

    def run(self, screen: Screen) -> int:
        looked = inspect_artifact(self.directory)
        recipe, sites = looked.config["recipe"], looked.config["sites"]
        decisions = looked.config["policy"].get("decisions", {})
        coverage = looked.config["policy"]["config"].get("coverage")
        found = Inspection.model_validate(
            {
                **looked.memory,
                "recipe": recipe,
                "kernel": looked.kernel,
                "sites": sites,
                "content_hash": looked.content_hash,
                "decisions": decisions,
                "coverage": coverage,
            }
        )
        screen.memory(found, str(self.directory))
        screen.decisions(decisions)
        for line in coverage_lines(coverage or ()):
            screen.say(line)
        screen.say(f"recipe   {recipe['name']} ({looked.config['recipe_hash'][:16]})")
        screen.say(f"content  {looked.content_hash}")
        screen.say("tensors  not read; omega-qvla verify checks every byte")
        screen.say(f"kernel   {looked.kernel}; {len(sites)} quantized sites")
        notes = [f"{site['name']}: {site['note']}" for site in sites if site["note"]]
        for note in notes:
            screen.say(f"note     {note}")
        save(self.json, found.to_json())
        return 0
