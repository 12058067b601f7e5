"""The learner's ranks in real actors: what is heard of a dead one, and what goes on from a checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from chains import make_chains
from golden_numbers import CHECKPOINT, close
from safetensors.torch import load_file, save_file

from common.bagel.checkpoint import Checkpoint
from common.bagel.policy import BagelPolicy
from common.config import ConfigError, TrainConfig
from common.recipe import load_config
from common.types import Group, Prompt
from learner import checkpoint as run_checkpoint
from learner import engine
from learner.actor import LearnerRank
from learner.group import LearnerError, LearnerGroup, LostLearnerError
from learner.reference import HostReference

REWARDS = np.array([[0.0, 1.0], [0.5, 0.0]])


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    overrides = [
        "run_name=group",
        f"model.path={CHECKPOINT}",
        "learner.ranks=2",
        "learner.zero_stage=3",
        "sampling.noise_level=0.7",
        "checkpoints.keep=1",
        "self_test=false",  # these chains were not made by a rollout
        "learner.deadline_s=200",
        "objective.advantage_std=none",
        "objective.advantage_clip=0.4",
        # Groups of parameters of their own, one of which stays where it is.
        "optimizer.groups=[{name: still, pattern: '*embed_tok*', lr: 0}, {name: ends, pattern: '*llm2vae*', lr: 1e-3}]",
        "objective.regulariser=velocity_mse",
    ]
    return load_config("shapes", overrides)


@pytest.fixture(scope="module")
def group(local_ray: None, config: TrainConfig) -> Iterator[LearnerGroup]:
    class FillableRank(LearnerRank):
        """A rank whose disk can be filled; its process, to be killed; and how it saves memory."""

        def __init__(self, *arguments: Any) -> None:
            engine.PERSISTENT = 0  # what is small is sharded too
            super().__init__(*arguments)

        def slow_disk(self, seconds: float) -> None:
            def slow(*arguments: Any) -> None:
                time.sleep(seconds)
                save_file(*arguments)

            run_checkpoint.save_file = slow

        def fill_disk(self) -> None:
            def full(*arguments: object) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            run_checkpoint.save_file = full

        def pid(self) -> int:
            return os.getpid()

        def savings(self) -> tuple[bool, bool]:
            policy = self.checkpoint.policy
            assert isinstance(policy, BagelPolicy)
            return isinstance(self.reference, HostReference), policy.language_model.model.recompute

    patch = pytest.MonkeyPatch()
    patch.setattr("learner.group.LearnerRank", FillableRank)
    group = LearnerGroup(config)
    group.wait_ready()
    yield group
    group.close()
    patch.undo()


def test_a_lost_rank_a_full_disk_and_another_number_of_ranks(
    group: LearnerGroup,
    config: TrainConfig,
    golden_checkpoint: Checkpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    group.check_sees(tmp_path)
    handle = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(ConfigError, match=r"/fd/.* on the learner's node 127\.0\.0\.1 \(.*is not the directory.*share"):
        group.check_sees(Path(f"/proc/self/fd/{handle}"))  # which every process has for itself
    os.close(handle)
    assert not list(tmp_path.iterdir())
    chains = make_chains(golden_checkpoint, 4)
    refs = [ray.put(Group(Prompt(str(b), "p", {}), 0, tuple(chains[2 * b : 2 * b + 2]))) for b in range(2)]
    assert "  ends, learning rate 0.001: " in group.parameters()
    assert ray.get([rank.savings.remote() for rank in group.ranks]) == [(False, False)] * 2
    group._all("take_for_test", refs)
    assert [(found.again, found.reference) for found in group._all("self_test")] == [(0, 0)] * 2
    metrics = group.update(0, refs, REWARDS)
    assert metrics["weights/version"] == 1 and metrics["image/velocity_mse"] == 0
    assert metrics["advantage/abs_mean"] == pytest.approx((0.4 + 0.25) / 2), "one clipped, neither divided"
    assert all(metrics[f"grad_norm/{name}"] > 0 for name in ("reasoning", "denoising", "still", "ends"))
    first = tmp_path / "step-000001"
    group.save(first, {"step": 1, "reward": 0.5}, {4: refs})
    assert group.update(1, refs, REWARDS)["weights/version"] == 2

    # A slow disk: the learner is waited for, not given up.
    hurried = config.model_copy(update={"learner": config.learner.model_copy(update={"deadline_s": 2.0})})
    ray.get([rank.slow_disk.remote(3.0) for rank in group.ranks])
    group.save(tmp_path / "slow" / "step-000002", {"step": 2})
    group.config = hurried
    group._wait_written()
    assert "still being written after 1 s" in caplog.text
    group.config = config
    group.save(tmp_path / "slow" / "step-000003", {"step": 3})
    group.config = hurried
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(LearnerError, match=r"not written within 1 s \(0.5 times"),
    ):
        patch.setattr("learner.group.MOST_WRITING", 1)
        group._wait_written()
    group.config = config
    group._wait_written()
    shutil.rmtree(tmp_path / "slow")

    # A full disk: training goes on, the checkpoint before stays, and the last one's failure is an error.
    ray.get([rank.fill_disk.remote() for rank in group.ranks])
    group.save(tmp_path / "step-000002", {"step": 2, "reward": 0.7})
    assert group.update(2, refs, REWARDS)["weights/version"] == 3
    group.save(tmp_path / "step-000003", {"step": 3, "reward": 0.7})
    with pytest.raises(LearnerError, match=r"could not be written: OSError: .*No space left"):
        group.saved()
    assert group.metrics()["checkpoint/failures"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    found = run_checkpoint.newest_whole(tmp_path)
    assert found is not None and found[1]["weights_version"] == 1
    assert found[1]["reference"] == run_checkpoint.identity([CHECKPOINT])
    start, one = (load_file(path / "ema.safetensors") for path in (CHECKPOINT, first / "policy"))
    # Masters begin as what the learner computes with.
    begun = {name: tensor.to(getattr(torch, config.learner.dtype)) for name, tensor in start.items()}
    moved = {name: (one[name] - begun[name].float()).abs().max().item() for name in one}
    assert moved["language_model.model.embed_tokens.weight"] == 0
    assert moved["llm2vae.weight"] > 10 * moved["vae2llm.weight"] > 0, "Adam's first step is its rate"

    # A killed rank is heard of at once, though the other one waits for it in a collective.
    os.kill(ray.get(group.ranks[1].pid.remote()), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(LostLearnerError):
        group.update(3, refs, REWARDS)
    assert time.monotonic() - began < config.learner.deadline_s / 2

    # The learner goes on from the checkpoint: here with one rank and another ZeRO stage, bit for bit.
    saving = {"reference_on_host": True, "activation_checkpointing": True}
    alone = config.learner.model_copy(update={"ranks": 1, "zero_stage": 1, **saving})
    group.config = config.model_copy(update={"learner": alone})
    group.rebuild(first)
    assert group.wait_ready() == 1
    assert ray.get(group.ranks[0].savings.remote()) == (True, True)
    kept = ray.get(group.restore(run_checkpoint.in_flight_file(first, 4), 2))
    for found, made in zip([c for g in kept for c in g.chains], chains, strict=True):
        assert found.seed == made.seed and (found.image.x_next == made.image.x_next).all()
        assert (found.text.logprobs == made.text.logprobs).all() and found.text.version == made.text.version
    again = tmp_path / "again" / "step-000001"
    group.save(again, {"step": 1})
    group.saved()
    for name in ("optimizer.safetensors", "policy/ema.safetensors"):
        before, after = load_file(first / name), load_file(again / name)
        assert before.keys() == after.keys()
        assert all((before[key] == after[key]).all() for key in before)
    assert group.update(1, refs, REWARDS)["weights/version"] == 2
    assert group.metrics()["learner/rebuilds"] == 1

    # Groups that cannot be written are said and cost nothing else.
    (tmp_path / "file").touch()
    group.record(tmp_path / "file" / "groups.parquet", refs, REWARDS, {})
    group.saved()
    assert "file/groups.parquet could not be written" in caplog.text

    # A rank that hangs is given up at the deadline, by its number, and ended like one that works.
    pid = ray.get(group.ranks[0].pid.remote())
    os.kill(pid, signal.SIGSTOP)
    group.config = config.model_copy(update={"learner": alone.model_copy(update={"deadline_s": 1.0})})
    with pytest.raises(LostLearnerError, match=r"take: rank 0 did not finish within 1 s \(learner.deadline_s\)"):
        group.update(2, refs, REWARDS)
    group.close()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_ranks_have_the_gradient_of_one(
    local_ray: None, config: TrainConfig, golden_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Of chains that they cannot share evenly, of different lengths, and where all tokens count alike."""
    chains = make_chains(golden_checkpoint, 4)
    assert len({len(chain.text.ids) for chain in chains}) > 1
    refs, rewards = [ray.put(Group(Prompt("p", "p", {}), 0, tuple(chains)))], np.array([[0.0, 1.0, np.nan, 0.3]])
    objective = config.objective.model_copy(update={"text_aggregation": "token_mean", "advantage_std": "group"})
    optimizer = config.optimizer.model_copy(update={"grad_clip": 0.0})
    found = []
    for ranks in (1, 2):
        learner = config.learner.model_copy(
            update={"ranks": ranks, "zero_stage": 2, "dtype": "float32", "chains_per_micro_batch": 1}
        )
        update = {"run_name": f"of-{ranks}", "learner": learner, "objective": objective, "optimizer": optimizer}
        group = LearnerGroup(config.model_copy(update=update))
        try:
            group.wait_ready()
            metrics = group.update(0, refs, rewards)
            group.save(tmp_path / f"step-{ranks:06d}", {"step": 1})
            group.saved()
        finally:
            group.close()
        moments = load_file(tmp_path / f"step-{ranks:06d}" / "optimizer.safetensors")
        found.append((metrics, {name: value for name, value in moments.items() if name.startswith("exp_avg.")}))
    (metrics, alone), (metrics_of_two, together) = found
    for name, moment in alone.items():  # a tenth of the gradient
        scale = moment.abs().max().item()
        close(together[name], moment, atol=1e-4 * scale, rtol=1e-3)
    assert any(moment.any() for moment in alone.values())
    for name in ("grad_norm/reasoning", "grad_norm/denoising", "text/entropy", "advantage/abs_mean"):
        assert metrics_of_two[name] == pytest.approx(metrics[name], rel=1e-3)


def test_what_the_ranks_waited_for_is_said(local_ray: None, config: TrainConfig) -> None:
    learner = config.learner.model_copy(update={"custom": {"nowhere": 1.0}, "deadline_s": 1.0})
    group = LearnerGroup(config.model_copy(update={"run_name": "roomless", "learner": learner}))
    try:
        with pytest.raises(ConfigError, match=r"no room: 2 learner ranks, .*1 nowhere each, waited 1 s .*has .*2 CPU"):
            group.wait_ready()
    finally:
        group.close()


def test_a_rank_that_cannot_read_the_model_names_its_node(local_ray: None, config: TrainConfig) -> None:
    here = config.learner.model_copy(update={"ranks": 1})
    elsewhere = config.model.model_copy(update={"path": "/not/shared"})
    group = LearnerGroup(config.model_copy(update={"run_name": "blind", "learner": here, "model": elsewhere}))
    try:
        with pytest.raises(ConfigError, match=r"^on node 127\.0\.0\.1 \(.+\): /not/shared does not exist"):
            group.wait_ready()
    finally:
        group.close()
