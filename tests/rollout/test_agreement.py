"""vLLM and the learner give a sampled token the same log-probability, in each compute type to its own bound."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_numbers import CHECKPOINT, GOLDEN

from common.bagel import checkpoint as store
from rollout.reasoner import Reasoner
from rollout.reasoner_dir import write_reasoner_dir

# Largest and mean |difference| allowed.
BOUNDS = {"float32": (1e-5, 3e-6), "bfloat16": (0.2, 0.03)}


@pytest.mark.parametrize("dtype", BOUNDS)
@torch.no_grad()
def test_sampled_tokens_have_the_learners_log_probs(tmp_path: Path, dtype: str) -> None:
    loaded = store.load(CHECKPOINT, getattr(torch, dtype))
    write_reasoner_dir(tmp_path / "reasoner", loaded.reasoner, loaded.policy.reasoning_weights())
    texts = json.loads((GOLDEN / "README.json").read_text())["texts"]
    prompts = [
        loaded.chat.prompt_ids(texts[key], texts["system"]) for key in ("prompt", "prompt2", "edit", "question")
    ] * 8
    limit = max(map(len, prompts)) + 24
    reasoner = Reasoner(
        tmp_path / "reasoner", eos_token_id=loaded.chat.end, dtype=dtype, max_model_len=limit, max_batch=len(prompts)
    )
    try:
        completions = reasoner.generate(prompts, list(range(len(prompts))), max_tokens=24)
    finally:
        reasoner.close()
    learner = loaded.policy.token_logprobs([p + c.ids for p, c in zip(prompts, completions, strict=True)])
    pairs = [
        np.abs(scores[len(prompt) - 1 :].numpy() - np.array(completion.logprobs))
        for prompt, completion, scores in zip(prompts, completions, learner, strict=True)
    ]
    difference = np.concatenate(pairs)
    print(f"{dtype}: {len(difference)} tokens, max {difference.max():.2g}, mean {difference.mean():.2g}")
    largest, mean = BOUNDS[dtype]
    assert difference.max() < largest
    assert difference.mean() < mean
