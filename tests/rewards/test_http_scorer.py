"""The http scorer against a real server on loopback."""

from __future__ import annotations

import io
import json
import threading
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.config import ConfigError
from common.runtime import free_port
from common.types import Prompt
from rewards.actor import RewardActor
from rewards.scorer import ScorerOutput, build, check_options

IMAGES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
PROMPTS = [Prompt("a", "a cat", {"tag": "t"})] * 2
GOOD = {"scores": [0.25, None], "components": {"sharp": [1, 2]}}


class Service(ThreadingHTTPServer):
    """Answers with `replies` in turn, the last one again and again; keeps what it was asked."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, Any]] = [(200, GOOD)]
        self.asked: list[tuple[str | None, dict[str, Any]]] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.headers["Authorization"], body))
        status, reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        self.send_response(status)
        if status == 302:
            self.send_header("Location", reply)
        self.end_headers()
        self.wfile.write(reply.encode() if isinstance(reply, str) else json.dumps(reply).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(service: Service, **options: Any) -> ScorerOutput:
    return build("http", {"url": service.url, **options}).score(IMAGES, PROMPTS)


def test_images_and_prompts_go_out_and_scores_come_back(service: Service) -> None:
    output = ask(service)
    np.testing.assert_array_equal(output.values, np.array([0.25, 0], np.float32))
    assert output.unscorable == (1,)
    np.testing.assert_array_equal(output.components["sharp"], [1, 2])
    ((_, asked),) = service.asked
    assert asked["prompts"] == [{"id": "a", "text": "a cat", "metadata": {"tag": "t"}}] * 2
    sent = [np.array(Image.open(io.BytesIO(b64decode(image)))) for image in asked["images"]]
    np.testing.assert_array_equal(sent, IMAGES)


def test_what_cannot_be_judged_is_wrong_in_no_column(service: Service) -> None:
    """Evaluations take right and wrong from the components."""
    service.replies = [(200, {"scores": [1, None], "components": {"strict": [1, 0], "sharp": [None, 2]}})]
    chains = [SimpleNamespace(image=SimpleNamespace(pixels=pixels)) for pixels in IMAGES]
    group: Any = SimpleNamespace(prompt=PROMPTS[0], chains=chains)
    rewards = RewardActor("http", {"url": service.url}).score(group)
    np.testing.assert_array_equal(rewards.values, [1, np.nan])
    np.testing.assert_array_equal(rewards.components["strict"], [1, np.nan])
    np.testing.assert_array_equal(rewards.components["sharp"], [np.nan, np.nan])


def test_a_busy_service_is_asked_again_and_an_angry_one_is_not(service: Service) -> None:
    service.replies = [(503, ""), (429, ""), (200, GOOD)]
    assert ask(service).unscorable == (1,)
    assert len(service.asked) == 3
    service.replies = [(500, "")]
    with pytest.raises(RuntimeError, match=r"/score answers 500"):
        ask(service)
    assert len(service.asked) == 4
    service.replies = [(503, "")]
    with pytest.raises(RuntimeError, match=r"/score answers 503"):
        ask(service, retries=1)
    assert len(service.asked) == 6


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("<html>", "something else than scores"),
        ({"score": [1, 2]}, "something else than scores"),
        ({"scores": ["high", "low"]}, "something else than scores"),
        ({"scores": [1]}, "answers 1 scores for 2 images"),
    ],
)
def test_an_answer_that_is_no_scores(service: Service, reply: Any, message: str) -> None:
    service.replies = [(200, reply)]
    with pytest.raises(RuntimeError, match=message):
        ask(service)


def test_a_redirection_is_not_followed(service: Service) -> None:
    service.replies = [(302, service.url), (200, GOOD)]
    with pytest.raises(RuntimeError, match="answers 302"):
        ask(service)
    assert len(service.asked) == 1


def test_nobody_answers() -> None:
    url = f"http://127.0.0.1:{free_port()}/score"
    with pytest.raises(RuntimeError, match=r"/score does not answer"):
        build("http", {"url": url, "retries": 0}).score(IMAGES, PROMPTS)


def test_the_token_comes_from_the_environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"token_env names SCORER_TOKEN, which is not set"):
        ask(service, token_env="SCORER_TOKEN")
    monkeypatch.setenv("SCORER_TOKEN", "s3cret")
    service.replies = [(500, "")]
    with pytest.raises(RuntimeError) as error:
        ask(service, token_env="SCORER_TOKEN")
    assert service.asked[0][0] == "Bearer s3cret" and "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://127.0.0.1/score"}, "no http address"),
        ({"url": "http://scores.example/score"}, r"leaves this machine for scores\.example; set remote=true"),
        ({"url": "http://10.0.0.1/score"}, r"leaves this machine for 10\.0\.0\.1"),
    ],
)
def test_an_address_that_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options("http", options)


@pytest.mark.parametrize("url", ["http://localhost:1/s", "http://127.0.0.2/s", "http://[::1]:8000/s"])
def test_loopback_needs_no_permission(url: str) -> None:
    check_options("http", {"url": url})
    check_options("http", {"url": "https://scores.example/s", "remote": True})
