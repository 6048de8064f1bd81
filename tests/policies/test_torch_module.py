"""``TorchPolicy``: a user's own module from patterns to an artifact and back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import omega_qvla as oq
from omega_qvla.cli import main
from omega_qvla.errors import ArtifactError, ObservationError, PolicyError
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.slots import PATH_IN_SLOT
from omega_qvla.runtime.engine import QuantizedPolicy
from omega_qvla.runtime.linear import QuantizedLinear

STEPS = 4
Sample = Callable[[nn.Module, Any, Any, FlowClock], Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.unused = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.mlp(torch.tanh(self.attn(x))))


class Network(nn.Module):
    """A language part, and a head that is run once per denoising step."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.llm = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24, bias=False))
        self.exp = nn.ModuleList([Block(), Block()])
        self.dropout = nn.Dropout(0.5)
        self.read_out = nn.Linear(24, 24)
        self.register_buffer("offset", torch.zeros(24))
        self.register_buffer("counter", torch.tensor(3))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0.0, 0.3, generator=generator)
            self.offset.normal_(generator=generator)

    def velocity(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + memory
        for block in self.exp:
            x = block(x)
        return self.read_out(self.dropout(x))


def with_clock(module: nn.Module, observation: Any, noise: Any, clock: FlowClock) -> Tensor:
    memory, x = module.llm(observation["x"]) + module.offset, noise
    for i in range(STEPS):
        with clock.step(i, 1.0 - i / STEPS):
            x = x - module.velocity(x, memory) / STEPS
    return x


def without_clock(module: nn.Module, observation: Any, noise: Any, clock: FlowClock) -> Tensor:
    memory, x = module.llm(observation["x"]) + module.offset, noise
    for _ in range(STEPS):
        x = x - module.velocity(x, memory) / STEPS
    return x


def wrap(module: nn.Module, sample: Sample = with_clock, **changes: Any) -> oq.TorchPolicy:
    arguments: dict[str, Any] = {
        "backbone": r"llm\..*",
        "action_head": r"exp\.\d+\.(attn|mlp)",
        "sample": sample,
        "steps": STEPS,
        "noise_shape": (3, 24),
    }
    return oq.TorchPolicy(module, **(arguments | changes))


@pytest.fixture
def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(3, 16, generator=generator)} for _ in range(4)]


@pytest.fixture
def start() -> Tensor:
    return torch.randn(3, 24, generator=torch.Generator().manual_seed(2))


def test_the_example_of_the_design_end_to_end(
    data: list[dict[str, Tensor]], start: Tensor, tmp_path: Path
) -> None:
    """Quantize, sample, save, load into another module of the same structure, sample the same."""
    policy = wrap(Network())
    quantized = oq.quantize(policy, data, recipe="omega-w4a4-static")
    assert isinstance(quantized, QuantizedPolicy)
    integers = {
        name.removesuffix(PATH_IN_SLOT)
        for name, child in quantized.policy.module.named_modules()
        if isinstance(child, QuantizedLinear)
    }
    heads = {f"exp.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")}
    assert integers == {"llm.0", "llm.2"} | heads
    exact = policy.module.eval() and policy.sample_actions(data[0], start)
    ours = quantized.sample_actions(data[0], start)
    assert isinstance(ours, Tensor) and ours.shape == (3, 24)
    assert (ours - exact).square().mean() < 0.02 * exact.square().mean()
    quantized.save_pretrained(tmp_path / "out")
    loaded = oq.load(tmp_path / "out", policy=wrap(Network(seed=9)))
    for item in data:
        found = loaded.sample_actions(item, start)
        assert torch.equal(found, quantized.sample_actions(item, start))
    assert loaded.memory_report() == quantized.memory_report()


def test_a_module_in_training_mode_is_neither_changed_nor_sampled_with_dropout(
    data: list[dict[str, Tensor]], start: Tensor
) -> None:
    module = Network().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    policy = wrap(module)
    quantized = oq.quantize(policy, data)
    first, second = (quantized.sample_actions(data[0], start) for _ in range(2))
    assert torch.equal(first, second)
    assert module.training and isinstance(module.llm[0], nn.Linear)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_loading_does_not_change_the_module_that_gives_the_structure(
    data: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    oq.quantize(wrap(Network()), data).save_pretrained(tmp_path / "out")
    other = Network(seed=9)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    oq.load(tmp_path / "out", policy=wrap(other))
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    assert isinstance(other.llm[0], nn.Linear) and other.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_not_quantized_keeps_its_type(
    dtype: torch.dtype, data: list[dict[str, Tensor]], start: Tensor, tmp_path: Path
) -> None:
    def make(seed: int = 0) -> oq.TorchPolicy:
        return wrap(Network(seed).to(dtype))

    cast = [{"x": item["x"].to(dtype)} for item in data]
    quantized = oq.quantize(wrap(Network().to(dtype), with_cast(dtype)), cast)
    expected = quantized.sample_actions(cast[0], start.to(dtype))
    assert expected.dtype == dtype
    quantized.save_pretrained(tmp_path / "out")
    loaded = oq.load(tmp_path / "out", policy=make(3))
    assert loaded.policy.module.read_out.weight.dtype == dtype
    assert torch.equal(loaded.sample_actions(cast[0], start.to(dtype)), expected)


def with_cast(dtype: torch.dtype) -> Sample:
    return lambda module, obs, noise, clock: with_clock(module, obs, noise.to(dtype), clock)


def test_step_module_counts_the_calls_instead(
    data: list[dict[str, Tensor]], start: Tensor, tmp_path: Path
) -> None:
    """The same integers as with an explicit clock, and nothing is left on the user's module."""
    module = Network()
    counted = wrap(module, without_clock, step_module="exp.0")
    # exp.0 contains one block only: the other one runs outside of it.
    one_block = {"action_head": r"exp\.0\.(attn|mlp)"}
    expected = oq.quantize(wrap(module, **one_block), data).tensors()
    found = oq.quantize(
        wrap(module, without_clock, step_module="exp.0", **one_block), data
    ).tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(PolicyError, match="outside any denoising step"):
        oq.quantize(counted, data)
    assert not module.exp[0]._forward_pre_hooks and not module.exp[0]._forward_hooks


def test_the_step_module_may_itself_be_a_quantized_linear(
    data: list[dict[str, Tensor]], start: Tensor, tmp_path: Path
) -> None:
    parts = {"action_head": r"exp\.0\.attn", "step_module": "exp.0.attn"}
    quantized = oq.quantize(wrap(Network(), without_clock, **parts), data)
    assert quantized.tensors()["exp.0.attn.activation_step_times"].shape == (STEPS,)
    assert quantized.tensors()["exp.0.attn.activation_offset"].shape[0] == STEPS
    quantized.save_pretrained(tmp_path / "out")
    loaded = oq.load(tmp_path / "out", policy=wrap(Network(3), without_clock, **parts))
    expected = quantized.sample_actions(data[0], start)
    assert torch.equal(loaded.sample_actions(data[0], start), expected)


def test_two_policies_around_one_module_do_not_disturb_each_other(
    data: list[dict[str, Tensor]], start: Tensor
) -> None:
    module = Network().eval()
    first, second = (wrap(module, without_clock, step_module="exp.0") for _ in range(2))
    expected = first.sample_actions(data[0], start)
    for _ in range(3):
        assert torch.equal(second.sample_actions(data[0], start), expected)
        assert torch.equal(first.sample_actions(data[0], start), expected)


def test_more_calls_than_steps_are_refused(data: list[dict[str, Tensor]], start: Tensor) -> None:
    policy = wrap(Network(), without_clock, step_module="exp.0", steps=STEPS - 1)
    with pytest.raises(PolicyError, match="more than 3 times"):
        policy.sample_actions(data[0], start)
    assert policy.clock.index is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"backbone": r"lm\..*"}, r"backbone pattern .* matches no nn\.Linear; names .*llm\.0"),
        ({"backbone": "llm"}, "matches no"),
        ({"action_head": r"exp\.\d"}, "action_head pattern"),
        ({"action_head": r"(llm|exp)\..*"}, "'llm.0' matches both"),
        ({"backbone": "("}, "is invalid"),
        ({"backbone": None, "action_head": None}, "nothing would be quantized"),
        ({"step_module": "exp.7"}, "'exp.7' is not a submodule"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(PolicyError, match=expected):
        wrap(Network(), **changes)


def test_a_bare_linear_cannot_be_replaced_inside_itself() -> None:
    with pytest.raises(PolicyError, match="matches no"):
        oq.TorchPolicy(nn.Linear(2, 2), backbone=".*", sample=lambda m, o, n, c: m(o))


def test_either_part_may_be_absent(data: list[dict[str, Tensor]], start: Tensor) -> None:
    for absent in ("backbone", "action_head"):
        quantized = oq.quantize(wrap(Network(), **{absent: None}), data, "rtn")
        assert quantized.sample_actions(data[0], start).shape == (3, 24)
        assert absent not in {site.site.component for site in quantized.sites}


def test_a_linear_that_is_never_called_is_named(data: list[dict[str, Tensor]]) -> None:
    with pytest.raises(PolicyError, match=r"'exp\.0\.unused' was never called"):
        oq.quantize(wrap(Network(), action_head=r"exp\..*"), data)


def test_a_clock_that_is_never_entered_is_refused_with_the_remedy(
    data: list[dict[str, Tensor]],
) -> None:
    with pytest.raises(PolicyError, match=r"exp\.0\.attn.*clock\.step\(i, t\).*step_module"):
        oq.quantize(wrap(Network(), without_clock), data)


def test_flow_time_may_run_upwards(data: list[dict[str, Tensor]], start: Tensor) -> None:
    """Some policies integrate from t = 0 to 1; scales are stored by descending time anyway."""

    def upwards(module: nn.Module, observation: Any, noise: Any, clock: FlowClock) -> Tensor:
        memory, x = module.llm(observation["x"]), noise
        for i in range(STEPS):
            with clock.step(i, i / STEPS):
                x = x - module.velocity(x, memory) / STEPS
        return x

    quantized = oq.quantize(wrap(Network(), upwards), data)
    times = quantized.tensors()["exp.0.attn.activation_step_times"]
    assert times.tolist() == [0.75, 0.5, 0.25, 0.0]
    assert bool(torch.isfinite(quantized.sample_actions(data[0], start)).all())


def test_steps_that_share_one_flow_time_are_refused(data: list[dict[str, Tensor]]) -> None:
    def frozen(module: nn.Module, observation: Any, noise: Any, clock: FlowClock) -> Tensor:
        for i in range(STEPS):
            with clock.step(i, 0.5):
                noise = module.velocity(noise, module.llm(observation["x"]))
        return noise

    with pytest.raises(PolicyError, match=re.escape("clock.step(i, t)")):
        oq.quantize(wrap(Network(), frozen), data)


def test_another_pattern_is_not_resumed(data: list[dict[str, Tensor]], tmp_path: Path) -> None:
    """Same weights, other sites: the journal's first site would be another linear."""
    oq.quantize(wrap(Network(), backbone=r"llm\.0"), data, "rtn", work_directory=tmp_path)
    with pytest.raises(oq.OmegaError, match="sites: was"):
        oq.quantize(
            wrap(Network(), backbone=r"llm\.2"), data, "rtn", work_directory=tmp_path, resume=True
        )


def test_an_artifact_of_a_module_needs_its_structure(
    data: list[dict[str, Tensor]], policy: Any, tmp_path: Path
) -> None:
    oq.quantize(wrap(Network()), data, "rtn").save_pretrained(tmp_path / "out")
    with pytest.raises(PolicyError, match=r"load\(directory, policy="):
        oq.load(tmp_path / "out")
    with pytest.raises(PolicyError, match="'torch' policy, not 'pi05'"):
        oq.load(tmp_path / "out", policy=policy)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda: wrap(Network(), action_head=None), r"exp\.0\.attn, .* but no linear that"),
        (lambda: wrap(Network(), backbone=r"llm\.2"), r"llm\.0 is quantized in the artifact"),
        (
            lambda: wrap(Network(), action_head=r"exp\..*"),
            r"exp\.0\.unused, .* but not by the artifact's",
        ),
        (
            lambda: wrap(Network(), backbone=r"exp\..\.(attn|mlp)", action_head=r"llm\..*"),
            "in another part",
        ),
        (lambda: wrap(Network(), steps=STEPS + 1), "steps=4, this one has 5"),
        (lambda: wrap(Network(), noise_shape=(1, 24)), r"noise_shape=\[3, 24\], this one has"),
        (lambda: wrap(Network(), step_module="exp.0"), "step_module=None, this one has 'exp.0'"),
        (lambda: wrap(Network().bfloat16()), r"exp\.0\.attn\.bias, .* of another dtype"),
        (lambda: wrap(other_width()), r"'llm\.2': the policy has \(8,\) outputs"),
        (lambda: wrap(with_another_buffer()), r"missing \['more'\]"),
    ],
)
def test_another_module_is_not_loaded_into(
    change: Callable[[], oq.TorchPolicy],
    expected: str,
    data: list[dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    oq.quantize(wrap(Network()), data, "rtn").save_pretrained(tmp_path / "out")
    with pytest.raises((ArtifactError, PolicyError), match=expected):
        oq.load(tmp_path / "out", policy=change())


def other_width() -> nn.Module:
    module = Network()
    module.llm[2] = nn.Linear(24, 8, bias=False)
    return module


def with_another_buffer() -> nn.Module:
    module = Network()
    module.register_buffer("more", torch.zeros(3))
    return module


def test_the_number_of_steps_of_a_module_is_its_own(
    data: list[dict[str, Tensor]], start: Tensor
) -> None:
    policy = wrap(Network())
    assert policy.sample_actions(data[0], start, steps=STEPS).shape == (3, 24)
    with pytest.raises(PolicyError, match="fixed by its sample function"):
        policy.sample_actions(data[0], start, steps=STEPS + 1)


# --- its artifact ---------------------------------------------------------------------------------


def test_the_card_loads_what_it_describes(
    data: list[dict[str, Tensor]],
    start: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantized = oq.quantize(wrap(Network()), data, "rtn")
    quantized.save_pretrained(tmp_path / "this/directory")
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "this/directory/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"module": Network(5), "sample": with_clock, "observation": data[0]}
    exec(code, names)
    again = names["policy"]
    assert torch.equal(
        again.sample_actions(data[0], start), quantized.sample_actions(data[0], start)
    )


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_inspect_and_verify_need_no_module(
    data: list[dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    quantized = oq.quantize(wrap(Network()), data, "svdquant")
    quantized.save_pretrained(out)
    assert command("verify", str(out)) == 0
    assert command("inspect", str(out), "--json", str(tmp_path / "inspect.json")) == 0
    assert "action_head" in capsys.readouterr().out
    report = json.loads((tmp_path / "inspect.json").read_text())
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    expected = quantized.memory_report(directory_bytes=size)
    assert report["components"] == expected["components"] and report["total_bytes"] == size


@pytest.mark.parametrize("name", ["serve", "eval"])
def test_commands_that_need_to_know_observations_say_what_to_do_in_python(
    name: str, data: list[dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oq.quantize(wrap(Network()), data, "rtn").save_pretrained(tmp_path / "out")
    assert command(name, str(tmp_path / "out")) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "load(directory, policy=TorchPolicy(module, ...))" in shown
    assert "sample_actions" in shown


# --- noise ---------------------------------------------------------------------------------------


def test_noise_is_a_tensor_given_or_drawn(data: list[dict[str, Tensor]], start: Tensor) -> None:
    seen: list[Any] = []

    def keep(module: nn.Module, observation: Any, noise: Any, clock: FlowClock) -> Tensor:
        seen.append(noise)
        return with_clock(module, observation, noise, clock)

    policy = wrap(Network(), keep)
    policy.sample_actions(data[0])
    policy.sample_actions(data[0], generator=torch.Generator().manual_seed(3))
    policy.sample_actions(data[0], start.numpy())
    policy.sample_actions(data[0], start)
    assert all(isinstance(noise, Tensor) and noise.shape == (3, 24) for noise in seen)
    assert torch.equal(seen[1], torch.randn(3, 24, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(seen[2], start) and seen[3] is start
    assert not torch.equal(seen[0], seen[1])


def test_noise_that_does_not_fit_is_refused(data: list[dict[str, Tensor]], start: Tensor) -> None:
    policy = wrap(Network())
    with pytest.raises(ObservationError, match=r"noise must have shape \[3, 24\], got \[24\]"):
        policy.sample_actions(data[0], start[0])
    with pytest.raises(ObservationError, match="NaN"):
        policy.sample_actions(data[0], start * torch.nan)


def test_an_observation_may_bring_its_noise(data: list[dict[str, Tensor]], start: Tensor) -> None:
    policy = wrap(Network().eval(), noise_shape=None)
    bringing = {**data[0], "noise": start}
    expected = wrap(Network().eval()).sample_actions(data[0], start)
    assert torch.equal(policy.sample_actions(bringing), expected)
    assert torch.equal(policy.sample_actions(data[0], start.numpy()), expected)


# --- the clock -----------------------------------------------------------------------------------


def entering(steps: list[tuple[int, float]]) -> Sample:
    def sample(module: nn.Module, observation: Any, noise: Any, clock: FlowClock) -> Tensor:
        memory, x = module.llm(observation["x"]), noise
        for i, t in steps:
            with clock.step(i, t):
                x = x - module.velocity(x, memory) / STEPS
        return x

    return sample


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(0, 1.0), (1, 0.5)], r"entered the clock 2 times, with the step numbers \[0, 1\]"),
        ([(i, 1 - i / 5) for i in range(5)], "steps=4, but sample entered the clock 5 times"),
        ([(i + 1, 1 - i / 4) for i in range(4)], r"step numbers \[1, 2, 3, 4\]"),
        ([(0, 1 - i / 4) for i in range(4)], r"step numbers \[0, 0, 0, 0\]"),
        ([(i, 1000.0 - i) for i in range(4)], r"flow times \[1000, 999, .*not all in \[0, 1\]"),
        ([(i, float("nan")) for i in range(4)], "not all in"),
        ([(i, t) for i, t in enumerate((1.0, 0.2, 0.5, 0.1))], "neither rise nor fall"),
        ([(i, 0.5) for i in range(4)], "neither rise nor fall"),
    ],
)
def test_steps_that_cannot_be_meant_are_refused_at_the_first_sample(
    steps: list[tuple[int, float]],
    expected: str,
    data: list[dict[str, Tensor]],
    start: Tensor,
) -> None:
    policy = wrap(Network(), entering(steps))
    with pytest.raises(PolicyError, match=expected):
        policy.sample_actions(data[0], start)
    begun: list[str] = []
    with pytest.raises(PolicyError, match=expected):
        oq.quantize(policy, data, progress=lambda _done, _total, name: begun.append(name))
    assert begun == []


class Loop(Network):
    """Calls its denoising step as LeRobot's policies do: a method, or a module's ``forward``."""

    def sample(self, observation: Any, noise: Tensor) -> Tensor:
        memory, x = self.llm(observation["x"]) + self.offset, noise
        for _ in range(STEPS):
            x = x - self.denoise_step(x, memory) / STEPS
        return x

    def denoise_step(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.exp[1].forward(self.exp[0](x + memory))


def loop(module: Any, observation: Any, noise: Any, clock: FlowClock) -> Tensor:
    del clock
    return module.sample(observation, noise)


def test_a_method_may_be_the_denoising_step(data: list[dict[str, Tensor]], start: Tensor) -> None:
    quantized = oq.quantize(wrap(Loop(), loop, step_module="denoise_step"), data)
    assert len(quantized.tensors()["exp.0.attn.activation_step_times"]) == STEPS
    assert bool(torch.isfinite(quantized.sample_actions(data[0], start)).all())
    assert "denoise_step" not in vars(quantized.policy.module)


def test_a_forward_that_is_called_by_its_name_is_counted(
    data: list[dict[str, Tensor]],
) -> None:
    head = {"action_head": r"exp\.1\.(attn|mlp)", "step_module": "exp.1"}
    quantized = oq.quantize(wrap(Loop(), loop, **head), data)
    assert len(quantized.tensors()["exp.1.attn.activation_step_times"]) == STEPS


def test_a_step_module_that_is_never_called_is_named(
    data: list[dict[str, Tensor]], start: Tensor
) -> None:
    policy = wrap(Loop(), loop, step_module="read_out")
    with pytest.raises(PolicyError, match=r"'read_out' was never called .*clock\.step\(i, t\)"):
        policy.sample_actions(data[0], start)
