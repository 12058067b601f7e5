"""`ray job submit --working-dir . -- unigrpo train RECIPE` on a running cluster with token authentication."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.config import REPOSITORY, ConfigError, load_config
from common.rundir import RunDirectory
from common.runtime import free_port
from deploy import session

RAY = str(Path(sys.executable).with_name("ray"))

# These two exist in the submitted copy only, so that a run that succeeds has read driver and actors from there.
RECIPE = """
run_name: job
steps: 2
data: {prompts_per_step: 4, group_size: 4}
rewards: [{name: "rewards.only_here:OnlyHere"}]
evaluation: {prompts: 7, images_per_prompt: 2, samples: 7}
"""
SCORER = """
from rewards.shapes import ShapesScorer


class OnlyHere(ShapesScorer):
    pass
"""

# How far vLLM's mean log-probs may be from the learner's when both compute in bf16; 1e-3 where measured.
BFLOAT16_LOGPROBS = 2e-2


@dataclass
class Head:
    """A cluster of one node on loopback."""

    dashboard: str
    gcs: str
    metrics: str
    runs: Path
    environment: dict[str, str]

    def get(self, path: str, token: str | None = None) -> Any:
        """JSON from the dashboard."""
        headers = {"Authorization": f"Bearer {token or self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(self.dashboard + path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.load(reply)

    def submit(self, directory: Path, *entrypoint: str, token: str | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [RAY, "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--", *entrypoint],
            cwd=directory,
            env=self.environment | ({"RAY_AUTH_TOKEN": token} if token else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    scratch = Path(tempfile.mkdtemp(prefix="rj-", dir="/tmp"))  # pytest's paths are too long for Ray's sockets
    names = ["port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
    names += ["metrics-export-port", "ray-client-server-port"]
    ports: dict[str, int] = {}
    while len(set(ports.values())) < len(names):
        ports = {name: free_port() for name in names}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{Path(RAY).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Ray's switch for "this machine only": without it 127.0.0.1 is replaced by the machine's outer address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_metrics_report_interval_ms": "500",
        "UNIGRPO_HOME": str(scratch / "home"),
    }
    (scratch / "home").mkdir()
    log = scratch / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=300000000",
             "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--disable-usage-stats",
             f"--temp-dir={scratch / 'ray'}", *(f"--{name}={port}" for name, port in ports.items())],
            env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    started = Head(
        f"http://127.0.0.1:{ports['dashboard-port']}",
        f"127.0.0.1:{ports['port']}",
        f"http://127.0.0.1:{ports['metrics-export-port']}/metrics",
        scratch / "home" / "runs",
        environment,
    )
    try:
        deadline = time.monotonic() + 90
        while not answers(started):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.3)
        yield started
    finally:
        # Only what was started here: `ray stop` would end every cluster of this machine.
        mine = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, left = psutil.wait_procs(mine, timeout=15)
        for survivor in left:
            survivor.kill()
        process.wait(timeout=15)
        shutil.rmtree(scratch, ignore_errors=True)


def answers(head: Head) -> bool:
    try:
        return bool(head.get("/api/v0/nodes")["data"]["result"]["result"])
    except OSError:  # recovered from: not up yet
        return False


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository's code with a recipe and a scorer that the installed one does not have."""
    target = tmp_path_factory.mktemp("submitted") / "unigrpo"
    for room in ("common", "rollout", "rewards", "learner", "deploy"):
        shutil.copytree(REPOSITORY / room, target / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore"):
        shutil.copy(REPOSITORY / name, target / name)
    (target / "deploy" / "recipes" / "elsewhere.yaml").write_text(RECIPE)
    (target / "rewards" / "only_here.py").write_text(SCORER)
    return target


def scrape(head: Head) -> str:
    with urllib.request.urlopen(head.metrics, timeout=10) as reply:
        return reply.read().decode()


def test_a_job_trains(head: Head, copy: Path) -> None:
    job = head.submit(copy, "unigrpo", "train", "elsewhere", "rollout.dtype=bfloat16", "learner.dtype=bfloat16")
    actors: set[str] = set()
    metrics = ""
    while job.poll() is None:
        rows = head.get("/api/v0/actors?limit=100")["data"]["result"]["result"]
        actors |= {row["name"] for row in rows if row["state"] == "ALIVE"}
        if "unigrpo_" not in metrics:
            metrics = scrape(head)
        time.sleep(0.5)
    output = job.communicate()[0]
    assert job.returncode == 0, output[-4000:]
    assert [entry["status"] for entry in head.get("/api/jobs/") if entry["type"] == "SUBMISSION"] == ["SUCCEEDED"]

    run = RunDirectory(head.runs / "job").open()
    assert f"report: {run.report}" in output and run.report.exists()
    rows = run.read_metrics()
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[0]["text/ratio_mean"] == rows[0]["image/ratio_mean"] == 1.0
    assert all(0 < row["text/logprob_diff_rollout"] < BFLOAT16_LOGPROBS for row in rows)
    assert list(run.read_evaluations()) == [0, 2] and run.latest_checkpoint() == run.checkpoint(2)

    scorer = "job-reward-rewards.only_here:OnlyHere-0"
    assert {"job-rollout-0", "job-rollout-1", "job-learner-0", "job-learner-1", scorer} <= actors
    for name in ("reward_mean", "weights_version", "time_step_s"):
        assert f"ray_unigrpo_{name}{{" in metrics
    assert 'run="job"' in metrics


def test_a_job_that_asks_for_too_much_says_so(head: Head, copy: Path) -> None:
    job = head.submit(copy, "unigrpo", "train", "elsewhere", "run_name=big", "learner.cpus=3")
    output = job.communicate(timeout=120)[0]
    assert job.returncode != 0
    assert "error: the actors ask for" in output and "learner 2 x 3" in output and "the cluster has 2" in output
    assert "exit code 2" in output and "Traceback" not in output
    assert not (head.runs / "big").exists()


def test_a_wrong_token_is_refused(head: Head, copy: Path) -> None:
    before = len(head.get("/api/jobs/"))
    with pytest.raises(urllib.error.HTTPError, match="403"):
        head.get("/api/v0/actors", token="0" * 64)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(head.dashboard + "/api/v0/actors", timeout=10)
    job = head.submit(copy, "true", token="0" * 64)
    output = job.communicate(timeout=60)[0]
    assert job.returncode != 0 and "authentication token is invalid" in output
    assert len(head.get("/api/jobs/")) == before


def test_what_is_uploaded_is_code_and_the_model() -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    files: list[Path] = []
    _dir_travel(
        REPOSITORY,
        [_get_excludes(REPOSITORY, get_runtime_env_default_excludes())],
        lambda path: files.append(path) if path.is_file() else None,
        include_gitignore=True,
    )
    names = {path.relative_to(REPOSITORY) for path in files}
    assert not {path.parts[0] for path in names} & {".git", ".venv", "runs", "tests", "build"}
    for needed in ("deploy/cli.py", "deploy/models/shapes/ema.safetensors", "common/shapes/data/train.jsonl"):
        assert Path(needed) in names
    assert sum(path.stat().st_size for path in files) < 50 << 20


def test_where_runs_land(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("UNIGRPO_HOME", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = load_config("shapes", ["run_name=x"])
    assert config.directory == tmp_path / "runs" / "x"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert config.directory == tmp_path / "home" / "runs" / "x"
    monkeypatch.setenv("UNIGRPO_HOME", "/shared")
    assert config.directory == Path("/shared/runs/x")
    assert load_config("shapes", ["run_name=x", "runs_dir=/elsewhere"]).directory == Path("/elsewhere/x")


def test_an_address_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_server_port_wait_time_s", "3")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(
        ConfigError, match=r"RAY_ADDRESS is 127\.0\.0\.1:.*refused.*ray start --head.*unset RAY_ADDRESS"
    ):
        session.connect(load_config("shapes"))


def test_a_server_that_is_not_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS is http.*head:port"):
        session.connect(load_config("shapes"))


def test_nodes_that_the_launcher_may_add_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 4.0, "memory": 1.0})
    assert session.capacity() == {"CPU": 4.0, "memory": 1.0}
    groups = {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "rollout": {"resources": {"CPU": 8, "rollout_node": 1000}, "max_workers": 3},
    }
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps({"available_node_types": groups}))
    assert session.capacity() == {"CPU": 24, "rollout_node": 3000, "memory": 1.0}
