"""Jobs on a running cluster of a head and two workers with token authentication: `unigrpo submit`, `ray job submit`."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from journals import read_events

from common.config import REPOSITORY, ConfigError
from common.recipe import load_config
from common.rundir import RunDirectory
from common.runtime import SUBMITTED_WITH, check_versions, free_port, versions
from deploy import session
from deploy import submit as jobs
from learner.checkpoint import verify

RAY = str(Path(sys.executable).with_name("ray"))
UNIGRPO = str(Path(sys.executable).with_name("unigrpo"))

# These two exist in the submitted copy only, so that a run that succeeds has read driver and actors from there.
RECIPE = """
run_name: job
steps: 2
data: {prompts_per_step: 2, group_size: 4}
rewards: [{name: "rewards.only_here:OnlyHere", custom: {rollout_node: 1}}]
rollout: {replicas: 1, custom: {rollout_node: 1}}
learner: {custom: {learner_node: 1}}
evaluation: {prompts: 2, images_per_prompt: 1, points: 6, samples: 2}
"""
SCORER = """
from rewards.shapes import ShapesScorer


class OnlyHere(ShapesScorer):
    pass
"""
CLIENTS_SECRET = secrets.token_hex(20)

# How far vLLM's mean log-probs may be from the learner's when both compute in bf16; 1e-3 where measured.
BFLOAT16_LOGPROBS = 2e-2


@dataclass
class Head:
    """A cluster on loopback: a head that takes no actors, a learner node and a rollout node."""

    dashboard: str
    metrics: str
    runs: Path
    environment: dict[str, str]

    def get(self, path: str, token: str | None = None) -> Any:
        """JSON from the dashboard."""
        headers = {"Authorization": f"Bearer {token or self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(self.dashboard + path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.load(reply)

    def start(self, directory: Path, *command: str, token: str | None = None) -> subprocess.Popen[str]:
        """A client of the cluster."""
        return subprocess.Popen(
            command,
            cwd=directory,
            env=self.environment
            | {"RAY_API_SERVER_ADDRESS": self.dashboard, "CLIENTS_API_KEY": CLIENTS_SECRET}
            | ({"RAY_AUTH_TOKEN": token} if token else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ray_submit(self, directory: Path, *entrypoint: str, token: str | None = None) -> subprocess.Popen[str]:
        return self.start(directory, RAY, "job", "submit", "--working-dir", ".", "--", *entrypoint, token=token)


def lasting_ports(count: int) -> list[int]:
    """Free ports that stay free until a server takes them: below those of outgoing connections."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    scratch = Path(tempfile.mkdtemp(prefix="rj-", dir="/tmp"))  # pytest's paths are too long for Ray's sockets
    names = ("dashboard_port", "dashboard_agent_listen_port", "metrics_export_port")
    ports = dict(zip(names, lasting_ports(len(names)), strict=True))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{Path(RAY).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Ray's switch for "this machine only": without it 127.0.0.1 is replaced by the machine's outer address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_metrics_report_interval_ms": "500",
        # Where Ray notes the address of "the" cluster of a machine, for its jobs among others.
        "RAY_TMPDIR": str(scratch),
        "UNIGRPO_HOME": str(scratch / "home"),
        "WANDB_API_KEY": secrets.token_hex(20),
    }
    (scratch / "home").mkdir()
    log = scratch / "cluster.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("loopback_cluster.py")), json.dumps(ports)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    assert process.stdin and process.stdout
    try:
        # The test's own timeout bounds the wait.
        assert process.stdout.readline() == "up\n", log.read_text()[-3000:]
        yield Head(
            f"http://127.0.0.1:{ports['dashboard_port']}",
            f"http://127.0.0.1:{ports['metrics_export_port']}/metrics",
            scratch / "home" / "runs",
            environment,
        )
    finally:
        # Only what was started here: `ray stop` would end every cluster of this machine.
        mine = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
        _, left = psutil.wait_procs(mine, timeout=5)
        for survivor in left:
            survivor.kill()
        shutil.rmtree(scratch, ignore_errors=True)


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


def test_a_job_trains_on_the_nodes_it_names(head: Head, copy: Path) -> None:
    recipe = ("deploy/recipes/elsewhere.yaml", "rollout.dtype=bfloat16", "learner.dtype=bfloat16")
    job = head.start(copy, UNIGRPO, "submit", *recipe)
    actors: dict[str, str] = {}
    metrics = ""
    while job.poll() is None:
        rows = head.get("/api/v0/actors?limit=100")["data"]["result"]["result"]
        actors |= {row["name"]: row["node_id"] for row in rows if row["state"] == "ALIVE"}
        if "unigrpo_time_step_s" not in metrics:  # sent after the first step, queues before
            metrics = scrape(head)
        time.sleep(0.5)
    output = job.communicate()[0]
    assert job.returncode == 0, output[-4000:]
    assert re.search(rf"{head.dashboard}/#/jobs/raysubmit_\w+", output)
    (entry,) = [entry for entry in head.get("/api/jobs/") if entry["type"] == "SUBMISSION"]
    assert entry["status"] == "SUCCEEDED" and entry["metadata"] == versions()

    run = RunDirectory(head.runs / "job").open()
    assert f"report: {run.report}" in output and run.report.exists()
    rows = run.read_metrics()
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[0]["text/ratio_mean"] == rows[0]["image/ratio_mean"] == 1.0
    assert all(0 < row["text/logprob_diff_rollout"] < BFLOAT16_LOGPROBS for row in rows)
    assert list(run.read_evaluations()) == [0, 2] and verify(run.checkpoint(2))["step"] == 2

    recorded = b"".join(path.read_bytes() for path in run.path.rglob("*") if path.is_file())
    shown = recorded.decode(errors="ignore") + output + json.dumps(entry)
    for secret in (head.environment["WANDB_API_KEY"], head.environment["RAY_AUTH_TOKEN"], CLIENTS_SECRET):
        assert secret not in shown
    events = [json.loads(line)["event"] for line in output.splitlines() if line.startswith('{"time"')]
    assert events == [line["event"] for line in read_events(run.events)] and events.count("step") == 2

    scorer = "job-reward-rewards.only_here:OnlyHere-0"
    learners, replica = [f"job-learner-{i}" for i in range(2)], "job-rollout-0"
    assert {*learners, replica, scorer} <= actors.keys()
    assert actors[learners[0]] == actors[learners[1]] != actors[replica] == actors[scorer]
    for name in ("reward_mean", "weights_version", "time_step_s"):
        assert f"ray_unigrpo_{name}{{" in metrics
    assert 'run="job"' in metrics


def test_interrupt_leaves_the_job_alone_unless_asked(head: Head, copy: Path) -> None:
    # Whoever runs the suite in the background of a script makes it, and its children, deaf to interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(*arguments: str) -> tuple[int, str]:
        client = head.start(copy, UNIGRPO, "submit", *arguments)
        assert client.stdout is not None
        output = ""
        while "starting Ray" not in output:
            line = client.stdout.readline()
            assert line, output
            output += line
        client.send_signal(signal.SIGINT)
        return client.wait(timeout=90), output + client.stdout.read()

    code, output = interrupted("deploy/recipes/elsewhere.yaml", "run_name=long", "steps=1000")
    (name,) = set(re.findall(r"raysubmit_\w+", output))
    assert code == jobs.INTERRUPTED and f"{name} goes on" in output
    assert head.get(f"/api/jobs/{name}")["status"] == "RUNNING"
    code, output = interrupted("--follow", name, "--stop-on-interrupt")
    assert code == jobs.STOPPED and head.get(f"/api/jobs/{name}")["status"] == "STOPPED"
    again = head.start(copy, UNIGRPO, "submit", "--stop", name)
    assert f"{name}: STOPPED" in again.communicate(timeout=60)[0] and again.returncode == 0


def test_a_job_that_asks_for_too_much_says_so(head: Head, copy: Path) -> None:
    # In sum there is enough, but the node of the learners has one CPU.
    overrides = ["learner.cpus=0.7", "rollout.cpus=0", "rewards.0.cpus=0", "learner.deadline_s=3"]
    job = head.ray_submit(copy, "unigrpo", "train", "elsewhere", "run_name=big", *overrides)
    output = job.communicate(timeout=200)[0]
    assert job.returncode != 0 and "exit code 2" in output and "Traceback" not in output
    no_room = r"no room: 2 learner ranks, 0.7 CPU, 1 learner_node each, waited 3 s \(learner.deadline_s\)"
    assert re.search(rf"error: .*{no_room}. The cluster has 2 CPU, .*or add nodes", output)


def test_a_wrong_token_is_refused(head: Head, copy: Path) -> None:
    before = len(head.get("/api/jobs/"))
    with pytest.raises(urllib.error.HTTPError, match="403"):
        head.get("/api/v0/actors", token="0" * 64)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(head.dashboard + "/api/v0/actors", timeout=10)
    clients = [
        head.ray_submit(copy, "true", token="0" * 64),
        head.start(copy, UNIGRPO, "submit", "shapes", token="0" * 64),
    ]
    for client in clients:
        output = client.communicate(timeout=90)[0]
        assert client.returncode != 0 and "authentication token is invalid" in output
    assert client.returncode == 2 and "Traceback" not in output
    assert len(head.get("/api/jobs/")) == before


CUT_OFF = """
import sys
from pathlib import Path
from deploy import submit

client = submit.connect(sys.argv[1])
job = submit.submit(client, Path(sys.argv[2]), ["python", "-c", sys.argv[3]])
tail, cuts = client.tail_job_logs, [RuntimeError("the proxy is gone"), None]

async def cut_off(job):
    async for lines in tail(job):
        yield lines
        if cuts and "line" in lines:
            if error := cuts.pop():
                raise error
            return

client.tail_job_logs = cut_off
code = submit.follow(client, job, stop_on_interrupt=False)
print("cuts to come:", len(cuts))
sys.exit(code)
"""


def test_a_log_whose_connection_ends_is_told_on(head: Head, tmp_path: Path) -> None:
    job = "import time\nfor i in range(8): print('line', i, flush=True); time.sleep(1)"
    client = head.start(REPOSITORY, sys.executable, "-c", CUT_OFF, head.dashboard, str(tmp_path), job)
    output = client.communicate(timeout=120)[0]
    assert client.returncode == 0 and "cuts to come: 0" in output, output
    assert re.findall(r"line \d", output) == [f"line {i}" for i in range(8)]


def test_a_head_that_has_just_started_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def submit_job(**job: Any) -> str:
        asked.append(job["entrypoint"])
        if len(asked) < 3:
            raise RuntimeError("Request failed with status code 500: No available agent to submit job")
        return "job"

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert jobs.submit(SimpleNamespace(submit_job=submit_job), tmp_path, ["true"]) == "job"  # type: ignore[arg-type]
    assert asked == ["true"] * 3
    asked.clear()
    monkeypatch.setattr(jobs, "RETRY_S", -1.0)
    with pytest.raises(ConfigError, match=r"did not take the job .*No available agent"):
        jobs.submit(SimpleNamespace(submit_job=submit_job), tmp_path, ["true"])  # type: ignore[arg-type]


def test_an_address_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setattr(jobs, "CONNECT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--address is .*:{port} .*timed out.*dashboard's"):
            jobs.connect(f"http://127.0.0.1:{port}")


def test_a_server_of_another_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with socket.create_server(("127.0.0.1", 0)) as mail:
        threading.Thread(target=lambda: mail.accept()[0].sendall(b"220 mail\r\n"), daemon=True).start()
        with pytest.raises(ConfigError, match=r"--address is .* but no Ray cluster takes jobs .*220 mail"):
            jobs.connect(f"http://127.0.0.1:{mail.getsockname()[1]}")


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "http://127.0.0.1:{port}"])
def test_an_address_that_takes_no_jobs(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # restored afterwards
    with pytest.raises(ConfigError, match=r"--address is .*127\.0\.0\.1:\d+.*dashboard's"):
        jobs.connect(address.format(port=free_port()))


def test_a_recipe_file_must_be_uploaded(tmp_path: Path) -> None:
    inside, outside = tmp_path / "here" / "mine.yaml", tmp_path / "mine.yaml"
    inside.parent.mkdir()
    for recipe in (inside, outside):
        recipe.write_text("steps: 1\n")
    assert jobs.uploaded("shapes", inside.parent) == "shapes"
    assert jobs.uploaded(str(inside), inside.parent) == "mine.yaml"
    with pytest.raises(ConfigError, match=r"mine\.yaml is not inside --working-dir .*here.*move it there"):
        jobs.uploaded(str(outside), inside.parent)


def test_client_and_cluster_of_different_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    check_versions()
    monkeypatch.setenv(SUBMITTED_WITH, json.dumps(versions()))
    check_versions()
    monkeypatch.setenv(SUBMITTED_WITH, json.dumps(versions() | {"ray": "1.0"}))
    with pytest.raises(ConfigError, match=r"ray 1\.0 there, 2\.\S+ here; install the same lock file"):
        session.connect(load_config("shapes"))


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
