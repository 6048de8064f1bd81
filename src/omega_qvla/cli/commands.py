"""The commands: what each is for.  The module of each is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from inspect import get_annotations
from typing import Any

GROUPS: Mapping[str, Mapping[str, str]] = {
    "start here": {
        "demo": "quantize an embedded policy, run it in the simulator, compare it",
        "quantize": "turn a policy into a W4A4 artifact",
        "inspect": "what an artifact holds: bytes, recipe, sites",
        "serve": "a policy or an artifact behind a socket, for robots",
        "doctor": "what works on this machine, and how to get the rest",
    },
    "judge": {
        "eval": "success rate of one policy or artifact in a simulator",
        "compare": "recipes side by side on one policy, on the same seeds",
        "diagnose": "error and range of every site, and the robot's path",
        "unseen": "recipes calibrated on less than they meet",
        "backbone": "recipes on a language model with real weights",
        "benchmark": "the frozen benchmark of all methods",
        "bench": "speed and memory of kernels or of a whole policy",
        "report": "saved results as one HTML page",
    },
    "more": {
        "recipes": "the recipes there are",
        "verify": "every byte of an artifact against its SHA-256",
        "train": "an embedded policy from scratch",
    },
}
COMMANDS = tuple(name for group in GROUPS.values() for name in group)
"""Each is ``cli/<name>.py`` with a dataclass of that name, capitalised."""


def command_class(name: str) -> Any:
    """The dataclass of a command, its own options before those it shares with others."""
    kind = getattr(import_module(f"omega_qvla.cli.{name}"), name.capitalize())
    order = [field for owner in kind.__mro__ for field in get_annotations(owner)]
    known = kind.__dataclass_fields__
    kind.__dataclass_fields__ = {field: known[field] for field in sorted(known, key=order.index)}
    return kind


def overview() -> str:
    """What ``omega-qvla --help`` prints."""
    lines = [
        f"omega-qvla {version('omega-qvla')}: vision-language-action policies in 4 bits",
        "",
        "usage: omega-qvla COMMAND [OPTIONS] | COMMAND --help | --version",
    ]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:10s} {line}" for name, line in group.items())]
    return "\n".join(
        [
            *lines,
            "",
            "examples:",
            "  omega-qvla demo",
            "  omega-qvla quantize DIR --calibration DATASET --out out/mine",
            "  omega-qvla inspect out/mine",
            "  omega-qvla serve out/mine",
            "",
            "DIR is a checkpoint of LeRobot, openpi or GR00T, DATASET a LeRobot dataset.",
            "Every command has --json FILE (- for standard output), --overwrite and --debug;",
            "--print-completion bash (or zsh) gives a shell's completion.",
            "Exit status: 0 done; 1 a check failed; 2 bad input or usage; 3 not enough",
            "memory, disk or device, or a package or simulator is missing; 130, 143",
            "interrupted.",
        ]
    )
