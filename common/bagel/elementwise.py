"""Between the decoder's matrix products: normalisation and rotary embedding, each with a backward of its own.

Both are bound by memory, and autograd's chain of small operations goes through the activations about twice as often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.bagel.config import LLMConfig


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return _Normalise.apply(x, self.weight, self.eps)
        # One kernel on a GPU, forward and backward.
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class _Normalise(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + eps)^-1/2, in fp32 or better.

    dx = r (dy w) - x r^3 mean(dy w x), dw = the sum of dy x r over all rows; both sums are products with a vector.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        dtype, size = x.dtype, x.shape[-1]
        x, dy = x.to(r.dtype), dy.to(r.dtype)
        product = (dy * x).view(-1, size)
        dw = (r.view(1, -1) @ product)[0].to(weight.dtype) if ctx.needs_input_grad[1] else None
        along = (product @ weight.to(r.dtype)).view(r.shape)
        dx = (dy * weight).mul_(r).addcmul_(x, along.mul_(r**3), value=-1 / size)
        return dx.to(dtype), dw, None


@dataclass(frozen=True)
class Rope:
    """Rotary embedding at given positions, rotate-half convention: cos and sin [..., 1, D], the first half of sin
    negative."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, config: LLMConfig, dtype: torch.dtype) -> Rope:
        """positions [...] integers."""
        half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
        angle = (positions.float()[..., None] * (1.0 / config.rope_theta**half))[..., None, :]
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return cls(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., heads, D] -> the same, rotated."""
        return _Rotate.apply(x, self.cos, self.sin)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)
