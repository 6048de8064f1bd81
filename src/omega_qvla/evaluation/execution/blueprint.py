"""What lets any process build the policy of a row: an importable function and its arguments.

A policy is gigabytes of tensors and cannot be sent about; how it is made can.  A blueprint names a
function as ``module:callable`` and holds JSON values and numeric arrays to call it with, so it
travels as a message (``channel.py``) and never as code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.openloop import Sampler
from omega_qvla.evaluation.simulators.simulator_process import import_callable

Report = Callable[[str, int, int], None]
"""Progress of a long build: (what, done, total)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of the whole policy, quantized layers and everything else."""

    checkpoint_bytes: int | None = None
    resident_bytes: int | None = None


@dataclass(frozen=True)
class Blueprint:
    """How a policy is built.

    Attributes:
        factory: ``module:callable``, called as ``factory(report, **arguments)``; it returns
            :class:`Built`.
        arguments: JSON values in which numeric arrays may stand anywhere.
    """

    factory: str
    arguments: Mapping[str, Any]

    def build(self, report: Report, **here: Any) -> Built:
        """Import the factory and call it.

        Args:
            here: further arguments that only this process has, such as what is loaded already.

        Raises:
            PolicyError: there is no such function.
        """
        try:
            factory = import_callable(self.factory)
        except ImportError as error:
            raise PolicyError(f"cannot build a policy with {self.factory!r}: {error}") from error
        return factory(report, **self.arguments, **here)


@dataclass(frozen=True)
class Built:
    """A policy that was built.

    Attributes:
        policy: ready to run.
        footprint: its bytes.
        again: builds the same policy in another process, without doing the long work twice; None:
            only this process can.
    """

    policy: Sampler
    footprint: Footprint
    again: Blueprint | None = None
