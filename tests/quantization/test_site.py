"""One site: fused linears to integers, scales and transform."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omega_qvla.calibration.capture import SiteStatistics
from omega_qvla.errors import NonFiniteError, PolicyError
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.base import QuantizationSite
from omega_qvla.quantization.activations import per_token_scale, round_activations
from omega_qvla.quantization.simulation import SimulatedLinear, install
from omega_qvla.quantization.site import (
    QuantizedSite,
    needs_statistics,
    quantize_site,
    transform_rows,
)
from omega_qvla.recipe import Recipe, Scheme
from omega_qvla.runtime.linear import QuantizedLinear

WIDTH = 80  # one whole block of 64 and a part
ONCE = QuantizationSite("layer.kv", ("layer.k", "layer.v"), "backbone")
STEPPED = QuantizationSite("layer.kv", ("layer.k", "layer.v"), "action_head", per_step=True)
TIMES = (1.0, 0.75, 0.5, 0.25)


def scheme(name: str = "omega-w4a4-static", part: str = "backbone") -> Scheme:
    found = Recipe.load(name).scheme(part)
    assert found is not None
    return found


def linears(*, bias: tuple[bool, bool] = (False, False)) -> list[nn.Linear]:
    pair = [nn.Linear(WIDTH, rows, bias=b) for rows, b in zip((24, 8), bias, strict=True)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in pair:
            for parameter in linear.parameters():
                parameter.normal_(generator=generator)
    return pair


def inputs(count: int = 300, seed: int = 1) -> Tensor:
    """Correlated rows with one loud channel."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) / WIDTH**0.5
    rows = torch.randn(count, WIDTH, generator=generator) @ (mix + torch.eye(WIDTH))
    rows[:, 3] *= 30
    return rows


def measured(site: QuantizationSite = ONCE, times: tuple[float, ...] = TIMES) -> SiteStatistics:
    statistics, clock = SiteStatistics(site, WIDTH, torch.Generator().manual_seed(0)), FlowClock()
    for step, time in enumerate(times):
        with clock.step(step, time):
            statistics.update(inputs(seed=step) * (1 + step), clock, 0)
    return statistics


def exact(pair: list[nn.Linear], x: Tensor) -> Tensor:
    return torch.cat([linear(x) for linear in pair], dim=-1).detach()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


def test_fused_linears_share_one_transform_and_keep_their_order() -> None:
    pair = linears(bias=(True, True))
    found = quantize_site(ONCE, pair, scheme(), measured())
    assert found.splits == (24, 8) and found.in_features == WIDTH
    assert found.weight.integers.shape == (32, 128) and found.weight.integers.dtype == torch.int8
    assert found.bias is not None and torch.equal(found.bias[24:], pair[1].bias.detach())
    assert found.transform is not None and found.transform.matrix.shape == (2, 64, 64)
    assert torch.equal(found.transform.matrix.bfloat16().float(), found.transform.matrix)
    assert found.proxy_loss is not None and 0 < found.proxy_loss < 0.05


def test_a_missing_bias_of_one_of_them_is_zero_and_of_all_is_none() -> None:
    half = quantize_site(ONCE, linears(bias=(True, False)), scheme("rtn"), None)
    assert half.bias is not None and bool((half.bias[24:] == 0).all())
    assert quantize_site(ONCE, linears(), scheme("rtn"), None).bias is None


@pytest.mark.parametrize("name", ["omega-w4a4-static", "rtn"])
def test_integers_and_simulation_compute_the_same(name: str) -> None:
    """Up to float32 summation order, apart from ties that fall on the other side: 1e-4 of energy.

    The folded weight and transformed input are the same numbers on both ways.
    """
    pair, clock = linears(bias=(True, True)), FlowClock()
    site = quantize_site(ONCE, pair, scheme(name), measured())
    x = inputs(seed=5)
    integers = QuantizedLinear.from_site(site, clock)(x)
    assert error(integers, SimulatedLinear(site, clock)(x)) < 1e-4
    assert error(integers, exact(pair, x)) < {"omega-w4a4-static": 0.05, "rtn": 0.5}[name]


def test_the_method_beats_rounding_to_nearest_on_an_outlier_channel() -> None:
    pair, clock, x = linears(), FlowClock(), inputs(seed=5)
    ours, naive = (
        error(
            QuantizedLinear.from_site(quantize_site(ONCE, pair, scheme(name), measured()), clock)(
                x
            ),
            exact(pair, x),
        )
        for name in ("omega-w4a4-static", "rtn")
    )
    assert ours < 0.5 * naive


def test_a_low_rank_branch_is_added_in_integers_and_in_simulation() -> None:
    """With all 32 directions in 16 bits nothing is left for the integers but bfloat16's rest."""
    pair, clock, x = linears(bias=(True, True)), FlowClock(), inputs(seed=5)
    errors = {}
    for rank in (4, 32):
        content = {"transform": {"smoothing": 0.5}, "weights": {"low_rank": rank}}
        site = quantize_site(ONCE, pair, Scheme.model_validate(content), measured())
        assert site.low_rank is not None and site.low_rank.down.shape == (rank, WIDTH)
        integers = QuantizedLinear.from_site(site, clock)(x)
        assert error(integers, SimulatedLinear(site, clock)(x)) < 1e-4
        errors[rank] = error(integers, exact(pair, x))
    assert errors[32] < 1e-4 < errors[4] < 0.05
    without = quantize_site(
        ONCE, pair, Scheme.model_validate({"transform": {"smoothing": 0.5}}), measured()
    )
    assert errors[4] < error(QuantizedLinear.from_site(without, clock)(x), exact(pair, x))


@pytest.mark.parametrize(("loud", "expected"), [(False, "per_step"), (True, "per_token")])
def test_the_better_of_two_activation_scales_is_chosen(loud: bool, expected: str) -> None:
    """Alike tokens share a static scale well; where one in forty is 50 times larger, none fits."""
    statistics, clock = (
        SiteStatistics(STEPPED, WIDTH, torch.Generator().manual_seed(0)),
        FlowClock(),
    )
    generator = torch.Generator().manual_seed(1)
    for step, time in enumerate(TIMES):
        rows = torch.randn(400, WIDTH, generator=generator)
        if loud:
            rows[::40] *= 50
        with clock.step(step, time):
            statistics.update(rows, clock, 0)
    content = {"activations": {"scale": "per_step_or_token"}}
    site = quantize_site(STEPPED, linears(), Scheme.model_validate(content), statistics)
    assert site.activations.scale == expected
    assert (site.activation_scale is None) is (expected == "per_token")


def test_a_clipped_dynamic_scale_is_the_same_in_integers_and_in_simulation() -> None:
    pair, clock, x = linears(bias=(True, True)), FlowClock(), inputs(seed=5)
    found = {}
    for clip in (1.0, 0.85):
        content = {"transform": {"smoothing": 0.65}, "activations": {"clip": clip}}
        site = quantize_site(ONCE, pair, Scheme.model_validate(content), measured())
        integers = QuantizedLinear.from_site(site, clock)
        found[clip] = integers(x)
        assert error(found[clip], SimulatedLinear(site, clock)(x)) < 1e-4
        _, scale = integers.quantize_input(x)
        found[clip, "scale"] = scale
    torch.testing.assert_close(found[0.85, "scale"], 0.85 * found[1.0, "scale"])
    # Of 128 rotated channels the largest lies near 2.7 σ, where four bits would best end at 2.3 σ.
    assert error(found[0.85], exact(pair, x)) < error(found[1.0], exact(pair, x))


SUBTRACTED: dict[str, Any] = {
    "transform": {"smoothing": 0.65},
    "activations": {"clip": "search", "subtract_mean": True},
}


def shifted(seed: int, step: int, rows: int = 300) -> Tensor:
    """Inputs whose mean is four times as large as what varies, and another one in every step."""
    mean = torch.randn(WIDTH, generator=torch.Generator().manual_seed(50 + step))
    return 0.25 * inputs(rows, seed) + 4 * mean


def measured_shifted(site: QuantizationSite) -> SiteStatistics:
    statistics, clock = SiteStatistics(site, WIDTH, torch.Generator().manual_seed(0)), FlowClock()
    for step, time in enumerate(TIMES):
        with clock.step(step, time):
            statistics.update(shifted(step, step if site.per_step else 0), clock, 0)
    return statistics


@pytest.mark.parametrize("site", [ONCE, STEPPED], ids=["once", "stepped"])
@pytest.mark.parametrize("kernel", ["reference", None])
def test_centred_inputs_leave_the_range_to_what_varies(
    site: QuantizationSite, kernel: str | None
) -> None:
    """Integers and simulation agree; the error is a fraction of that without centring."""
    pair, clock = linears(bias=(True, False)), FlowClock()
    found = {}
    for subtract_mean in (False, True):
        content = {
            **SUBTRACTED,
            "activations": {**SUBTRACTED["activations"], "subtract_mean": subtract_mean},
        }
        quantized = quantize_site(
            site, pair, Scheme.model_validate(content), measured_shifted(site)
        )
        integer = QuantizedLinear.from_site(quantized, clock, kernel=kernel)
        simulated = SimulatedLinear(quantized, clock)
        errors = []
        for step, time in enumerate(TIMES):
            x = shifted(100 + step, step if site.per_step else 0)
            with clock.step(step, time):
                assert error(integer(x), simulated(x)) < 1e-4
                errors.append(error(integer(x), exact(pair, x)))
        found[subtract_mean] = sum(errors)
    assert found[True] < 0.3 * found[False]


def test_the_mean_itself_is_exact_at_calibrated_times_and_between_them() -> None:
    """Offset and bias are interpolated together: o(t) W' + b, whatever the integers are."""
    pair, clock = linears(bias=(True, True)), FlowClock()
    site = quantize_site(
        STEPPED, pair, Scheme.model_validate(SUBTRACTED), measured_shifted(STEPPED)
    )
    assert site.offset is not None and site.offset.shape == (4, 128)
    assert site.bias is not None and site.bias.shape == (4, 32)
    assert torch.equal(site.offset, site.offset.bfloat16().float())
    integer = QuantizedLinear.from_site(site, clock)
    means = torch.stack([shifted(step, step).mean(dim=0) for step in range(4)])
    for time, mean in ((1.0, means[0]), (0.5, means[2]), (0.625, (means[1] + means[2]) / 2)):
        with clock.step(0, time):
            found = integer(mean.unsqueeze(0))
        assert error(found, exact(pair, mean.unsqueeze(0))) < 1e-5


def test_a_searched_clip_is_the_best_of_all() -> None:
    found = quantize_site(ONCE, linears(), Scheme.model_validate(SUBTRACTED), measured())
    clip = found.activations.share
    assert 0.5 < clip < 1.0
    rows = transform_rows(centred(measured()), found.transform)
    losses: dict[float, float] = {}
    for share in (clip, clip - 0.1, clip - 0.01, clip + 0.01, 1.0):
        scale = per_token_scale(rows, 4, share)
        losses[share] = error(round_activations(rows, scale, 4) * scale, rows)
    assert min(losses, key=losses.__getitem__) == clip


def centred(statistics: SiteStatistics) -> Tensor:
    statistics.centre()
    return torch.cat([statistics.rows(step) for step in statistics.steps])


def test_centred_statistics_are_those_of_centred_inputs() -> None:
    """Oracle: the moment of inputs from which each step's mean was taken by hand."""
    statistics = measured(STEPPED)
    means = statistics.centre()
    rows = [inputs(seed=step) * (1 + step) for step in range(4)]
    for step, part in enumerate(rows):
        torch.testing.assert_close(means[step], part.mean(dim=0), rtol=1e-4, atol=1e-4)
    around = torch.cat([part - part.mean(dim=0) for part in rows]).double()
    torch.testing.assert_close(
        statistics.take_moment(), around.t() @ around / len(around), rtol=1e-4, atol=1e-4
    )


def test_static_scales_grow_with_the_activations_and_carry_their_times() -> None:
    site = quantize_site(STEPPED, linears(), scheme(part="action_head"), measured(STEPPED))
    assert site.activation_scale is not None and site.activation_times is not None
    assert site.activation_times.tolist() == list(TIMES)
    assert bool((site.activation_scale.diff() > 0).all())


def test_steps_are_stored_by_descending_time_in_whatever_order_they_ran() -> None:
    forth = quantize_site(STEPPED, linears(), scheme(part="action_head"), measured(STEPPED))
    upwards = measured(STEPPED, times=TIMES[::-1])
    back = quantize_site(STEPPED, linears(), scheme(part="action_head"), upwards)
    assert forth.activation_times is not None and back.activation_times is not None
    assert torch.equal(back.activation_times, forth.activation_times)
    assert back.activation_scale is not None and bool((back.activation_scale.diff() < 0).all())


def test_steps_with_one_time_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"steps 0 and 1 have the same flow time 1\.0"):
        quantize_site(STEPPED, linears(), scheme(part="action_head"), measured(STEPPED, (1.0, 1.0)))


def test_the_papers_head_has_a_scale_per_channel_and_step() -> None:
    pair, clock = linears(bias=(True, True)), FlowClock()
    site = quantize_site(STEPPED, pair, scheme("omega-paper", "action_head"), measured(STEPPED))
    assert site.activation_scale is not None and site.activation_scale.shape == (4, 128)
    assert site.output_rotation is not None
    simulated = SimulatedLinear(site, clock)
    with clock.step(0, 1.0):
        assert error(simulated(inputs(seed=0)), exact(pair, inputs(seed=0))) < 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_bad_number_is_named(bad: float, kind: str) -> None:
    pair = linears(bias=(True, True))
    getattr(pair[1], kind).data.view(-1)[5] = bad
    with pytest.raises(NonFiniteError, match=f"{kind} of 'layer.v'"):
        quantize_site(ONCE, pair, scheme("rtn"), None)


@pytest.mark.parametrize(
    ("content", "needed"),
    [
        ({"transform": {"rotation": "none"}, "weights": {"rounding": "nearest"}}, False),
        ({"weights": {"rounding": "nearest"}}, False),
        ({"transform": {"smoothing": 0.5}, "weights": {"rounding": "nearest"}}, True),
        ({"transform": {"permutation": "snake"}, "weights": {"rounding": "nearest"}}, True),
        ({"weights": {"rounding": "gptq"}}, True),
        ({"weights": {"rounding": "nearest"}, "activations": {"scale": "per_step"}}, True),
    ],
)
def test_statistics_are_asked_for_only_when_used(content: dict[str, Any], needed: bool) -> None:
    chosen = Scheme.model_validate(content)
    assert needs_statistics(chosen) is needed
    if not needed:
        assert isinstance(quantize_site(ONCE, linears(), chosen, None), QuantizedSite)


def test_inputs_that_are_always_zero_do_not_break_anything() -> None:
    """A dead site: no energy to measure, smoothing with or scale by."""
    statistics, clock = SiteStatistics(STEPPED, WIDTH, torch.Generator()), FlowClock()
    with clock.step(0, 1.0):
        statistics.update(torch.zeros(5, WIDTH), clock, 0)
    site = quantize_site(STEPPED, linears(), scheme(part="action_head"), statistics)
    assert site.activation_scale is not None and site.activation_scale.tolist() == [1.0]
    assert site.proxy_loss == 0.0
    found = QuantizedLinear.from_site(site, clock)(torch.zeros(2, WIDTH))
    assert bool((found == 0).all())


def test_installing_puts_one_module_in_the_place_of_all() -> None:
    module = nn.Module()
    module.layer = nn.Module()
    module.layer.k, module.layer.v = linears()
    replacement = nn.Identity()
    install(module, ONCE.linears, replacement)
    assert module.layer.k is replacement and module.layer.v is None
