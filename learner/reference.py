"""The starting policy without a second model on the device."""

from __future__ import annotations

from typing import Any

import torch

from common.policy import Policy, PolicyOutput


class HostReference:
    """The policy's weights of now, in host memory; within a `with` they are in the policy's place.

    Entering and leaving each move all weights both ways between host and device, once per batch.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self._entered = policy, False
        pinned = policy.device.type == "cuda"
        self._kept = {n: torch.empty_like(p, device="cpu", pin_memory=pinned) for n, p in policy.named_parameters()}
        for name, parameter in policy.named_parameters():
            self._kept[name].copy_(parameter.detach())

    def __call__(self, *batch: Any) -> PolicyOutput:
        """The policy's forward under the weights it started from. RuntimeError outside a `with`."""
        if not self._entered:
            raise RuntimeError("the reference weights are not in the policy's place; ask within `with reference:`")
        return self.policy(*batch)

    def __enter__(self) -> HostReference:
        self._swap()
        return self

    def __exit__(self, *_: object) -> None:
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.policy.named_parameters():
            there = parameter.detach().to("cpu", copy=True)
            parameter.copy_(self._kept[name])
            self._kept[name].copy_(there)
        self._entered = not self._entered
