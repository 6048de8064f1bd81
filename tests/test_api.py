"""What a user of Python sees: names, progress on a terminal, numbers that can be read."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

import omega_qvla as oq


class Terminal(io.StringIO):
    """Standard error of somebody who watches."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def policy() -> oq.TorchPolicy:
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))

    def sample(network: nn.Module, observation: dict, _noise: object, _clock: object) -> object:
        return network(observation["x"])

    return oq.TorchPolicy(module, backbone=r"\d", sample=sample)


OBSERVATIONS = [{"x": torch.ones(2, 64)}]


def test_every_public_name_is_there_and_listed() -> None:
    assert all(getattr(oq, name) is not None for name in oq.__all__)
    assert {*oq.__all__, "__version__"} <= set(dir(oq))
    assert oq.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = oq.quantise


def test_progress_is_shown_on_a_terminal_alone_and_cleared(
    policy: oq.TorchPolicy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = Terminal()
    monkeypatch.setattr(sys, "stderr", watched)
    oq.quantize(policy, OBSERVATIONS, "rtn")
    assert "quantizing 0/2" in watched.getvalue() and watched.getvalue().endswith("\r\x1b[K")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    oq.quantize(policy, OBSERVATIONS, "rtn")
    assert sys.stderr.getvalue() == "" and capsys.readouterr().out == ""


def test_objects_say_what_they_are_and_numbers_are_short(policy: oq.TorchPolicy) -> None:
    quantized = oq.quantize(policy, OBSERVATIONS, "rtn")
    assert repr(policy) == "<TorchPolicy Sequential, 4,680 parameters>"
    assert repr(quantized).startswith("<QuantizedPolicy torch, rtn: 2 sites, 0.00")
    tiny = oq.load_policy("builtin:tiny-pi05")
    assert repr(tiny).startswith("<Pi05Policy pi05, ")
    assert repr(oq.Observations.load("builtin:tiny-pi05")).startswith("<Observations: ")
    found = quantized.memory_report()
    numbers = [found["reduction"], *(row["bits"] for row in found["components"])]
    assert max(len(repr(number)) for number in numbers) <= 8
