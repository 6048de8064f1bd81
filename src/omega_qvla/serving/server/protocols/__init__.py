"""The protocols that robots speak: a module each, and a line here.

A protocol's class is made of a started ``BatchScheduler`` and a ``Listening``, and is a
``ProtocolServer``.  Its module needs its own library and is imported only where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from omega_qvla.serving.server.protocol_server import Listening, ProtocolServer
    from omega_qvla.serving.server.scheduler import BatchScheduler


@dataclass(frozen=True)
class ServingProtocol:
    """How a protocol is served.

    Attributes:
        server: ``module:class`` of its server.
        port: where it listens unless the user says otherwise.
        package: what its module imports.
        http: whether it begins as HTTP: then its own port has health and metrics, and asks for the
            token before anything is parsed.
        layouts: whether ``--layout`` says how its robots name observations.
    """

    server: str
    port: int
    package: str
    http: bool
    layouts: bool

    def build(self, scheduler: BatchScheduler, listening: Listening) -> ProtocolServer:
        """Its server.

        Raises:
            MissingPackageError: its library is not installed.
            PolicyError: it cannot be served at this address.
        """
        module, _, name = self.server.partition(":")
        made = cast(
            Callable[["BatchScheduler", "Listening"], "ProtocolServer"],
            getattr(import_module(module), name),
        )
        return made(scheduler, listening)


PROTOCOLS = {
    "openpi": ServingProtocol(f"{__name__}.openpi:OpenpiServer", 8000, "websockets", True, True),
    "gr00t": ServingProtocol(f"{__name__}.gr00t:Gr00tServer", 5555, "zmq", False, False),
}
