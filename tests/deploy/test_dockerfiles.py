"""The Dockerfiles name files, locks and targets that exist. No image is built here: there is no engine."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest

from common.config import REPOSITORY

KINDS = ("cpu", "gpu")


def instructions(kind: str) -> list[tuple[str, list[str]]]:
    text = (REPOSITORY / "deploy" / "docker" / f"Dockerfile.{kind}").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(verb, shlex.split(rest)) for verb, _, rest in (line.partition(" ") for line in joined)]


@pytest.mark.parametrize("kind", KINDS)
def test_sources_exist_and_are_sent_to_the_builder(kind: str) -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    sources = [
        source
        for verb, words in instructions(kind)
        if verb == "COPY"
        for source in [word for word in words if not word.startswith("--")][:-1]
    ]
    assert sources and all((REPOSITORY / source).exists() for source in sources)
    assert "*" in ignored and all(f"!{source.split('/')[0]}" in ignored for source in sources)
    packages = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert {pattern.rstrip("*") for pattern in packages["include"]} <= set(sources)


@pytest.mark.parametrize("kind", KINDS)
def test_the_environment_is_that_of_its_lock_file(kind: str) -> None:
    runs = [words for verb, words in instructions(kind) if verb == "RUN" and words[0] == "make"]
    makefile = (REPOSITORY / "Makefile").read_text()
    for _, target, lock in runs:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
        assert lock == f"LOCK=deploy/locks/{kind}.txt"
    assert [words[1] for words in runs] == ["packages", "env"]
    (base,) = [words[0] for verb, words in instructions(kind) if verb == "FROM"]
    python = re.search(r"python:(\d+\.\d+)-", base)
    assert python and python[1] == re.findall(r"^PYTHON \?= python(\S+)", makefile, re.MULTILINE)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_jobs_find_the_command_and_no_secret_is_baked_in(kind: str) -> None:
    variables = dict(word.split("=", 1) for verb, words in instructions(kind) if verb == "ENV" for word in words)
    workdir = next(words[0] for verb, words in instructions(kind) if verb == "WORKDIR")
    assert variables["PATH"].startswith(f"{workdir}/.venv/bin:")
    assert variables["RAY_AUTH_MODE"] == "token"
    assert not [name for name in variables if re.search("KEY|SECRET|PASSWORD|AUTH_TOKEN", name)]
    assert any(verb == "USER" and words != ["root"] for verb, words in instructions(kind))
