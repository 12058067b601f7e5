"""Scorers that fail on request. A prompt's metadata says how; the value of an image is its first byte."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.config import Section
from common.types import Prompt
from rewards.scorer import Scorer, ScorerOutput


class FirstByte(Scorer):
    """Well-behaved, with one component, and a pause where metadata asks for it."""

    def __init__(self, options: Section) -> None:
        pass

    def score(self, images: NDArray[np.uint8], prompts: list[Prompt]) -> ScorerOutput:
        time.sleep(prompts[0].metadata.get("sleep", 0))
        values = images[:, 0, 0, 0].astype(np.float32)
        return ScorerOutput(values, {"pid": np.full(len(values), os.getpid(), np.float32)})


class Faulty(FirstByte):
    """Does what metadata["do"] says: raise, hang, die once (leaving the file metadata["mark"]), be
    misshapen, give metadata["value"] or skip."""

    def score(self, images: NDArray[np.uint8], prompts: list[Prompt]) -> ScorerOutput:
        metadata = prompts[0].metadata
        output = super().score(images, prompts)
        match metadata.get("do"):
            case "raise":
                raise RuntimeError("asked to raise")
            case "hang":
                time.sleep(3600)
            case "die" if not Path(metadata["mark"]).exists():
                Path(metadata["mark"]).touch()
                os._exit(1)
            case "misshapen":
                return ScorerOutput(output.values[1:])
            case "value":
                output.values[0] = metadata["value"]
            case "skip":
                return ScorerOutput(output.values, unscorable=(1,))
        return output


class FaultyToo(Faulty):
    """Another of that kind."""


class Unbuildable(FirstByte):
    """Misses something it needs."""

    def __init__(self, options: Section) -> None:
        raise FileNotFoundError("no weights at /nowhere")


class BuildsAtTimesOptions(Section):
    """builds: a directory in which each build leaves a mark; failing: which builds, counted from 0, fail."""

    builds: str
    failing: tuple[int, ...]


class BuildsAtTimes(Faulty):
    """Cannot be built each time."""

    options_model = BuildsAtTimesOptions

    def __init__(self, options: BuildsAtTimesOptions) -> None:
        number = len(list(Path(options.builds).iterdir()))
        (Path(options.builds) / str(number)).touch()
        if number in options.failing:
            raise OSError("the disk is away")
