"""ReFL (Xu et al. 2023, ImageReward): a baseline that follows a differentiable reward, not a policy gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common import flow
from common.policy import OpenPolicy, PolicyOutput
from common.shapes.learned import learned_score, load_reader
from learner import objective
from learner.update import MicroBatch, OldPolicy, Updater


class ReFLUpdater(Updater):
    """Updates in which the image objective is the learned scorer of shapes.

    At each window step, which the recipe puts late, the policy predicts the image in one go, x_0 = x_t - t v; the
    autoencoder decodes it and the scorer judges it. The gradient goes back through all three. There is neither a ratio
    nor an advantage.
    """

    def __init__(self, opened: OpenPolicy, *updater: Any) -> None:
        """opened: the policy that is trained; updater: what an `Updater` is made of."""
        super().__init__(*updater)
        self.opened, self.reader = opened, load_reader(str(opened.policy.device))

    def predicted_score(self, micro: MicroBatch, velocity: Tensor) -> Tensor:
        """Learned reward [C, K], each in [0, 1], of the images predicted with velocity [M, N, D]."""
        x_0 = micro.packed.x_t - micro.packed.t[:, None, None] * velocity
        pixels = self.opened.pixels(x_0, micro.grid).clamp(-1, 1)
        asked = [prompt.metadata for prompt in micro.prompts for _ in range(micro.window)]
        return learned_score(self.reader, pixels, asked).view(micro.shape)

    def _image(
        self, micro: MicroBatch, output: PolicyOutput, old: OldPolicy, move: flow.StepCoefficients, divergence: Tensor
    ) -> objective.Surrogate:
        score = self.predicted_score(micro, output.velocity)
        none = torch.zeros_like(score).detach()
        return objective.Surrogate(-score.mean(1), none, none)
