"""A scorer that runs elsewhere: images and prompts go to a service as JSON, scores come back."""

from __future__ import annotations

import ipaddress
import os
from base64 import b64encode
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError, model_validator

from common.config import ConfigError, Positive, Section
from common.records import encode_png
from common.types import Prompt
from rewards.scorer import Scorer, ScorerOutput

BUSY = (429, 502, 503, 504)


class HttpOptions(Section):
    """Where the service is and how long it may take."""

    url: str
    """http or https address that scores are asked of with POST."""
    remote: bool = False
    """Allow a service on another machine; without it the address must be this one's loopback."""
    token_env: str | None = None
    """Environment variable of the reward actor's node whose content goes along as a bearer token."""
    timeout_s: Positive = 30.0
    """Longest wait for one answer. With the retries it should stay below the reward's deadline_s."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Further tries, a moment apart, where nobody answers or the service says that it is busy (429, 502, 503, 504)."""

    @model_validator(mode="after")
    def _address(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url is no http address; give e.g. http://127.0.0.1:8000/score")
        if not (self.remote or _loopback(parts.hostname)):
            raise ValueError(f"url leaves this machine for {parts.hostname}; set remote=true if that is meant")
        return self


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


class Scores(BaseModel):
    """What the service answers: a score per image, null for one it cannot judge, and further columns of the same."""

    scores: list[float | None]
    components: dict[str, list[float | None]] = {}


class HttpScorer(Scorer):
    """Asks for the scores of a group with one request.

    It holds `images`, base64 of PNGs, and as many `prompts` with id, text and metadata.
    """

    options_model = HttpOptions

    def __init__(self, options: HttpOptions) -> None:
        import urllib3

        self._options = options
        self._headers = {"Content-Type": "application/json"}
        if options.token_env:
            if not (token := os.environ.get(options.token_env)):
                raise ConfigError(
                    f"reward http: token_env names {options.token_env}, which is not set on the reward actor's node; "
                    "set it where `ray start` runs"
                )
            self._headers["Authorization"] = f"Bearer {token}"
        retries = urllib3.Retry(
            options.retries,
            status_forcelist=BUSY,
            allowed_methods=None,
            backoff_factor=0.2,
            raise_on_status=False,
        )
        self._pool = urllib3.PoolManager(retries=retries, timeout=urllib3.Timeout(total=options.timeout_s))

    def score(self, images: NDArray[np.uint8], prompts: list[Prompt]) -> ScorerOutput:
        """RuntimeError if the service does not answer, or not with scores of these images."""
        import urllib3

        asked = {
            "images": [b64encode(encode_png(image)).decode() for image in images],
            "prompts": [{"id": p.id, "text": p.text, "metadata": dict(p.metadata)} for p in prompts],
        }
        url = self._options.url
        try:
            # A redirection could lead the images and the token elsewhere.
            answer = self._pool.request("POST", url, json=asked, headers=self._headers, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            raise RuntimeError(f"{url} does not answer: {error}") from error
        if answer.status != 200:
            raise RuntimeError(f"{url} answers {answer.status} {answer.reason}")
        return _output(url, answer.data, len(images))


def _output(url: str, data: bytes, size: int) -> ScorerOutput:
    try:
        got = Scores.model_validate_json(data)
    except ValidationError as error:
        first: Any = error.errors()[0]
        raise RuntimeError(f"{url} answers something else than scores: {first['loc']}: {first['msg']}") from error
    if len(got.scores) != size:
        raise RuntimeError(f"{url} answers {len(got.scores)} scores for {size} images")
    columns = got.components.items()
    return ScorerOutput(
        np.array([0.0 if score is None else score for score in got.scores], np.float32),
        {name: np.array([np.nan if v is None else v for v in column], np.float32) for name, column in columns},
        tuple(i for i, score in enumerate(got.scores) if score is None),
    )
