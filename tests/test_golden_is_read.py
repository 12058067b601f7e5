"""No recorded array lies there unread. Runs last (suite_order.py), and only where all who read them ran."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden_numbers import GOLDEN, READ
from suite_order import reads_golden


def test_every_recorded_array_is_read_by_a_test(request: pytest.FixtureRequest) -> None:
    readers = {path for path in Path(__file__).parent.rglob("test_*.py") if reads_golden(path)}
    session, chosen = request.session, request.config.option
    ran = {item.path for item in session.items}
    if readers - ran or chosen.keyword or chosen.markexpr or any("::" in argument for argument in request.config.args):
        pytest.skip("needs every test that reads recorded numbers")
    if session.testsfailed:
        pytest.skip("what a failed test would have read is not known")
    unread = []
    for path in sorted(GOLDEN.rglob("*.npz")):
        file = str(path.relative_to(GOLDEN))
        with np.load(path) as arrays:
            unread += [f"{file}: {name}" for name in arrays.files if name not in READ.get(file, ())]
    assert not unread
