"""What a run leaves behind is whole, also after a kill."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.config import ConfigError
from common.rundir import RunDirectory, make_directory, replacing, replacing_directory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "demo").create("steps: 3\n")


def test_create_writes_the_config_and_refuses_a_taken_path(run: RunDirectory) -> None:
    assert run.config.read_text() == "steps: 3\n"
    assert run.name == "demo"
    with pytest.raises(ConfigError, match=r"runs/demo exists already; give another run_name, or --resume"):
        RunDirectory(run.path).create("steps: 4\n")
    assert run.config.read_text() == "steps: 3\n"
    assert [p.name for p in run.path.parent.iterdir()] == ["demo"]


def test_open_needs_a_directory_with_a_config(run: RunDirectory) -> None:
    assert RunDirectory(run.path).open().config == run.config
    with pytest.raises(ConfigError, match="missing does not exist"):
        RunDirectory(run.path.parent / "missing").open()
    run.config.unlink()
    with pytest.raises(ConfigError, match=r"demo has no config\.yaml"):
        RunDirectory(run.path).open()


def test_paths_follow_the_documented_layout(run: RunDirectory) -> None:
    def relative(path: Path) -> str:
        return path.relative_to(run.path).as_posix()

    assert relative(run.rollout_file(10)) == "rollouts/step-000010-rank0.parquet"
    assert relative(run.checkpoint(20)) == "checkpoints/step-000020"
    assert relative(run.evaluation_file(0)) == "eval/step-000000.json"
    assert relative(run.samples_file(0)) == "eval/step-000000.parquet"


def test_json_is_strict_and_takes_numpy(run: RunDirectory) -> None:
    value = {"a": np.float32("nan"), "b": [float("inf"), np.int64(3)], "c": np.array([[1.0, np.nan]]), "d": np.bool_(1)}
    path = run.write_json("eval/x.json", value)
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 3], "c": [[1.0, None]], "d": True}
    with pytest.raises(Exception, match="object"):
        run.write_json("eval/y.json", {"a": object()})
    assert [p.name for p in run.evaluations.iterdir()] == ["x.json"]


def test_a_failed_write_keeps_the_old_file(run: RunDirectory) -> None:
    with pytest.raises(RuntimeError), replacing(run.config) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert run.config.read_text() == "steps: 3\n"
    assert [p.name for p in run.path.iterdir()] == ["config.yaml"]


def test_a_directory_is_replaced_whole_or_not_at_all(run: RunDirectory) -> None:
    for failed in (RuntimeError, OSError):
        with pytest.raises(failed), replacing_directory(run.path, new=failed is OSError) as aside:
            (aside / "half").touch()
            if failed is RuntimeError:
                raise RuntimeError
        assert [p.name for p in run.path.parent.rglob("*")] == ["demo", "config.yaml"]
    with pytest.raises(FileNotFoundError), replacing_directory(run.path) as aside:
        shutil.rmtree(aside)  # the old one has made way when the new one cannot be moved there
    assert [p.name for p in run.path.parent.rglob("*")] == ["demo", "config.yaml"]
    with replacing_directory(run.path) as aside:
        (aside / "new").touch()
    assert [p.name for p in run.path.parent.rglob("*")] == ["demo", "new"]


def test_metrics_round_trip_with_null_for_nan(run: RunDirectory) -> None:
    assert run.read_metrics() == []
    run.append_metrics({"step": 0, "reward/mean": np.float32(0.5)})
    run.append_metrics({"step": 1, "reward/mean": float("nan")})
    assert run.read_metrics() == [{"step": 0, "reward/mean": 0.5}, {"step": 1, "reward/mean": None}]
    assert run.metrics.read_text().count("\n") == 2


def test_a_torn_last_line_is_ignored_and_not_written_behind(run: RunDirectory) -> None:
    run.append_metrics({"step": 0})
    with run.metrics.open("a") as file:
        file.write('{"step": 1, "rew')
    assert run.read_metrics() == [{"step": 0}]
    run.append_metrics({"step": 1})
    assert run.read_metrics() == [{"step": 0}, {"step": 1}]


@pytest.mark.parametrize("broken", ['{"step": 1, "rew', "[1]"])
def test_a_broken_line_in_the_middle_is_an_error(run: RunDirectory, broken: str) -> None:
    run.metrics.write_text(f'{{"step": 0}}\n{broken}\n{{"step": 2}}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2 is not a JSON object"):
        run.read_metrics()


def test_truncation_drops_the_step_and_later(run: RunDirectory) -> None:
    run.rewind(2)
    assert not run.metrics.exists()
    for step in range(5):
        run.append_metrics({"step": step})
    run.rewind(3)
    assert [row["step"] for row in run.read_metrics()] == [0, 1, 2]


def test_going_back_forgets_evaluations_of_lost_weights(run: RunDirectory) -> None:
    for step in (0, 3, 4):
        run.write_json(run.evaluation_file(step), {"step": step})
        run.samples_file(step).write_bytes(b"")
    run.rewind(3)
    assert list(run.read_evaluations()) == [0, 3]
    assert sorted(path.name for path in run.evaluations.iterdir()) == [
        f"step-{step:06d}.{suffix}" for step in (0, 3) for suffix in ("json", "parquet")
    ]


def test_evaluations_are_read_in_order_of_steps(run: RunDirectory) -> None:
    assert run.read_evaluations() == {}
    for step in (40, 0, 1_000_000):
        run.write_json(run.evaluation_file(step), {"step": step})
    (run.evaluations / "notes.json").write_text("nothing")
    assert list(run.read_evaluations().items()) == [(s, {"step": s}) for s in (0, 40, 1_000_000)]
    run.evaluation_file(40).write_text('{"step": 4')
    with pytest.raises(ConfigError, match=r"step-000040\.json is not valid JSON .*; restore or remove it"):
        run.read_evaluations()


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    make_directory(tmp_path / "new" / "deep", "out")
    assert list((tmp_path / "new" / "deep").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"^out: nothing can be written into .*file/x \(Not a directory\); give another"
    ):
        make_directory(tmp_path / "file" / "x", "out")


def test_what_killed_writers_left_is_cleared(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r").create("steps: 1\n")
    run.write_json(run.evaluation_file(1), {})
    whole = set(run.path.rglob("*"))
    run.rollouts.mkdir()
    for left in (run.path / ".metrics.jsonl.7.partial", run.rollouts / ".step-000001-rank0.parquet.8.partial"):
        left.write_text("half")
    (run.checkpoint(1).with_name("step-000001.partial") / "policy").mkdir(parents=True)
    run.clear_partial(run.rollouts)
    assert not list(run.rollouts.iterdir()) and len(list(run.path.rglob("*.partial"))) == 2
    run.clear_partial()
    assert set(run.path.rglob("*")) == whole | {run.rollouts, run.checkpoints}


def test_one_process_at_a_time_trains_in_a_directory(run: RunDirectory) -> None:
    # A directory's lock would, on NFS, hold on this machine alone.
    with run.owned(), run.lock.open("r+b") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with run.owned(), pytest.raises(ConfigError, match="is trained by another process"), run.owned():
        pass
    with run.owned():
        pass


def test_a_full_disk_costs_a_line_of_metrics_and_not_the_run(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    run.append_metrics({"step": 0})
    run.metrics.rename(run.path / "kept")
    run.metrics.symlink_to("/dev/full")
    run.append_metrics({"step": 1})
    assert "the metrics of step 1 were not recorded" in caplog.text
    run.metrics.unlink()
    (run.path / "kept").rename(run.metrics)
    run.append_metrics({"step": 2})
    assert [row["step"] for row in run.read_metrics()] == [0, 2]
