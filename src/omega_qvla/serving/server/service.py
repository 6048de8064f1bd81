"""A whole server out of a policy and a user's settings, and its life from start to signal."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.errors import PolicyError
from omega_qvla.policies.base import Policy
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.real_time_chunking import DEFAULT_CHUNKING, RealTimeChunking, WeightSchedule
from omega_qvla.runtime.load import load
from omega_qvla.serving.server.access import read_token, require_token, tls_context
from omega_qvla.serving.server.policy_engine import PolicyEngine
from omega_qvla.serving.server.protocol_server import Listening, ProtocolServer
from omega_qvla.serving.server.protocols import PROTOCOLS
from omega_qvla.serving.server.safety import ActionLimits, read_limits
from omega_qvla.serving.server.scheduler import MOST_WAITING, BatchingConfig, BatchScheduler, Log
from omega_qvla.serving.wire.specification import LAYOUTS
from omega_qvla.threads import chosen_threads

_NO_CHOICES = CheckpointOptions()


@dataclass(frozen=True)
class Settings:
    """What a user decides about a server; see ``omega-qvla serve --help``."""

    protocol: str = "openpi"
    host: str = "127.0.0.1"
    port: int | None = None
    token_file: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    layout: str | None = None
    batch: int = 8
    waiting: int | None = None
    deadline_ms: float | None = None
    limits: str | None = None
    limit_margin: float = 0.25
    steps: int | None = None
    threads: int | None = None
    kernel: str | None = None
    seed: int | None = None
    drain_s: float = 3.0
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    execution_horizon: int = DEFAULT_CHUNKING.execution_horizon
    max_guidance_weight: float = DEFAULT_CHUNKING.max_guidance_weight
    guidance_schedule: WeightSchedule = DEFAULT_CHUNKING.schedule

    @property
    def chunking(self) -> RealTimeChunking:
        """How a chunk continues its robot's last one.

        Raises:
            PolicyError: names the setting.
        """
        return RealTimeChunking(
            self.execution_horizon, self.max_guidance_weight, self.guidance_schedule
        )

    def __post_init__(self) -> None:
        """Numbers that make no sense are refused before anything is loaded.

        Raises:
            PolicyError: names the option.
        """
        positive = {"batch": self.batch, "waiting": self.waiting, "deadline_ms": self.deadline_ms}
        positive |= {"steps": self.steps, "threads": self.threads}
        _ = self.chunking
        for name, value in positive.items():
            if value is not None and not 0 < value < float("inf"):
                raise PolicyError(f"`{name}={value}`: it must be above 0")
        for name, value in (("limit_margin", self.limit_margin), ("drain_s", self.drain_s)):
            if not 0 <= value < float("inf"):
                raise PolicyError(f"`{name}={value}`: it must be 0 or more")
        for name, port in (("port", self.port), ("metrics_port", self.metrics_port)):
            if port is not None and not 0 <= port <= 65535:
                raise PolicyError(f"`{name}={port}`: ports are 0 to 65535")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise PolicyError("TLS needs both `tls_certificate` and `tls_key`")
        protocol = PROTOCOLS.get(self.protocol)
        if protocol is None:
            raise PolicyError(f"`protocol={self.protocol}`: there are {', '.join(PROTOCOLS)}")
        if protocol.http and self.metrics_port is not None:
            raise PolicyError(
                f"`metrics_port` is not for {self.protocol}, which answers /healthz and /metrics "
                "on its own port"
            )
        if self.metrics_port is None and self.metrics_host != "127.0.0.1":
            raise PolicyError(f"`metrics_host={self.metrics_host}` needs a `metrics_port`")
        unprotected = not protocol.http and self.metrics_port is None
        if unprotected and (self.tls_key or self.token_file):
            raise PolicyError(
                f"the protocol {self.protocol} has neither TLS nor a token that is checked before "
                "parsing: it is served on loopback without them (they protect `metrics_port`, "
                "where there is one); reach it through an SSH tunnel"
            )
        if self.limits is not None and self.limit_margin != Settings.limit_margin:
            raise PolicyError(
                "`limit_margin` widens the limits that statistics give, and `limits` gives others: "
                "leave one of them out"
            )
        if not protocol.layouts and self.layout is not None:
            raise PolicyError(f"`layout` is not for {self.protocol}, which names its parts itself")


@dataclass(frozen=True)
class Served:
    """A policy, and what clients are told of it.

    Attributes:
        policy: the graph that computes.
        artifact: content hash, or None in full precision.
        identity: family, precision and recipe.
        kernel: what multiplies its integers.
    """

    policy: Policy
    artifact: str | None
    identity: Mapping[str, str | None]
    kernel: str


def open_policy(source: str | Path, settings: Settings, choices: CheckpointOptions) -> Served:
    """An artifact where the directory is one, else a policy in full precision.

    Raises:
        PolicyError: an option is for the other kind; or see ``load_policy``.
        ArtifactError, ResourceError: see ``load``.
    """
    if (Path(source) / "omega_config.json").exists():
        if choices != _NO_CHOICES:
            raise PolicyError(
                f"{source} is an artifact and leaves nothing open: `training_config`, "
                "`tokenizer` and the other options about checkpoints are for full precision"
            )
        quantized = load(source, kernel=settings.kernel, threads=settings.threads)
        recipe = str(quantized.config["recipe"]["name"])
        identity = {"policy": quantized.policy.family, "precision": "quantized", "recipe": recipe}
        return Served(quantized.policy, quantized.content_hash, identity, quantized.kernel)
    if settings.kernel is not None:
        raise PolicyError(f"`kernel` is for artifacts, and {source} is none")
    try:
        policy = load_policy(source, choices)
    except PolicyError as error:
        if not Path(source).is_dir():
            raise
        text = f"{source} is no artifact (it has no omega_config.json); as a policy: {error}"
        raise PolicyError(text) from error
    kinds = {str(one.dtype).removeprefix("torch.") for one in policy.module.parameters()}
    identity = {"policy": policy.family, "precision": ", ".join(sorted(kinds)), "recipe": None}
    return Served(policy, None, identity, "none")


class Service:
    """A scheduler, warmed up and started, and its server.

    Attributes:
        scheduler: what answers.
        server: what listens.
    """

    def __init__(
        self, scheduler: BatchScheduler, server: ProtocolServer, settings: Settings
    ) -> None:
        self.scheduler, self.server = scheduler, server
        self._settings = settings

    @classmethod
    def build(
        cls,
        source: str | Path,
        settings: Settings,
        log: Log,
        choices: CheckpointOptions = _NO_CHOICES,
    ) -> Service:
        """Load, check what can be checked, compute once, and be ready to listen.

        Args:
            source: an artifact, or whatever ``load_policy`` takes.
            settings: what the user decides.
            log: takes every event.
            choices: answers to what a full-precision checkpoint leaves open.

        Raises:
            PolicyError: an option does not fit the policy, or the address needs a token.
            ArtifactError, ResourceError: see ``load`` and ``load_policy``; or the extra ``serve``
                is not installed.
        """
        token = None if settings.token_file is None else read_token(settings.token_file)
        require_token(settings.host, token)
        require_token(settings.metrics_host, token)
        served = open_policy(source, settings, choices)
        threads = chosen_threads(served.policy.module, settings.threads)
        engine = PolicyEngine(
            served.policy, threads=threads, steps=settings.steps, chunking=settings.chunking
        )
        layout = settings.layout if PROTOCOLS[settings.protocol].layouts else "native"
        specification = engine.specification(None if layout is None else LAYOUTS[layout])
        if settings.limits == "none":
            limits = ActionLimits.unlimited(specification.action_dim)
        elif settings.limits is None:
            limits = engine.limits(settings.limit_margin)
        else:
            limits = read_limits(Path(settings.limits), specification.action_dim)
        deadline_s = None if settings.deadline_ms is None else settings.deadline_ms / 1e3
        waiting = settings.waiting or MOST_WAITING
        scheduler = BatchScheduler(
            engine,
            specification,
            limits,
            artifact=served.artifact,
            identity={**served.identity, "real_time_chunking": asdict(settings.chunking)},
            generator=np.random.default_rng(settings.seed),
            batching=BatchingConfig(settings.batch, waiting, deadline_s),
            log=log,
        )
        server = _server(scheduler, settings, token)
        log("loaded", artifact=served.artifact, **served.identity, kernel=served.kernel)
        slowest_s = scheduler.warm_up(engine.warm_up_observation())
        log("warm", batch_ms=1e3 * slowest_s, deadline_ms=1e3 * scheduler.deadline_s)
        scheduler.start()
        return cls(scheduler, server, settings)

    def ready(self, port: int) -> None:
        """Say where it listens."""
        host, protocol = self._settings.host, self._settings.protocol
        self.scheduler.log("ready", host=host, port=port, protocol=protocol)

    def totals(self) -> dict[str, Any]:
        """What happened, in numbers (docs/json.md)."""
        metrics = self.scheduler.metrics
        return {
            "artifact": self.scheduler.artifact,
            "requests": metrics.totals("requests_total"),
            "action_violations": metrics.totals("action_violations_total"),
            "connections": metrics.totals("connections_total"),
            "batches": metrics.totals("batches_total"),
        }


def _server(scheduler: BatchScheduler, settings: Settings, token: bytes | None) -> ProtocolServer:
    """The protocol's server, with health and metrics beside it where it has no room for them."""
    protocol = PROTOCOLS[settings.protocol]
    port = protocol.port if settings.port is None else settings.port
    listening = Listening(settings.host, port, drain_s=settings.drain_s)
    if protocol.http:
        protected = replace(listening, token=token, tls=_tls(scheduler, settings, token))
        return protocol.build(scheduler, protected)
    server = protocol.build(scheduler, listening)
    if settings.metrics_port is None:
        return server
    from omega_qvla.serving.server.status_port import WithStatusPort

    tls = _tls(scheduler, settings, token)
    beside = Listening(settings.metrics_host, settings.metrics_port, token, tls)
    return WithStatusPort(scheduler, server, beside)


def _tls(
    scheduler: BatchScheduler, settings: Settings, token: bytes | None
) -> ssl.SSLContext | None:
    if settings.tls_certificate is not None and settings.tls_key is not None:
        return tls_context(settings.tls_certificate, settings.tls_key)
    if token is not None:
        scheduler.log("warning", message="the token travels unencrypted; give a TLS certificate")
    return None


def run_until_signal(service: Service) -> bool:
    """Serve until SIGTERM or SIGINT; whether everything on its way was finished.

    Raises:
        OSError: the address cannot be used.
    """
    return asyncio.run(_run(service))


async def _run(service: Service) -> bool:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return await service.server.serve(stop, service.ready)
