"""Schedule, SDE step, log-probabilities, ratios and window against numbers of flow_grpo and GRPO-Guard."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from golden_numbers import close, golden, named, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from common import flow
from common.window import sample_window, sliding_window

STEPS = "flowgrpo/sde_steps.npz"
LEVELS = named(STEPS, "sde_([0-9.]+)_mean")


def steps() -> dict[str, torch.Tensor]:
    return tensors(STEPS)


def times(s: dict[str, torch.Tensor], step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """t and t_next of a recorded step, for each sample of its batch."""
    t, t_next = s["sigmas"][step : step + 2]
    return t.expand(s["x"].shape[1]), t_next.expand(s["x"].shape[1])


def scales(s: dict[str, torch.Tensor], level: str) -> torch.Tensor:
    """Deviation of each recorded SDE step [steps, batch]."""
    std = s[f"sde_{level}_std"] * s[f"sde_{level}_sqrt_dt"]
    return std[:, None].expand(s["x"].shape[:2])


@pytest.mark.parametrize(("file", "name"), [("flowgrpo/sde_steps.npz", "sigmas"), ("bagel/ode.npz", "timesteps")])
def test_schedule(file: str, name: str) -> None:
    wanted = golden(file)[name]
    found = flow.timesteps(len(wanted), 3.0)
    assert len(found) == len(wanted), "N points are N - 1 steps"
    close(np.array(found), wanted, atol=1e-6, rtol=0)


def test_number_of_steps() -> None:
    times = flow.timesteps(25, 3.0)
    assert len(times) - 1 == 24
    assert sum(b - a for a, b in pairwise(times)) == pytest.approx(-1)
    assert flow.timesteps(2, 3.0) == [1.0, 0.0]
    with pytest.raises(ValueError, match="points is 1; a schedule needs at least 2"):
        flow.timesteps(1, 3.0)


@given(points=st.integers(2, 200), shift=st.floats(0.05, 20))
@settings(max_examples=60)
def test_schedule_runs_from_exactly_one_to_exactly_zero(points: int, shift: float) -> None:
    """A first time just below 1 would make the first step's noise explode."""
    times = flow.timesteps(points, shift)
    assert times[0] == 1.0
    assert times[-1] == 0.0
    assert all(a > b for a, b in pairwise(times))


@pytest.mark.parametrize("level", LEVELS)
def test_mean_std_and_sample_of_every_step(level: str) -> None:
    s = steps()
    move = flow.sde_step(s["sigmas"][:-1], s["sigmas"][1:], float(level))
    close(move.std, s[f"sde_{level}_std"] * s[f"sde_{level}_sqrt_dt"])
    for step in range(len(s["x"])):
        one = flow.sde_step(*times(s, step), float(level))
        mean = flow.mean_of(one, s["x"][step], s["v"][step])
        close(mean, s[f"sde_{level}_mean"][step])
        close(mean + one.std[:, None, None] * s["noise"][step], s[f"sde_{level}_prev"][step])
        close(flow.mean_of(one, s["x"][step], s["v_new"][step]), s[f"sde_{level}_new_mean"][step])


def log_probs(level: str, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the recorded samples under the recorded means, and std, each [steps, batch]."""
    s = steps()
    std, samples, means = scales(s, level), s[f"sde_{level}_prev"], s[f"sde_{level}_{which}"]
    return torch.stack([flow.step_log_prob(samples[i], means[i], std[i]) for i in range(len(std))]), std


@pytest.mark.parametrize("level", LEVELS)
def test_log_probs_of_every_step(level: str) -> None:
    s = steps()
    close(log_probs(level, "mean")[0], s[f"sde_{level}_logp"])
    found, std = log_probs(level, "new_mean")
    close(found, s[f"sde_{level}_new_logp"])
    # flow_grpo's BAGEL path records the quadratic term alone.
    old, _ = log_probs(level, "mean")
    constants = std[:, 0].log() + 0.5 * np.log(2 * np.pi)
    close(old[:, 0] + constants, s[f"sde_{level}_bagel_logp"])


def test_log_prob_is_the_gaussian_density_averaged_over_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    x, mean = torch.randn(2, 3, 5, 7, generator=generator)
    std = torch.tensor([0.3, 1.0, 2.5])
    wanted = torch.distributions.Normal(mean, std[:, None, None]).log_prob(x).mean((1, 2))
    close(flow.step_log_prob(x, mean, std), wanted, atol=1e-5)


def test_no_noise_is_the_euler_step() -> None:
    s = steps()
    for step in map(int, named(STEPS, r"ode(\d+)_prev")):
        move = flow.euler_step(*times(s, step))
        close(flow.mean_of(move, s["x"][step], s["v"][step]), s[f"ode{step}_prev"])
    for sampler in flow.SAMPLERS.values():
        every = sampler.step(s["sigmas"][:-1], s["sigmas"][1:], 0.0)
        assert every.std.tolist() == [0.0] * len(every.std)
        close(every.keep, torch.ones_like(every.keep), atol=1e-7, rtol=0)
        close(every.drive, s["sigmas"].diff(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_flow_cps_of_every_step(level: str) -> None:
    """The last step, to t = 0, has no noise left."""
    s, cps = steps(), flow.SAMPLERS["flow_cps"]
    move = cps.step(s["sigmas"][:-1], s["sigmas"][1:], float(level))
    close(move.std, s[f"cps_{level}_std"])
    for step in range(len(s["x"])):
        one = cps.step(*times(s, step), float(level))
        mean, new = (flow.mean_of(one, s["x"][step], s[v][step]) for v in ("v", "v_new"))
        sample = s[f"cps_{level}_prev"][step]
        close(mean, s[f"cps_{level}_mean"][step])
        close(mean + one.std[:, None, None] * s["noise"][step], sample)
        close(new, s[f"cps_{level}_new_mean"][step])
        found = flow.cps_log_prob(sample, s[f"cps_{level}_mean"][step], one.std)
        close(found, s[f"cps_{level}_logp"][step])
        close(found[0], s[f"cps_{level}_bagel_logp"][step])
        close(flow.cps_log_prob(sample, s[f"cps_{level}_new_mean"][step], one.std), s[f"cps_{level}_new_logp"][step])
    close((-s["sigmas"].diff()).sqrt(), s[f"cps_{level}_sqrt_dt"])


def test_dance_is_an_sde_of_constant_noise() -> None:
    """Its authors' form: mu = x + v dt - (eta^2 / 2) score dt with score = -(x - (1 - t) x_0) / t^2."""
    s, eta = {name: array.double() for name, array in steps().items()}, 0.3
    for step in range(len(s["x"])):
        x, v, (t, t_next) = s["x"][step], s["v"][step], times(s, step)
        move = flow.SAMPLERS["dance"].step(t, t_next, eta)
        close(move.std, eta * (t - t_next).sqrt(), atol=1e-7)
        t, dt = t[:, None, None], (t_next - t)[:, None, None]
        score = -(x - (1 - t) * (x - t * v)) / t**2
        close(flow.mean_of(move, x, v), x + v * dt - eta**2 / 2 * score * dt)


@given(
    name=st.sampled_from(sorted(flow.SAMPLERS)),
    t=st.floats(0.05, 0.99),
    part=st.floats(0.05, 0.95),
    level=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150)
def test_the_closed_form_of_ratio_norm_holds_for_every_sampler(
    name: str, t: float, part: float, level: float, seed: int
) -> None:
    """With x' = mu_old + s z: s (log r + ||dmu||^2 / (2 s^2)) = -mean(z (mu_old - mu)); both are 0 at equality."""
    now, later = torch.tensor([t], dtype=torch.float64), torch.tensor([t * part], dtype=torch.float64)
    move = flow.SAMPLERS[name].step(now, later, level)
    move = flow.StepCoefficients(move.keep.double(), move.drive.double(), move.std.double())
    x, old, new, z = torch.randn(4, 1, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mean_old, mean = flow.mean_of(move, x, old), flow.mean_of(move, x, new)
    sample, scale = mean_old + move.std * z, move.std
    bias = flow.gaussian_kl(new, old, move)
    close(bias, ((mean_old - mean) ** 2).mean((1, 2)) / (2 * scale**2), atol=1e-9, rtol=1e-6)
    found = flow.ratio_norm_log(sample, mean_old, mean, scale)
    close(found, -(z * (mean_old - mean)).mean((1, 2)), atol=1e-9, rtol=1e-6)
    close(
        found,
        scale * (flow.plain_log_ratio(sample, mean_old, mean, flow.step_precision(scale)) + bias),
        atol=1e-9,
        rtol=1e-6,
    )
    assert flow.ratio_norm_log(sample, mean_old, mean_old, scale).tolist() == [0.0]
    assert flow.gaussian_kl(old, old, move).tolist() == [0.0]


@pytest.mark.parametrize("level", LEVELS)
def test_ratio_norm_equals_its_closed_form_and_the_recorded_ratio(level: str) -> None:
    s, guard = steps(), golden("flowgrpo/guard.npz")
    std = scales(s, level)
    sample, old, new = (s[f"sde_{level}_{part}"] for part in ("prev", "mean", "new_mean"))
    found = torch.stack([flow.ratio_norm_log(sample[i], old[i], new[i], std[i]) for i in range(len(std))])
    close(found, guard[f"identity_{level}_log_ratio"], atol=1e-8, rtol=1e-3)
    # The recorded ratio went through log-probs of size 1 to 5, and has their rounding.
    close(found.exp(), guard[f"rationorm_{level}_bs1_ratio"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_ratio_norm_is_the_plain_ratio_without_bias_times_std(level: str) -> None:
    """s (log r + ||mu_old - mu||^2 / (2 s^2)), in fp64 through the definition."""
    s = {name: array.double() for name, array in steps().items()}
    new, old, sample = (s[f"sde_{level}_{part}"] for part in ("new_mean", "mean", "prev"))
    for i, scale in enumerate(scales(s, level)):
        plain = flow.plain_log_ratio(sample[i], old[i], new[i], flow.step_precision(scale))
        bias = ((old[i] - new[i]) ** 2).mean((1, 2)) / (2 * scale**2)
        close(flow.ratio_norm_log(sample[i], old[i], new[i], scale), scale * (plain + bias), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("level", LEVELS)
def test_plain_ratio(level: str) -> None:
    s, guard = steps(), golden("flowgrpo/guard.npz")
    for i, std in enumerate(scales(s, level)):
        log_ratio = flow.plain_log_ratio(
            *(s[f"sde_{level}_{part}"][i] for part in ("prev", "mean", "new_mean")), flow.step_precision(std)
        )
        close(log_ratio.exp(), guard[f"plain_{level}_bs1_ratio"][i], atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("name", flow.SAMPLERS)
def test_plain_ratio_is_the_difference_of_log_probs_and_keeps_what_fp32_log_probs_lose(name: str) -> None:
    """At the paper's latent size, a policy one small step on: the log ratio is of the order of the clip, 1e-6."""
    generator = torch.Generator().manual_seed(0)
    sampler = flow.SAMPLERS[name]
    move = sampler.step(torch.tensor([0.9]), torch.tensor([0.85]), 0.8)
    x, v, step, z = torch.randn(4, 1, 4096, 64, generator=generator)
    mean, mean_old = flow.mean_of(move, x, v + 1e-3 * step), flow.mean_of(move, x, v)
    x_next = mean_old + move.std * z
    log_prob = flow.cps_log_prob if name == "flow_cps" else flow.step_log_prob
    exact = [log_prob(x_next.double(), m.double(), move.std.double()) for m in (mean, mean_old)]
    found = flow.plain_log_ratio(x_next, mean_old, mean, sampler.precision(move.std))
    assert 0 < found.abs() < 1e-5
    close(found.double(), exact[0] - exact[1], atol=1e-10, rtol=1e-3)


@pytest.mark.parametrize("level", LEVELS)
def test_ratios_of_equal_policies_are_exactly_one(level: str) -> None:
    s = steps()
    for i, std in enumerate(scales(s, level)):
        mean, sample = s[f"sde_{level}_mean"][i], s[f"sde_{level}_prev"][i]
        assert (flow.ratio_norm_log(sample, mean, mean, std).exp() == 1).all()
        assert (flow.plain_log_ratio(sample, mean, mean, flow.step_precision(std)).exp() == 1).all()


def test_image_clip_scales_with_the_latent_size() -> None:
    assert flow.image_clip("scaled", 64 * 64 * 64) == 1e-6
    assert flow.image_clip("scaled", 262_144 // 100 * 25) == pytest.approx(2e-6, rel=1e-4)
    assert flow.image_clip("scaled", 4 * 4 * 16) == pytest.approx(3.2e-5)
    assert flow.image_clip(3e-4, 4 * 4 * 16) == 3e-4


@pytest.mark.parametrize(("setting", "size"), [(1e-7, 512), ("scaled", 10**8)])
def test_a_clip_below_the_resolution_of_fp32_is_refused(setting: float | str, size: int) -> None:
    with pytest.raises(ValueError, match=rf"image_clip is {setting}.* latent of {size} numbers .* give a larger one"):
        flow.image_clip(setting, size)


@given(seed=st.integers(0, 2**63), size=st.integers(1, 6), low=st.integers(0, 6), room=st.integers(0, 6))
@settings(max_examples=200)
def test_window_lies_in_its_range(seed: int, size: int, low: int, room: int) -> None:
    high = low + size + room
    first, length = sample_window(seed, size, (low, high), steps=high)
    assert length == size
    assert low <= first <= high - size
    assert (first, length) == sample_window(seed, size, (low, high), steps=high)


def test_both_ends_of_the_window_are_reached_equally_often() -> None:
    """The paper: three steps within [0, 5] start at 0, 1 or 2."""
    firsts = [sample_window(seed, 3, (0, 5), 24)[0] for seed in range(3000)]
    counts = np.bincount(firsts)
    assert len(counts) == 3
    assert counts.min() > 900


def test_a_window_beyond_the_schedule() -> None:
    with pytest.raises(ValueError, match=r"SDE window 2\.\.5 lies outside the 4 steps"):
        sample_window(0, 3, (2, 5), 4)


@given(size=st.integers(1, 6), low=st.integers(0, 6), room=st.integers(0, 6), moves=st.integers(0, 30))
@settings(max_examples=100)
def test_a_sliding_window_moves_through_its_range_and_stays(size: int, low: int, room: int, moves: int) -> None:
    span = (low, low + size + room)
    assert sliding_window(0, size, span) == (low, size)
    assert sliding_window(moves, size, span) == (low + min(moves, room), size)
