"""Which parameters are trained: the printed table, what may be frozen, and that frozen parts do not move."""

from __future__ import annotations

import pytest
from chains import changed, make_chains, make_engine, micro_batch, snapshot, train_config
from golden_numbers import CHECKPOINT

from common.bagel import checkpoint as store
from common.bagel.checkpoint import Checkpoint
from common.config import ConfigError, Model, Optimizer
from common.parameters import freeze, table
from common.policy import outline
from learner.update import Updater


def test_every_parameter_is_in_exactly_one_part_of_the_table() -> None:
    """Built without reading a tensor; the sizes add up to the model's."""
    skeleton = outline(Model(path=str(CHECKPOINT))).skeleton
    assert skeleton is not None
    policy = skeleton()
    assert {p.device.type for p in policy.parameters()} == {"meta"}
    freeze(policy, ["language_model.model.embed_tokens.*", "llm2vae.bias"])
    text = table(policy, Optimizer(lr_reasoning=1e-6, lr_denoising=3e-5))
    titles = [line for line in text.splitlines()[1:] if not line.startswith("    ")]
    assert titles[0].startswith("  reasoning, learning rate 1e-06: ")
    assert titles[1].startswith("  denoising, learning rate 3e-05: ")
    assert titles[2].startswith("  frozen: ")
    counts = [
        [int(part.replace(",", "")) for part in title.split(": ")[1].split() if part[0].isdigit()] for title in titles
    ]
    assert sum(numbers for numbers, _ in counts) == sum(p.numel() for p in policy.parameters())
    assert sum(tensors for _, tensors in counts) == len(list(policy.parameters()))
    layers = policy.config.llm_config.num_hidden_layers
    assert f"    language_model.model.layers.*.mlp_moe_gen.up_proj.weight x {layers}" in text.splitlines()
    frozen = text[text.index("  frozen") :]
    assert all(name in frozen for name in ("embed_tokens.weight", "llm2vae.bias", "latent_pos_embed.pos_embed"))


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["resoning"], "names 'resoning', which is neither a group .reasoning, denoising. nor fits"),
        (["reasoning", "*embed_tokens*"], r"names '\*embed_tokens\*', .* still trained"),
        (["reasoning", "denoising"], "leaves nothing to train"),
    ],
)
def test_what_cannot_be_frozen(patterns: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.frozen {words}"):
        freeze(store.load(CHECKPOINT).policy, patterns)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("pattern", ["reasoning", "denoising", "*.mlp_moe_gen.*"])
def test_frozen_parts_stay_and_the_rest_moves(golden_checkpoint: Checkpoint, pattern: str) -> None:
    policy, reference = (store.load(CHECKPOINT).policy for _ in range(2))
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    for one in (policy, reference):
        freeze(one, [pattern])
    frozen = trained - {name for name, p in policy.named_parameters() if p.requires_grad}
    assert frozen
    before = snapshot(policy)
    updater = Updater(make_engine(policy, lr=1e-3), reference, train_config(), 1e-4, 1)
    sums = updater.run([[micro_batch(golden_checkpoint, make_chains(golden_checkpoint, 3), [1.0, -1.0, 0.5])]], [3])
    assert sums["sum/image/velocity_mse"] == 0.0, "the reference computes with the same kernels"
    assert changed(policy, before) == trained - frozen
