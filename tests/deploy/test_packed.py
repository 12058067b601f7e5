"""The benchmark's two ways of the same work agree, and the packed one needs the fewer operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.bagel.config import BagelConfig
from common.bagel.policy import BagelPolicy
from deploy.bench.measure import random_policy
from deploy.bench.packed import (
    Work,
    compare,
    difference,
    packed,
    packed_flops,
    plain,
    plain_flops,
    random_work,
    run_pass,
)

SHAPES = Path(__file__).parents[2] / "deploy/models/shapes"


def work_of(policy: BagelPolicy, window: int) -> Work:
    return random_work(policy.config, chains=5, window=window, context=(12, 30), scored=7, grid=(2, 3))


@pytest.fixture(scope="module")
def policy() -> BagelPolicy:
    return random_policy(BagelConfig.read(SHAPES), torch.float32)


@pytest.fixture(scope="module")
def work(policy: BagelPolicy) -> Work:
    return work_of(policy, 3)


def test_packed_plain_and_micro_batches_have_one_loss_and_one_gradient(policy: BagelPolicy, work: Work) -> None:
    whole = run_pass(policy, lambda: packed(policy, work), 0, 1)
    for other in (lambda: plain(policy, work), lambda: packed(policy, work, micro=2)):
        found = run_pass(policy, other, 0, 1)
        assert found.loss == pytest.approx(whole.loss, abs=1e-6)
        assert found.gradients.keys() == {n for n, p in policy.named_parameters() if p.requires_grad}
        assert difference(whole, found) < 1e-4
    wrong = run_pass(policy, lambda: plain(policy, work_of(policy, 2)), 0, 1)
    assert difference(whole, wrong) > 0.1


def test_plain_reads_each_text_once_more_per_further_step(policy: BagelPolicy, work: Work) -> None:
    config = policy.config
    one = work_of(policy, 1)
    assert plain_flops(config, one) == packed_flops(config, one)
    assert plain_flops(config, work) > packed_flops(config, work)
    rows = dict(compare(policy, one, repeat=1))
    assert set(rows) == {"packed", "plain", "packed against plain"}
    assert "of the matrix rate" in rows["packed"]
