"""`unigrpo submit`: a training sent to a Ray cluster as a job, followed to its end or left alone."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from common.config import ConfigError
from common.runtime import CONNECT_S, SUBMITTED_WITH, one_line, versions

INTERRUPTED = 130
STOPPED = 143
STOP_S = 60.0
RETRY_S = 60.0
LOST = (RuntimeError, OSError, aiohttp.ClientError)  # what Ray's client raises; of requests, OSError


def connect(address: str) -> JobSubmissionClient:
    """A client of the dashboard at http://host:port, with the token that Ray's variables or its file give.

    ConfigError if nobody answers there, or refuses us.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--address is {address}; give the dashboard's, e.g. http://127.0.0.1:8265")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray would prefer RAY_ADDRESS to an argument
    try:
        _check_serves(address)
        return JobSubmissionClient(address)
    except (AuthenticationError, HTTPException, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--address is {address} but no Ray cluster takes jobs from us there ({one_line(error)}). Give its "
            "dashboard's (`ray dashboard ray_cluster.yaml` forwards it), with RAY_AUTH_MODE and the token as there"
        ) from error


def _check_serves(address: str) -> None:
    """OSError if no HTTP server answers within seconds; Ray's own client waits without end."""
    with suppress(HTTPError):  # refused, but by a server
        urlopen(address, timeout=CONNECT_S).close()


def uploaded(recipe: str, working_dir: Path) -> str:
    """A recipe as the job finds it: a name stays, a file becomes relative to what is uploaded. ConfigError for one
    that is outside."""
    if not Path(recipe).is_file():
        return recipe
    try:
        return str(Path(recipe).resolve().relative_to(working_dir.resolve()))
    except ValueError:
        raise ConfigError(
            f"recipe {recipe} is not inside --working-dir {working_dir}, which is all that is uploaded; move it there"
        ) from None


def submit(client: JobSubmissionClient, working_dir: Path, command: list[str]) -> str:
    """Uploads the working directory, less what .gitignore and .rayignore name, and starts the command; the job's id.

    Nothing of this machine's environment goes along: a job's variables are shown in the dashboard.
    """
    carried = {SUBMITTED_WITH: json.dumps(versions())}
    deadline = time.monotonic() + RETRY_S
    while True:
        try:
            return client.submit_job(
                entrypoint=shlex.join(command),
                runtime_env={"working_dir": str(working_dir), "env_vars": carried},
                metadata=versions(),
            )
        except (RuntimeError, OSError, ValueError) as error:
            # A head that has just started has a dashboard sooner than the agent that starts jobs.
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ConfigError(f"the cluster did not take the job ({one_line(error)})") from error
        time.sleep(1)


def follow(client: JobSubmissionClient, job: str, stop_on_interrupt: bool) -> int:
    """Prints the job's log until it ends; its exit code. Ctrl-C leaves the job alone (130) unless it is to stop it."""
    _info(client, job)  # one that does not exist has no log to wait for
    # In its own thread: a log that does not come or a connection that does not close cannot hold back an interrupt.
    shown: Future[None] = Future()
    threading.Thread(target=_show_log, args=(client, job, shown), daemon=True).start()
    try:
        shown.result()
    except KeyboardInterrupt:
        if not stop_on_interrupt:
            print(f"\n{job} goes on: `unigrpo submit --follow {job}` shows it again, --stop {job} ends it", flush=True)
            return INTERRUPTED
        stop(client, job)
    except LOST as error:
        raise ConfigError(f"lost the log of {job} ({one_line(error)}); try `unigrpo submit --follow {job}`") from error
    return _exit_code(_ended(client, job))


def stop(client: JobSubmissionClient, job: str) -> JobStatus:
    """Ends a job and waits until it has; a run that it trained continues with --resume. ConfigError for no such job."""
    try:
        client.stop_job(job)
    except LOST as error:
        raise ConfigError(f"{job} cannot be stopped ({one_line(error)})") from error
    return _ended(client, job).status


def _show_log(client: JobSubmissionClient, job: str, shown: Future[None]) -> None:
    try:
        shown.set_result(asyncio.run(_print_log(client, job)))
    except BaseException as error:
        shown.set_exception(error)


async def _print_log(client: JobSubmissionClient, job: str) -> None:
    """Until the job has ended: a proxy or a dashboard that starts anew ends the connection, and each one tells the log
    from its beginning. The error once nobody has answered for RETRY_S."""
    shown, heard = 0, time.monotonic()
    while True:
        try:
            told = 0
            async for lines in client.tail_job_logs(job):
                print(lines[max(0, shown - told) :], end="", flush=True)
                told, heard = told + len(lines), time.monotonic()
                shown = max(shown, told)
            if client.get_job_info(job).status.is_terminal():
                return
            heard = time.monotonic()
        except LOST:
            if time.monotonic() > heard + RETRY_S:
                raise
        await asyncio.sleep(1)


def _ended(client: JobSubmissionClient, job: str) -> JobDetails:
    deadline = time.monotonic() + STOP_S
    while not (info := _info(client, job)).status.is_terminal():
        if time.monotonic() > deadline:
            raise ConfigError(f"{job} is still {info.status} after {STOP_S:.0f} s; look at its driver in the dashboard")
        time.sleep(0.2)
    return info


def _info(client: JobSubmissionClient, job: str) -> JobDetails:
    try:
        return client.get_job_info(job)
    except LOST as error:
        raise ConfigError(f"lost sight of {job} ({one_line(error)}); try `unigrpo submit --follow {job}`") from error


def _exit_code(info: JobDetails) -> int:
    if info.status == JobStatus.STOPPED:
        return STOPPED
    if info.status == JobStatus.FAILED and info.driver_exit_code is None:
        print(f"error: {info.message}", file=sys.stderr)
    code = info.driver_exit_code if info.driver_exit_code is not None else int(info.status != JobStatus.SUCCEEDED)
    return code if code >= 0 else 128 - code
