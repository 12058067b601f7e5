"""Unbranched denoising: one forward per step, SDE noise inside each chain's window. Evaluation may be guided."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import flow
from common.policy import Guidance, OpenPolicy
from common.types import ImageSegment


class Denoiser:
    """Draws images for contexts of different lengths in one batch."""

    def __init__(
        self,
        opened: OpenPolicy,
        height: int,
        width: int,
        shift: float,
        noise_level: float,
        sampler: str = "flow_sde",
    ) -> None:
        self.opened, self.policy = opened, opened.policy
        self.grid = opened.grid(height, width)
        self.shift, self.noise_level, self.sampler = shift, noise_level, flow.SAMPLERS[sampler]
        # What decoding needs is read and imported here, not in the middle of the first chains.
        opened.decode(
            torch.zeros(1, self.grid[0] * self.grid[1], opened.token_dim, device=self.policy.device), self.grid
        )

    @torch.no_grad()
    def draw(
        self,
        contexts: list[list[int]],
        seeds: list[int],
        windows: list[tuple[int, int] | None],
        points: int,
        guidance: Guidance | None = None,
        starts: list[int | None] | None = None,
        version: int = 0,
    ) -> list[ImageSegment]:
        """One image per context. seeds: the chain's own noise; windows: (first step, steps) of SDE or None; starts:
        seed of the initial noise where it is not the chain's own; version: of the weights."""
        device, count = self.policy.device, len(contexts)
        size = max((window[1] for window in windows if window), default=0)
        noise = self._noise(seeds, size).to(device)
        for row, start in enumerate(starts or ()):
            if start is not None:
                noise[row, 0] = self._noise([start], 0)[0, 0]
        first = torch.tensor([window[0] if window else points for window in windows], device=device)
        length = torch.tensor([window[1] if window else 0 for window in windows], device=device)
        times = torch.tensor(flow.timesteps(points, self.shift), device=device)
        velocity = self.opened.velocities(contexts, self.grid, guidance)
        x = noise[:, 0]
        kept = torch.zeros(3, count, size, *x.shape[1:], device=device)
        for step in range(points - 1):
            t, t_next = times[step].expand(count), times[step + 1].expand(count)
            v = velocity(x, t.float())
            place = step - first
            inside = (place >= 0) & (place < length)
            x_next = flow.mean_of(flow.euler_step(t, t_next), x, v)
            if inside.any():
                rows, slot = inside.nonzero()[:, 0], place[inside]
                move = self.sampler.step(t[rows], t_next[rows], self.noise_level)
                z = noise[rows, slot + 1]
                x_next[rows] = flow.mean_of(move, x[rows], v[rows]) + move.std[:, None, None] * z
                kept[:, rows, slot] = torch.stack([x[rows], x_next[rows], v[rows]])
            x = x_next
        pixels = self.opened.decode(x, self.grid).cpu().numpy()
        schedule = times.float().cpu().numpy()
        return [self._segment(kept[:, i].cpu(), windows[i], schedule, pixels[i], version) for i in range(count)]

    def _noise(self, seeds: list[int], size: int) -> Tensor:
        """[M, 1 + size, N, D]: the start and one draw per window step, from each chain's own generator."""
        shape = (1 + size, self.grid[0] * self.grid[1], self.opened.token_dim)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def _segment(
        self,
        kept: Tensor,
        window: tuple[int, int] | None,
        times: NDArray[np.float32],
        pixels: NDArray[np.uint8],
        version: int,
    ) -> ImageSegment:
        first, length = window or (0, 0)
        x_t, x_next, v = (part[:length].numpy().copy() for part in kept)
        span = slice(first, first + length)
        t, t_next = times[:-1][span].copy(), times[1:][span].copy()
        return ImageSegment(x_t, x_next, v, t, t_next, pixels, self.grid, version)
