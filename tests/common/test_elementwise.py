"""The backward passes written by hand, against autograd through the definitions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from common.bagel.config import LLMConfig
from common.bagel.elementwise import RMSNorm, Rope
from deploy.bench.measure import MIDDLE

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.sampled_from([2, 8, 30]))


def _norm(width: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(width, 1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    return norm


def _gradients(out: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((out.double() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), inputs)


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, scale=st.sampled_from([1e-4, 1.0, 1e3]), seed=st.integers(0, 2**31))
def test_rms_norm_and_its_gradients_are_those_of_the_definition(
    shape: tuple[int, ...], scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x, norm = (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_(), _norm(shape[-1], torch.float64)
    defined = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), defined)
    torch.testing.assert_close(_gradients(norm(x), x, norm.weight), _gradients(defined, x, norm.weight))


@pytest.mark.parametrize("zero", [True, False])
def test_rms_norm_in_bf16_is_torchs_own_within_a_rounding(zero: bool) -> None:
    torch.manual_seed(0)
    x, norm = torch.randn(7, 64, dtype=torch.bfloat16).requires_grad_(), _norm(64, torch.bfloat16)
    with torch.no_grad():
        x[3] *= 0.0 if zero else 1e-3
    theirs = F.rms_norm(x, (64,), norm.weight, norm.eps)
    torch.testing.assert_close(norm(x), theirs, rtol=2**-7, atol=0)
    torch.testing.assert_close(_gradients(norm(x), x), _gradients(theirs, x), rtol=2**-5, atol=2**-6)


def test_a_frozen_norm_gets_no_gradient_and_passes_the_same_one_on() -> None:
    torch.manual_seed(0)
    x, norm = torch.randn(3, 8).requires_grad_(), _norm(8, torch.float32)
    trained = _gradients(norm(x), x)
    norm.weight.requires_grad_(False)
    torch.testing.assert_close(_gradients(norm(x), x), trained, rtol=0, atol=0)
    assert norm.weight.grad is None


@settings(max_examples=25, deadline=None)
@given(
    positions=st.lists(st.integers(0, 5000), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_rope_turns_pairs_by_their_angle_and_its_gradient_turns_back(
    positions: list[int], heads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    config = LLMConfig.model_validate(MIDDLE)
    half = config.head_dim // 2
    rope = Rope.at(torch.tensor(positions), config, torch.float64)
    x = torch.randn(len(positions), heads, config.head_dim, dtype=torch.float64, requires_grad=True)
    frequency = config.rope_theta ** (-torch.arange(half) / half)
    angle = (torch.tensor(positions)[:, None] * frequency).double()[:, None]
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    defined = torch.cat([turned.real, turned.imag], -1)
    # The angles are fp32 and as large as the position.
    tolerance = {"rtol": 0, "atol": 1e-6 * (1 + max(positions))}
    torch.testing.assert_close(rope(x), defined, **tolerance)
    torch.testing.assert_close(_gradients(rope(x), x), _gradients(defined, x), **tolerance)
    torch.testing.assert_close(rope(x).norm(dim=-1), x.norm(dim=-1))
