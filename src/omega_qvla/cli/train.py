"""``train``: the embedded policies from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from omega_qvla.claims import Claim
from omega_qvla.cli.options import COUNT, PROCESSES, Common, Positional, Threads, option, save
from omega_qvla.errors import OutputError

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen


@dataclass(frozen=True)
class Train(Common):
    """Rebuild an embedded policy from scratch: demonstrations, training, admission."""

    examples: ClassVar[tuple[str, ...]] = ("omega-qvla train tiny-pi05 --out out/tiny-pi05",)
    policy: Positional[Literal["tiny-pi05", "tiny-gr00t"]] = "tiny-pi05"
    out: Annotated[
        Path | None, option(metavar="DIR", help="of the policy; out/POLICY by default")
    ] = None
    steps: Annotated[
        int | None, option(metavar="N", help="optimizer steps; the recipe's own"), COUNT
    ] = None
    workers: Annotated[int, option(metavar="N", help="simulator processes"), PROCESSES] = 2
    threads: Threads = None

    def kept(self) -> str | None:
        out = self.out or Path("out") / self.policy
        return f"demonstrations and checkpoints are kept in {out}" if out.exists() else None

    def run(self, screen: Screen) -> int:
        from omega_qvla.evaluation.closed_loop import require_simulator
        from omega_qvla.threads import available_cores, torch_threads
        from omega_qvla.training.embedded import rebuild

        out = self.out or Path("out") / self.policy
        require_simulator()
        with Claim(out):
            _require_unfinished(screen, out)
            with screen.bars() as bars, torch_threads(self.threads or available_cores()):
                provenance = rebuild(
                    self.policy, out, steps=self.steps, workers=self.workers, progress=bars
                )
        save(self.json, provenance)
        screen.say(f"policy in {out}; admitted: {', '.join(provenance['admitted'])}")
        return 0


def _require_unfinished(screen: Screen, out: Path) -> None:
    """Training goes on where it was interrupted; what is finished, or not its own, stays."""
    from omega_qvla.evaluation.benchmark import PROVENANCE

    if not out.exists() or not any(out.iterdir()):
        return
    if (out / PROVENANCE).exists():
        raise OutputError(f"{out} holds a trained policy; give another --out, or remove it first")
    if not (out / "demonstrations").exists():
        raise OutputError(f"{out} holds something that `train` did not write; give another --out")
    screen.say(f"continuing the interrupted training in {out}")
