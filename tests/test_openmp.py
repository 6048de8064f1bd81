"""Idle threads of PyTorch sleep where the user said nothing, and nothing of it leaks.

GNU's runtime says itself how its threads wait: asked to, it prints its settings when it is loaded,
0 spins where they sleep and 300,000 where nothing was set.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest

from omega_qvla.evaluation.execution.worker import PROGRAM
from omega_qvla.openmp import THE_USERS

pytestmark = pytest.mark.long

ASLEEP, SPINNING = "0", "300000"
DRY_RUN = ("-m", "omega_qvla.cli", "quantize", "random:tiny-pi05", "--out", "x", "--dry-run")


def run(*arguments: str, pass_fds: tuple[int, ...] = (), **variables: str) -> tuple[str, str]:
    """(standard output, spins of the runtime) of an interpreter with only these variables set."""
    environment = {name: value for name, value in os.environ.items() if name not in THE_USERS}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**environment, **variables, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        pass_fds=pass_fds,
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not said:
        pytest.skip("this PyTorch computes with another OpenMP runtime than GNU's")
    return done.stdout.strip(), said[0]


def test_threads_sleep_when_the_package_is_imported_first() -> None:
    assert run("-c", "import omega_qvla, torch") == ("", ASLEEP)


def test_threads_sleep_on_the_command_line() -> None:
    assert run(*DRY_RUN)[1] == ASLEEP


def test_a_worker_process_of_a_comparison_sleeps_too() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()  # the worker ends when its parent is gone
        number = theirs.fileno()
        assert run("-c", PROGRAM, str(number), *sys.path, pass_fds=(number,))[1] == ASLEEP


@pytest.mark.parametrize(
    ("variable", "value", "spins"),
    [
        ("GOMP_SPINCOUNT", "77", "77"),
        ("OMP_WAIT_POLICY", "ACTIVE", "30000000000"),
        ("KMP_BLOCKTIME", "infinite", SPINNING),
    ],
)
def test_what_the_user_set_stays(variable: str, value: str, spins: str) -> None:
    code = f"import omega_qvla, torch, os; print(os.environ[{variable!r}])"
    assert run("-c", code, **{variable: value}) == (value, spins)


IDLE = """
import time
import torch
{imports}

def others():
    return time.process_time() - time.thread_time()

torch.set_num_threads(2)
values = torch.zeros(70_000)  # little more than what PyTorch gives to one thread
values.add_(1.0)
before = others()
for _ in range(20):
    values.add_(1.0)
    time.sleep(0.02)
print(others() - before)
"""


def test_threads_sleep_where_torch_was_imported_first() -> None:
    """Seconds of processor that a second thread takes for 20 tiny shares of work."""
    spinning = float(run("-c", IDLE.format(imports=""))[0])
    asleep = float(run("-c", IDLE.format(imports="import omega_qvla"))[0])
    assert asleep < 0.2 * spinning


def test_nothing_is_done_about_it_where_the_user_said_how_threads_wait() -> None:
    code = "import torch, omega_qvla, threading; print([t.name for t in threading.enumerate()])"
    assert "openmp" in run("-c", code)[0]
    assert "openmp" not in run("-c", code, GOMP_SPINCOUNT="300000")[0]


def test_child_processes_and_later_libraries_do_not_see_the_variable() -> None:
    code = (
        "import omega_qvla, torch, os, subprocess;"
        "child = subprocess.run(['env'], capture_output=True, text=True, check=True).stdout;"
        "print('OMP_WAIT_POLICY' in os.environ, 'OMP_WAIT_POLICY' in child)"
    )
    assert run("-c", code)[0] == "False False"
