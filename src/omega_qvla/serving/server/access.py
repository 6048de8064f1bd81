"""Who may talk to a server: loopback freely, everybody else with a token, TLS if wanted."""

from __future__ import annotations

import hmac
import ipaddress
import ssl
import stat
from pathlib import Path

from omega_qvla.errors import PolicyError

MIN_TOKEN_CHARACTERS = 16
_SCHEMES = ("api-key", "bearer")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: Path) -> bytes:
    """The token in a file that only its owner can read.

    Raises:
        PolicyError: unreadable, readable by others, or too short; says what to do.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise PolicyError(f"cannot read the token file {path}: {error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise PolicyError(f"others can read the token file {path}; run: chmod 600 {path}")
    if len(text) < MIN_TOKEN_CHARACTERS or not text.isascii() or not text.isprintable():
        raise PolicyError(
            f"the token in {path} must be at least {MIN_TOKEN_CHARACTERS} printable ASCII "
            "characters; make one with: openssl rand -hex 32"
        )
    return text.encode("ascii")


def authorized(header: str | None, token: bytes | None) -> bool:
    """Whether an ``Authorization`` header carries the token; without a token everybody may.

    openpi's client sends ``Api-Key TOKEN``; ``Bearer TOKEN`` is the usual form.  Compared in
    constant time.
    """
    if token is None:
        return True
    scheme, _, given = (header or "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), token)
    return right and scheme.lower() in _SCHEMES


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 or later with a certificate and its key.

    Raises:
        PolicyError: one of them cannot be read, or they do not belong together.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise PolicyError(
            f"the TLS certificate {certificate} and key {key} cannot be used: {error}"
        ) from error
    return context


def require_token(host: str, token: bytes | None) -> None:
    """An address that others can reach needs a token.

    Raises:
        PolicyError: it has none.
    """
    if token is None and not is_loopback(host):
        raise PolicyError(
            f"{host} can be reached from other machines: give a `token_file`, or "
            "serve on 127.0.0.1 (the default)"
        )
