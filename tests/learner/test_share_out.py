"""Chains are dealt out to ranks, minibatches and micro-batches, each exactly once."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.update import share_out


@given(
    mask=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=12),
    ranks=st.integers(1, 4),
    minibatches=st.integers(1, 3),
    micro=st.integers(1, 7),
)
@settings(max_examples=150)
def test_every_contributing_chain_is_dealt_exactly_once(
    mask: list[list[bool]], ranks: int, minibatches: int, micro: int
) -> None:
    array = np.array(mask)
    shares = [share_out(array, rank, ranks, minibatches, micro) for rank in range(ranks)]
    dealt = [entry for share in shares for mini in share.pieces for piece in mini for entry in piece]
    assert all(weight in (0.0, 1.0) for *_, weight in dealt)
    assert Counter((b, g) for b, g, weight in dealt if weight) == Counter(zip(*np.nonzero(array), strict=True))
    assert all(array[b, g] for b, g, _ in dealt), "a filler is a chain that has an advantage, too"
    for share in shares:
        assert share.total == shares[0].total
        assert len(share.pieces) == minibatches
        # Every micro-batch is a collective: a rank with fewer of them would hang the others.
        assert [len(mini) for mini in share.pieces] == [len(mini) for mini in shares[0].pieces]
        assert all(1 <= len(piece) <= micro for mini in share.pieces for piece in mini)
    assert sum(shares[0].total) == array.sum()
    per_minibatch = [sum(w for s in shares for piece in s.pieces[m] for *_, w in piece) for m in range(minibatches)]
    assert per_minibatch == shares[0].total
    assert max(shares[0].total) - min(shares[0].total) <= 1


def test_a_filler_has_no_weight() -> None:
    mask = np.array([[True, False], [False, False]])
    assert share_out(mask, 0, 2, 1, 4).pieces == [[[(0, 0, 1.0)]]]
    assert share_out(mask, 1, 2, 1, 4).pieces == [[[(0, 0, 0.0)]]]
