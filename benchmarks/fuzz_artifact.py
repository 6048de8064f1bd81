"""Damages artifacts in every way it knows and watches the reader and the verifier.

    python benchmarks/fuzz_artifact.py --count 1000000 --flips 10000 --seed 0 --out results.json

Two experiments.  *Mutations*: one artifact is damaged by one or two random mutations per round
(truncate, flip, append, huge shapes, duplicate and missing keys, NaN scales, links, FIFOs ...),
half of the time with all hashes recomputed afterwards, so that the damage gets past them.  Each
round must end, within 5 s, in a loaded artifact or in one of the library's errors; without
recomputed hashes it must end in an error.  *Flips*: one bit anywhere in the artifact; the default
load and ``verify`` must both find it.

Also imported by the tests, which run a few hundred rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from omega_qvla.artifact import read_artifact, verify_artifact, write_artifact
from omega_qvla.errors import OmegaError

TIME_LIMIT_S = 5.0
MANIFEST = "manifest.json"


def build(directory: Path) -> None:
    """A small artifact with every kind of part: two tensor files, processor, all tensor types."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "layer.weight_packed": torch.randint(
            -(2**31), 2**31 - 1, (8, 6), dtype=torch.int32, generator=generator
        ),
        "layer.weight_scale": torch.rand(8, generator=generator),
        "layer.weight_shape": torch.tensor([8, 48]),
        "layer.transform": torch.rand(1, 8, 8, generator=generator).bfloat16(),
        "layer.bias": torch.rand(8, generator=generator).half(),
        "table.times": torch.rand(3, dtype=torch.float64, generator=generator),
        "embedding": torch.randint(-128, 127, (5, 7), dtype=torch.int8, generator=generator),
        "empty": torch.zeros(0, 4),
    }
    write_artifact(
        directory,
        config={"policy": {"family": "test", "widths": [8, 48]}, "recipe": "omega-w4a4-static"},
        tensors=tensors,
        processor={"stats.json": b'{"mean": [0.0, 1.5]}', "tokenizer.model": bytes(range(64))},
        card="# a policy\n",
        max_shard_bytes=300,
    )


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file of an artifact, by relative name."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def restore(directory: Path, files: dict[str, bytes]) -> None:
    """Make ``directory`` hold exactly ``files`` again, whatever lies there."""
    shutil.rmtree(directory, ignore_errors=True)
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def canonical(value: Any) -> bytes:
    """The bytes the library would write."""
    return json.dumps(value, sort_keys=True, indent=2).encode() + b"\n"


def split_shard(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a tensor file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_shard(header: bytes | dict[str, Any], body: bytes) -> bytes:
    """The inverse of ``split_shard``, padded as the library pads."""
    text = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    length = -(-len(text) // 8) * 8
    return length.to_bytes(8, "little") + text.ljust(length) + body


def reseal(directory: Path) -> None:
    """Recompute sizes and hashes, as an attacker with a text editor would; skip what cannot be."""
    path = directory / MANIFEST
    manifest = json.loads(path.read_bytes())
    for name, entry in manifest["files"].items():
        file = directory / name
        if file.is_file() and not file.is_symlink():
            data = file.read_bytes()
            entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    seal(manifest)
    path.write_bytes(canonical(manifest))


def seal(manifest: dict[str, Any]) -> None:
    """Give a manifest the content hash of its content."""
    manifest.pop("content_hash", None)
    manifest["content_hash"] = hashlib.sha256(canonical(manifest)).hexdigest()


# --- mutations: each damages the directory in one way ----------------------------------------

Mutation = Callable[[Path, random.Random], None]


def _any_file(root: Path, rng: random.Random) -> Path:
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
    return rng.choice(files) if files else root / "README.md"


def _shard(root: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(root.glob("*.safetensors")))


def truncate(root: Path, rng: random.Random) -> None:
    """Cut a file anywhere."""
    path = _any_file(root, rng)
    os.truncate(path, rng.randrange(max(path.stat().st_size, 1)))


def flip(root: Path, rng: random.Random) -> None:
    """One bit of one file."""
    path = _any_file(root, rng)
    data = bytearray(path.read_bytes() or b"\0")
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_header(root: Path, rng: random.Random) -> None:
    """One bit near the beginning of a tensor file."""
    path = _shard(root, rng)
    data = bytearray(path.read_bytes())
    data[rng.randrange(min(len(data), 600))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def append(root: Path, rng: random.Random) -> None:
    """Random bytes at the end of a file."""
    with _any_file(root, rng).open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 200)))


def overwrite(root: Path, rng: random.Random) -> None:
    """Replace a piece of a file by one of another length."""
    path = _any_file(root, rng)
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data) + 1)
    data[start : start + rng.randrange(64)] = rng.randbytes(rng.randrange(64))
    path.write_bytes(data)


def delete(root: Path, rng: random.Random) -> None:
    """Remove a file."""
    _any_file(root, rng).unlink(missing_ok=True)


def add_file(root: Path, rng: random.Random) -> None:
    """A file that nobody expects."""
    name = rng.choice(["x", "processor/x", "model-00009-of-00009.safetensors", "a\nb", ".hidden"])
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(rng.randbytes(10))


def swap_files(root: Path, rng: random.Random) -> None:
    """Exchange the contents of two files."""
    first, second = _any_file(root, rng), _any_file(root, rng)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def special_file(root: Path, rng: random.Random) -> None:
    """A FIFO, directory, link or socket in the place of a file."""
    path = _any_file(root, rng)
    data = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        outside = root.with_name(root.name + ".outside")
        outside.write_bytes(data)
        path.symlink_to(outside)
    elif kind == 4:
        path.symlink_to(path.name)
    else:
        descriptor = os.open(path.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{descriptor}/{path.name}")
        os.close(descriptor)


_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 1.5, "", "x", "../x", "\ud800",
    "I32", "F4", "F64", [], {}, [0], [2**62, 4], [-1], [1] * 100, [[[]]], {"a": 1}, "0" * 64,
)  # fmt: skip


def _mutate_json(value: Any, rng: random.Random) -> Any:
    """Change, drop, add or move one random place of a JSON value."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(_VALUES)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    action = rng.random()
    if action < 0.15:
        del value[key]
    elif action < 0.25 and isinstance(value, dict):
        value[rng.choice(["x", "../x", "/etc/passwd", "\0", "é", "__metadata__"])] = value[key]
    elif action < 0.35 and isinstance(value, dict):
        value["y" * rng.randrange(1, 2000)] = value.pop(key)
    else:
        value[key] = _mutate_json(value[key], rng)
    return value


def mutate_manifest(root: Path, rng: random.Random) -> None:
    """Change a random place of the manifest, usually with a correct content hash."""
    manifest = _mutate_json(json.loads((root / MANIFEST).read_bytes()), rng)
    if isinstance(manifest, dict) and rng.random() < 0.8:
        seal(manifest)
    (root / MANIFEST).write_bytes(canonical(manifest))


def mutate_config(root: Path, rng: random.Random) -> None:
    """Change a random place of the configuration."""
    path = root / "omega_config.json"
    path.write_bytes(canonical(_mutate_json(json.loads(path.read_bytes()), rng)))


def mutate_header(root: Path, rng: random.Random) -> None:
    """Change a random place of a tensor file's header."""
    path = _shard(root, rng)
    header, body = split_shard(path.read_bytes())
    path.write_bytes(join_shard(canonical(_mutate_json(header, rng)).rstrip(), body))


def huge_shape(root: Path, rng: random.Random) -> None:
    """In header and manifest alike."""
    path = _shard(root, rng)
    header, body = split_shard(path.read_bytes())
    name = rng.choice(sorted(header))
    shape = [rng.choice([2**20, 2**31, 2**40, 2**62, 2**63, 0, 1]) for _ in range(rng.randrange(9))]
    header[name]["shape"] = shape
    if rng.random() < 0.5:
        begin = header[name]["data_offsets"][0]
        header[name]["data_offsets"] = [begin, begin + rng.choice([2**40, 2**62, 2**64])]
    path.write_bytes(join_shard(header, body))
    manifest = json.loads((root / MANIFEST).read_bytes())
    if name in manifest["tensors"]:
        manifest["tensors"][name]["shape"] = shape
    (root / MANIFEST).write_bytes(canonical(manifest))


def header_length(root: Path, rng: random.Random) -> None:
    """A header length that is too small, too large or absurd."""
    path = _shard(root, rng)
    data = path.read_bytes()
    length = rng.choice([0, 1, 7, 8, 56, len(data), 2**24, 2**31, 2**63, 2**64 - 1])
    path.write_bytes(length.to_bytes(8, "little") + data[8:])


def duplicate_key(root: Path, rng: random.Random) -> None:
    """A key that occurs twice."""
    path = rng.choice([root / MANIFEST, root / "omega_config.json", _shard(root, rng)])
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        header, body = split_shard(data)
        name = rng.choice(sorted(header))
        extra = json.dumps({name: header[name]})[1:-1].encode()
        path.write_bytes(join_shard(b"{" + extra + b"," + canonical(header).rstrip()[1:], body))
    else:
        path.write_bytes(b'{"format_version": 1,' + data[1:])


def hostile_json(root: Path, rng: random.Random) -> None:
    """JSON made to exhaust a parser."""
    depth, count = rng.choice([31, 33, 5000, 200_000]), rng.choice([1000, 300_000])
    text = rng.choice(
        [
            b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth, b'{"a":' + b"9" * count,
            b'"' + b'\\"' * count, b'{"a": NaN}', b'{"a": 1e999}', b'{"a": -Infinity}', b"\xff\xfe",
            b'{"a":[' + b"[]," * count + b"[]]}", b'{"a": "' + b"x" * count, b"", b"null", b"{}",
        ]
    )  # fmt: skip
    path = rng.choice([root / MANIFEST, root / "omega_config.json", _shard(root, rng)])
    path.write_bytes(join_shard(text, b"") if path.suffix == ".safetensors" else text)


def nonfinite(root: Path, rng: random.Random) -> None:
    """NaN or Inf in a floating tensor."""
    path = _shard(root, rng)
    header, body = split_shard(path.read_bytes())
    patterns = {
        "F32": [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\1\0\x80\x7f"],
        "F16": [b"\0\x7e", b"\0\x7c"],
        "BF16": [b"\xc0\x7f", b"\x80\xff"],
        "F64": [b"\0\0\0\0\0\0\xf8\x7f", b"\0\0\0\0\0\0\xf0\xff"],
    }
    floats = [
        entry for entry in header.values() if entry["dtype"] in patterns and 0 not in entry["shape"]
    ]
    if not floats:
        flip(root, rng)
        return
    entry = rng.choice(floats)
    begin, end = entry["data_offsets"]
    item = rng.choice(patterns[entry["dtype"]])
    start = begin + rng.randrange((end - begin) // len(item)) * len(item)
    path.write_bytes(join_shard(header, body[:start] + item + body[start + len(item) :]))


MUTATIONS: tuple[Mutation, ...] = (
    truncate, flip, flip_header, append, overwrite, delete, add_file, swap_files, special_file,
    mutate_manifest, mutate_config, mutate_header, huge_shape, header_length, duplicate_key,
    hostile_json, nonfinite,
)  # fmt: skip


# --- experiments -----------------------------------------------------------------------------


@dataclass
class Result:
    """What was seen; ``problems`` must be empty, ``stalls`` are rounds that were slow once."""

    rounds: int = 0
    refused: int = 0
    accepted: int = 0
    stalls: int = 0
    slowest_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def _watch(action: Callable[[], Any], result: Result) -> tuple[Any, Exception | None, float]:
    """Run with a time limit; if it runs out, once more: machines stall, hangs repeat."""
    outcome = _run_limited(action)
    if isinstance(outcome[1], TimeoutError):
        result.stalls += 1
        outcome = _run_limited(action)
    return outcome


def _run_limited(action: Callable[[], Any]) -> tuple[Any, Exception | None, float]:
    """Result or error, and seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError("took too long")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)
    started = time.perf_counter()
    try:
        return action(), None, time.perf_counter() - started
    except Exception as error:
        return None, error, time.perf_counter() - started
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def examine(root: Path, result: Result, label: str, *, must_refuse: bool) -> None:
    """Load and verify; record anything but one of our errors, a disagreement, or acceptance."""
    artifact, load_error, load_s = _watch(lambda: _touch(root), result)
    report, verify_error, verify_s = _watch(lambda: verify_artifact(root), result)
    result.rounds += 1
    result.slowest_s = max(result.slowest_s, load_s, verify_s)
    for action, error in (("load", load_error), ("verify", verify_error)):
        if error is not None and not isinstance(error, OmegaError):
            result.problems.append(f"{label}: {action}: {type(error).__name__}: {error}")
    refused = load_error is not None
    result.refused += refused
    result.accepted += not refused
    if load_error is not None:
        result.errors[type(load_error).__name__] += 1
    found = verify_error is not None or not report.ok
    if found != refused:
        result.problems.append(f"{label}: load and verify disagree: {load_error}; {report}")
    if must_refuse and not refused:
        result.problems.append(f"{label}: accepted {artifact}")


def _touch(root: Path) -> int:
    """Load, and read every byte that was mapped."""
    artifact = read_artifact(root)
    return sum(int(t.view(-1).view(torch.uint8).sum()) for t in artifact.tensors.values())


def run_mutations(folder: Path, count: int, seed: int) -> Result:
    """``count`` damaged directories."""
    root, result = folder / "artifact", Result()
    build(root)
    files = snapshot(root)
    for i in range(count):
        rng = random.Random(f"{seed}-{i}")
        chosen = rng.sample(MUTATIONS, rng.choice([1, 1, 2]))
        sealed = rng.random() < 0.5
        restore(root, files)
        label = f"{seed}-{i} {'+'.join(m.__name__ for m in chosen)} sealed={sealed}"
        try:
            for mutation in chosen:
                if mutation is not special_file:
                    mutation(root, rng)
            if sealed:
                reseal(root)
        except (LookupError, TypeError, ValueError, AttributeError, OSError, RecursionError):
            pass  # the second step had nothing left to work on; the directory is damaged as it is
        if special_file in chosen:  # last, because nothing here may open what it leaves
            special_file(root, rng)
        special = special_file in chosen
        changed = special or snapshot(root) != files
        touched = any(m in (mutate_manifest, huge_shape) for m in chosen)
        must_refuse = special or (changed and not sealed and not touched)
        examine(root, result, label, must_refuse=must_refuse)
    restore(root, files)
    return result


def run_flips(folder: Path, count: int, seed: int) -> Result:
    """``count`` single bits, each anywhere in the artifact."""
    root, result = folder / "artifact", Result()
    build(root)
    files = snapshot(root)
    names = sorted(files)
    rng = random.Random(seed)
    for _ in range(count):
        name = rng.choices(names, weights=[len(files[n]) for n in names])[0]
        bit = rng.randrange(8 * len(files[name]))
        data = bytearray(files[name])
        data[bit // 8] ^= 1 << bit % 8
        (root / name).write_bytes(data)
        examine(root, result, f"{name} bit {bit}", must_refuse=True)
        (root / name).write_bytes(files[name])
    return result


def main() -> None:
    """Run both experiments and write their JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results: dict[str, Any] = {"seed": options.seed}
    with tempfile.TemporaryDirectory() as folder:
        experiments = (
            ("mutations", run_mutations, options.count),
            ("flips", run_flips, options.flips),
        )
        for name, experiment, count in experiments:
            result = experiment(Path(folder), count, options.seed)
            results[name] = {
                "rounds": result.rounds,
                "refused": result.refused,
                "accepted": result.accepted,
                "errors": dict(result.errors),
                "stalls": result.stalls,
                "slowest_s": result.slowest_s,
                "problems": result.problems[:100],
                "problem_count": len(result.problems),
            }
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results["peak_rss_growth_bytes"] = (after - before) * 1024
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    if any(results[name]["problem_count"] for name in ("mutations", "flips")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
