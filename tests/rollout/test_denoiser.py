"""Drawing against recorded trajectories: the reference's ODE and flow_grpo's SDE window."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from golden_numbers import ATOL, COMBINED, close, described, golden, meaning, settings, tensor

from common.bagel import vae
from common.bagel.checkpoint import Checkpoint
from common.bagel.decoder import Packing
from common.config import Cfg
from common.policy import Guidance
from common.types import ImageSegment
from rollout.denoiser import Denoiser

SHIFT = 3.0


def denoiser_for(checkpoint: Checkpoint, file: str, noise_level: float, shift: float = SHIFT) -> Denoiser:
    height, width = golden(file)["image_hw"].tolist()
    return Denoiser(checkpoint, height, width, shift, noise_level)


def with_noise(monkeypatch: pytest.MonkeyPatch, denoiser: Denoiser, rows: list[np.ndarray]) -> None:
    """Recorded noise in place of what a seed gives: for each chain the start, then one draw per window step."""
    monkeypatch.setattr(denoiser, "_noise", lambda seeds, size: torch.stack([tensor(row) for row in rows]))


def as_pixels(image: np.ndarray) -> np.ndarray:
    """[3, H, W] in [0, 1] -> uint8 [H, W, 3], truncated."""
    return (image * 255).astype(np.uint8).transpose(1, 2, 0)


def same_image(found: np.ndarray, wanted: np.ndarray) -> None:
    """A value on the border between two integers may fall to the other side."""
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
    assert (found == wanted).mean() > 0.995


def small(checkpoint: Checkpoint, noise_level: float = 0.7) -> Denoiser:
    side = checkpoint.config.pixels_per_token
    return Denoiser(checkpoint, 2 * side, 3 * side, SHIFT, noise_level)


def contexts(checkpoint: Checkpoint, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, checkpoint.config.llm_config.vocab_size, n).tolist() for n in lengths]


def recorded_cfg(name: str) -> Cfg:
    """Guidance of a recorded trajectory (off_x, cfg_x)."""
    recorded = settings("bagel/ode.npz", name)
    return Cfg(
        text_scale=recorded["cfg_text_scale"],
        image_scale=recorded["cfg_img_scale"],
        interval=recorded["cfg_interval"],
        renorm=re.findall(r"cfg_renorm_type='(\w+)'", meaning("bagel/ode.npz", name))[0],
    )


@pytest.mark.parametrize("kind", ["off", "cfg"])
def test_ode_trajectory_and_image(golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A window over all steps without noise is the ODE, and shows every state of it."""
    ode, velocity, config = golden("bagel/ode.npz"), golden("bagel/velocity.npz"), golden_checkpoint.config
    shift = float(re.findall(r"timestep_shift=([\d.]+)", meaning("bagel/ode.npz", "off_x"))[0])
    denoiser, points = denoiser_for(golden_checkpoint, "bagel/ode.npz", 0.0, shift), len(ode["timesteps"])
    start = ode["init_noise"][None]
    noise = np.concatenate([start, np.ones((points - 1, *start.shape[1:]), np.float32)])
    with_noise(monkeypatch, denoiser, [noise])
    system, prompt = velocity["ctx_system_ids"].tolist(), velocity["ctx_prompt_ids"].tolist()
    guidance = Guidance(recorded_cfg(f"{kind}_x"), [system], [system + prompt])
    atol = COMBINED if kind == "cfg" else ATOL
    (drawn,) = denoiser.draw([ode["ctx_ids"].tolist()], [0], [(0, points - 1)], points, guidance)
    close(drawn.x_t, ode[f"{kind}_x"][:-1], atol)
    close(drawn.x_next, ode[f"{kind}_x"][1:], atol)
    close(drawn.t, ode["timesteps"][:-1], atol=1e-6)
    close(drawn.t_next, ode["timesteps"][1:], atol=1e-6)
    final = tensor(ode[f"{kind}_x"][-1:])
    close(vae.unpack(final, denoiser.grid, config.latent_patch_size), ode[f"{kind}_latent"], atol=0)
    with torch.no_grad():
        close(vae.decode(golden_checkpoint.vae, config, final, denoiser.grid), ode[f"{kind}_pixels"])
    same_image(drawn.pixels, ode[f"{kind}_uint8"])


def test_prompt_to_reasoning_to_guided_image(golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's whole inference. It decodes and re-encodes the reasoning; a rollout keeps the sampled ids."""
    e2e, chat, policy = golden("bagel/e2e.npz"), golden_checkpoint.chat, golden_checkpoint.policy
    what = described("bagel")["e2e.npz"]["what"]
    text_scale, image_scale = (float(x) for x in re.findall(r"(?:text|img) ([\d.]+\d)", what))
    points = int(re.findall(r"(\d+) timesteps", what)[0])
    system = golden("bagel/velocity.npz")["ctx_system_ids"].tolist()
    prompt, generated = e2e["prompt_ids"].tolist(), e2e["generated"].tolist()
    ids = [*system, *prompt, chat.start]
    for _ in generated[1:]:
        with torch.no_grad():
            hidden, _ = policy.read(torch.tensor(ids), Packing.of([len(ids)], policy.device))
            ids.append(int(policy.language_model.lm_head(hidden[-1]).argmax()))
    assert ids[-len(generated) :] == generated
    spoken = chat.tokenizer.decode(generated, skip_special_tokens=False).removeprefix("<|im_start|>")
    assert spoken == described("bagel")["e2e.npz"]["text"]
    assert chat.wrap(spoken) == e2e["think_ids_fed_back"].tolist()

    context = [*system, *prompt, *chat.wrap(spoken)]
    assert [len(context)] == e2e["gen_context_len"].tolist()
    height, width = e2e["image_hw"].tolist()
    denoiser = Denoiser(golden_checkpoint, height, width, SHIFT, 0.0)
    with_noise(monkeypatch, denoiser, [e2e["init_noise"][None]])
    cfg = Cfg(text_scale=text_scale, image_scale=image_scale)
    (drawn,) = denoiser.draw([context], [0], [None], points, Guidance(cfg, [system], [[*system, *prompt]]))
    same_image(drawn.pixels, e2e["uint8"])


def test_ode_image_without_a_window(golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """As evaluation draws; beside a chain with a longer context and with noise of its own."""
    ode = golden("bagel/ode.npz")
    denoiser, points = denoiser_for(golden_checkpoint, "bagel/ode.npz", 0.8), len(ode["timesteps"])
    start = ode["init_noise"][None]
    longer = [*ode["ctx_ids"].tolist(), *ode["ctx_ids"].tolist()]
    with_noise(monkeypatch, denoiser, [np.concatenate([start] * 3)] * 2)
    plain, other = denoiser.draw([ode["ctx_ids"].tolist(), longer], [0, 1], [None, (1, 2)], points)
    same_image(plain.pixels, ode["off_uint8"])
    assert plain.x_t.shape == (0, *start.shape[1:])
    assert len(plain.t) == len(plain.t_next) == 0
    assert (other.pixels != ode["off_uint8"]).mean() > 0.1


def test_recorded_sde_window(golden_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """flow_grpo's rollout: three SDE steps between Euler steps, to the final image."""
    rollout = golden("flowgrpo/rollout.npz")
    denoiser = denoiser_for(golden_checkpoint, "flowgrpo/rollout.npz", 0.8)
    first, size, points = int(rollout["window_begin"]), len(rollout["window_noise"]), len(rollout["velocities"]) + 1
    with_noise(monkeypatch, denoiser, [np.concatenate([rollout["init_noise"][None], rollout["window_noise"]])])
    (drawn,) = denoiser.draw([rollout["ctx_ids"].tolist()], [0], [(first, size)], points)
    close(drawn.x_t, rollout["window_latents"][:-1])
    close(drawn.x_next, rollout["window_latents"][1:])
    close(drawn.v_old, rollout["velocities"][first : first + size])
    close(drawn.t, rollout["window_timesteps"], atol=1e-6)
    same_image(drawn.pixels, as_pixels(rollout["final_image"]))


def test_window_states_are_joined_by_the_recorded_noise(golden_checkpoint: Checkpoint) -> None:
    """x_next of a window step is x_t of the next one; outside nothing is kept."""
    denoiser = small(golden_checkpoint)
    drawn = denoiser.draw(contexts(golden_checkpoint, (4, 9, 6)), [1, 2, 3], [(0, 3), (2, 3), None], 7)
    for one in drawn[:2]:
        assert one.x_t.dtype == one.x_next.dtype == one.v_old.dtype == np.float32
        assert (one.x_next[:-1] == one.x_t[1:]).all()
        assert (one.t_next[:-1] == one.t[1:]).all()
    assert drawn[0].t[0] == 1.0
    assert drawn[1].t[0] < drawn[0].t[1]
    assert len(drawn[2].x_t) == 0
    assert drawn[0].pixels.dtype == np.uint8


def one_by_one(denoiser: Denoiser, texts: list[list[int]], windows: list[tuple[int, int] | None]) -> list[ImageSegment]:
    return [
        denoiser.draw([text], [seed], [window], 7)[0]
        for seed, (text, window) in enumerate(zip(texts, windows, strict=True))
    ]


def test_a_chain_is_the_same_alone_and_in_a_batch(golden_checkpoint: Checkpoint) -> None:
    """Contexts of other lengths, windows that start elsewhere, and evaluation chains beside it change nothing."""
    denoiser, texts = small(golden_checkpoint), contexts(golden_checkpoint, (4, 11, 7, 25))
    windows: list[tuple[int, int] | None] = [(0, 3), (2, 3), None, (1, 2)]
    together = denoiser.draw(texts, list(range(4)), windows, 7)
    for packed, alone in zip(together, one_by_one(denoiser, texts, windows), strict=True):
        for name in ("x_t", "x_next", "v_old"):
            close(getattr(packed, name), getattr(alone, name), atol=1e-4)
        assert (packed.t == alone.t).all()
        assert np.abs(packed.pixels.astype(int) - alone.pixels.astype(int)).max() <= 1


def test_noise_is_the_chains_own(golden_checkpoint: Checkpoint) -> None:
    denoiser = small(golden_checkpoint)
    text = contexts(golden_checkpoint, (5,))[0]
    drawn = denoiser.draw([text] * 4, [11, 12, 11, 2**62 - 1], [(0, 3)] * 4, 7)
    assert (drawn[0].x_next == drawn[2].x_next).all(), "the same seed redraws the same chain"
    for other in (1, 3):
        assert (drawn[0].x_t[0] != drawn[other].x_t[0]).mean() > 0.99
    # The start and the three draws of one chain are four different ones.
    noise = denoiser._noise([11], 3)[0]
    assert len({tuple(part.flatten()[:4].tolist()) for part in noise}) == 4


def test_window_steps_have_the_noise_of_their_std(golden_checkpoint: Checkpoint) -> None:
    """(x' - mu) / s is the drawn noise: standard normal, and independent of the state."""
    from common import flow

    denoiser = small(golden_checkpoint, noise_level=0.8)
    (drawn,) = denoiser.draw(contexts(golden_checkpoint, (5,)), [3], [(1, 3)], 7)
    move = flow.sde_step(torch.tensor(drawn.t), torch.tensor(drawn.t_next), 0.8)
    mean = flow.mean_of(move, torch.tensor(drawn.x_t), torch.tensor(drawn.v_old))
    z = (torch.tensor(drawn.x_next) - mean) / move.std[:, None, None]
    close(z, denoiser._noise([3], 3)[0, 1:], atol=1e-4)
    assert abs(z.mean().item()) < 0.15
    assert abs(z.std().item() - 1) < 0.1
