"""What the tests of the update share."""

from __future__ import annotations

import pytest
from chains import make_chains
from golden_numbers import CHECKPOINT
from watched import COUNT

from common.bagel import checkpoint as store
from common.bagel.checkpoint import Checkpoint
from common.bagel.policy import BagelPolicy
from common.types import Chain


@pytest.fixture(scope="module")
def chains(golden_checkpoint: Checkpoint) -> list[Chain]:
    return make_chains(golden_checkpoint, COUNT)


@pytest.fixture
def policy() -> BagelPolicy:
    return store.load(CHECKPOINT).policy
