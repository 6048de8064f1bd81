"""docs/add-a-policy.md, done: one folder and one line make a policy that quantizes and serves."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "omega_qvla"
FOLDER = "pi0_like"

CHILD = """
import json, subprocess, sys
package, out = sys.argv[1:]
EDITABLE = "sys.meta_path[:] = [f for f in sys.meta_path if 'Redirecting' not in type(f).__name__]"
exec_path = f"import sys; {EDITABLE}; sys.path.insert(0, {package!r})"
sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
sys.path.insert(0, package)
import numpy as np
import torch
import omega_qvla as oq
from pathlib import Path
from omega_qvla.calibration.observations import Observations
from omega_qvla.evaluation.openloop import offers_normalized
from omega_qvla.policies.base import sites_of
from omega_qvla.policies.families import families
from omega_qvla.policies.full_precision import stream_policy
from omega_qvla.policies.own_layout import write_own
from omega_qvla.serving.client import RemotePolicy

assert oq.__file__.startswith(package), oq.__file__
torch.set_num_threads(1)
name, out = "random:tiny-pi0-like", Path(out)
policy = oq.load_policy(name)
config = policy.config
seen = Observations.random(
    config.cameras, config.state_dim, count=6, size=config.vision.image_size
)
noise = np.random.default_rng(0).standard_normal(policy.noise_shape).astype(np.float32)
wanted = policy.sample_actions(seen[0], noise)

# The stages are the same computation as sampling, and read every parameter.
read = {path for stage in policy.stages() for path in stage.reads}
names = [n for n, _ in policy.module.named_parameters()]
assert not [n for n in names if not any(n.startswith(f"{p}.") for p in read)]
state = policy.initial_state(seen[0], torch.Generator().manual_seed(0))
with torch.inference_mode():
    start, length = state["noise"], 0
    for stage in policy.stages():
        state = stage.run(state)
    last = policy.module.read_out(state["hidden"][0])
    observed = policy.prefill(policy.encode_images(policy.processor.encode(seen[0])))
    code = policy.module.time_code(torch.tensor([1.0]))
    suffix = policy.module.suffix(observed[1])
    velocity = policy.module.velocity(start, code, observed[2], observed[0], suffix)
    assert torch.allclose(last, velocity, atol=1e-5)

# A chunk continues another one.
settled = policy.sample_actions(seen[1], -noise, previous=wanted, delay=len(wanted))
free = policy.sample_actions(seen[1], -noise)
assert np.abs(settled - wanted).max() < 0.5 * np.abs(free - wanted).max()

# Its own layout, streamed and in memory.
write_own(policy, out / "full", dtype=torch.bfloat16)
assert np.array_equal(oq.load_policy(out / "full").sample_actions(seen[0], noise), wanted)

# Quantized from memory and from files, saved and loaded.
quantized = oq.quantize(policy, seen)
assert len(quantized.config["sites"]) == len(sites_of(policy))
quantized.save_pretrained(out / "artifact")
loaded = oq.load(out / "artifact")
actions = loaded.sample_actions(seen[0], noise=noise)
assert np.array_equal(actions, quantized.sample_actions(seen[0], noise=noise))
error = np.linalg.norm(actions - wanted) / np.linalg.norm(wanted)
assert 0.0 < error < 0.5, error
streamed = oq.quantize(stream_policy(out / "full"), seen)
assert np.array_equal(streamed.sample_actions(seen[0], noise=noise), actions)
assert offers_normalized(loaded)

# Served, to a robot that speaks over a socket.
server = subprocess.Popen(
    [
        sys.executable,
        "-c",
        f"{exec_path}; from omega_qvla.cli import main; main(sys.argv[1:])",
        "serve",
        str(out / "artifact"),
        "--port",
        "0",
        "--limits",
        "none",
    ],
    stdout=subprocess.PIPE,
    text=True,
)
try:
    events = (json.loads(line) for line in server.stdout)
    port = next(event["port"] for event in events if event["event"] == "ready")
    with RemotePolicy(f"ws://127.0.0.1:{port}") as remote:
        told = remote.metadata
        reply = remote.infer(dict(seen[0]), noise=noise, deadline_ms=60_000.0)
    assert told["policy"] == "pi0_like"
    assert np.array_equal(reply["actions"], actions)
finally:
    server.kill()
    server.wait()
print(*families(), len(quantized.config["sites"]))
"""


EXAMPLE = ROOT / "examples" / FOLDER


def shown_line() -> str:
    """The one block of the document that is no file of the example; the others show all of them."""
    text = (ROOT / "docs" / "add-a-policy.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    shown = {found[1] for block in blocks if (found := re.search(r'--8<-- "(.*)"', block))}
    files = {path.relative_to(ROOT).as_posix() for path in EXAMPLE.glob("*.py")}
    assert shown == files - {f"examples/{FOLDER}/__init__.py"}
    (line,) = (block for block in blocks if "--8<--" not in block)
    return line


def test_one_folder_and_one_line_add_a_policy(tmp_path: Path) -> None:
    pytest.importorskip("websockets", reason="the extra serve is not installed")
    package = tmp_path / "package" / "omega_qvla"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    line = shown_line()
    assert line.strip() == f'"{FOLDER}",' and line.count("\n") == 1
    shutil.copytree(EXAMPLE, package / "policies" / FOLDER)
    registry = package / "policies" / "families.py"
    text = registry.read_text("utf-8")
    end = text.index(")\n", text.index("FOLDERS = ("))
    registry.write_text(text[:end] + line + text[end:])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(package.parent), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:4] == ["pi05", "pi0", "gr00t_n15", FOLDER]


def test_the_example_imports_no_other_family() -> None:
    code = "\n".join(path.read_text("utf-8") for path in EXAMPLE.glob("*.py"))
    imports = re.findall(r"omega_qvla\.policies\.(\w+)", code)
    shared = {"base", "guidance", "native", "family", "layers", "processing"}
    assert set(imports) <= {*shared, FOLDER}
