"""BAGEL as a policy: text log-probs and velocities from one set of weights, under the released names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common.bagel import cfg as guidance
from common.bagel import vae as vae_ops
from common.bagel.config import BagelConfig, LLMConfig
from common.bagel.decoder import Context, Decoder, Packing
from common.bagel.vit import MLP, VisionTower
from common.config import Cfg
from common.lora import plain_weights
from common.policy import Policy, PolicyOutput, score_logits

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

TIME_FREQUENCIES = 128


def sincos_2d(side: int, dim: int) -> Tensor:
    """Frozen position table [side*side, dim]: first half of dim the column, second half the row, each sin then cos."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angle.sin(), angle.cos()], 1)
    column = line[None].expand(side, side, -1)
    row = line[:, None].expand(side, side, -1)
    return torch.cat([column, row], -1).reshape(side * side, dim).float()


def places(grid: tuple[int, int], side: int, device: torch.device) -> Tensor:
    """Rows [rows * columns] of a position table for the tokens of an image, row-major."""
    row, col = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    return (row * side + col).flatten()


class TimeEmbedder(nn.Module):
    """t in [0, 1], unscaled -> [M, H] (BAGEL's time_embedder)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor) -> Tensor:
        k = torch.arange(TIME_FREQUENCIES, device=t.device, dtype=torch.float32)
        angle = t.float()[:, None] * torch.exp(-math.log(1e4) * k / TIME_FREQUENCIES)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(next(self.mlp.parameters()).dtype))


class PositionTable(nn.Module):
    """Frozen 2-D sin-cos table. Its numbers are a tensor of the checkpoint, or those of `init_weights`."""

    def __init__(self, side: int, hidden: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(side * side, hidden), requires_grad=False)

    def forward(self, places: Tensor) -> Tensor:
        """Places [N] -> [N, H]."""
        return self.pos_embed[places]


class LanguageModel(nn.Module):
    """Decoder and head (`language_model.*`)."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


@dataclass(frozen=True)
class PackedBatch:
    """One training forward: B texts read once, M noised images that attend to them.

    ids [T] flat token ids; packing their layout; rows [P] flat rows whose next token is scored, targets [P] those
    tokens; x_t [M, N, D], t [M], owner [M] the text (row of the context) each image belongs to; grid (rows, cols);
    guided images have further owners, the texts without the prompt and without the reasoning, and cfg.
    """

    ids: Tensor
    packing: Packing
    rows: Tensor
    targets: Tensor
    x_t: Tensor
    t: Tensor
    owner: Tensor
    grid: tuple[int, int]
    branches: tuple[Tensor, ...] = ()
    cfg: Cfg | None = None


class BagelPolicy(Policy):
    """The unified policy. Shapes: M images of N latent tokens with D numbers, H hidden."""

    def __init__(self, config: BagelConfig, markers: tuple[int, int], understanding: bool = False) -> None:
        """markers: ids of vision_start and vision_end; understanding: with the tower that sees images."""
        super().__init__()
        hidden = config.llm_config.hidden_size
        self.config, self.markers = config, markers
        self.language_model = LanguageModel(config.llm_config)
        self.time_embedder = TimeEmbedder(hidden)
        self.vae2llm = nn.Linear(config.token_dim, hidden)
        self.llm2vae = nn.Linear(hidden, config.token_dim)
        self.latent_pos_embed = PositionTable(config.max_latent_size, hidden)
        self.vit_model = self.connector = self.vit_pos_embed = None
        if understanding and config.vit_config:
            self.vit_model = VisionTower(config.vit_config)
            self.connector = MLP(config.vit_config.hidden_size, hidden, hidden)
            self.vit_pos_embed = PositionTable(config.vit_max_num_patch_per_side, hidden)
            # Nothing here trains it; who does asks for its gradients.
            self.vit_model.requires_grad_(False)
            self.connector.requires_grad_(False)

    def init_weights(self, seed: int) -> None:
        """Random weights for training from nothing: normal(0, 0.02), residual outputs scaled down by depth, zero
        velocity at first; and the table of positions."""
        table = self.latent_pos_embed.pos_embed
        table.copy_(sincos_2d(self.config.max_latent_size, table.shape[1]))
        generator = torch.Generator().manual_seed(seed)
        depth = self.config.llm_config.num_hidden_layers
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad or "norm" in name:
                continue
            if parameter.ndim == 1 or name.startswith("llm2vae"):
                nn.init.zeros_(parameter)
            else:
                residual = "o_proj" in name or "down_proj" in name
                std = 0.02 / math.sqrt(2 * depth) if residual else 0.02
                std = parameter.shape[1] ** -0.5 if name.startswith(("vae2llm", "time_embedder")) else std
                nn.init.normal_(parameter, std=std, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.vae2llm.weight.device

    @property
    def vocab_size(self) -> int:
        return self.config.llm_config.vocab_size

    def read(self, ids: Tensor, packing: Packing) -> tuple[Tensor, Context]:
        """ids [T] -> hidden [T, H] and the context that images attend to."""
        return self.language_model.model.read(ids, packing)

    def prefill(self, texts: list[list[int]]) -> Context:
        """Context of B texts given as token ids."""
        flat = torch.tensor([i for text in texts for i in text], dtype=torch.long, device=self.device)
        return self.read(flat, Packing.of([len(text) for text in texts], self.device))[1]

    def score(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """hidden [P, H], targets [P] -> log p(target) [P] and entropy [P] of the tempered softmax, fp32."""
        return score_logits(self.language_model.lm_head(hidden), targets, temperature)

    def token_logprobs(self, texts: list[list[int]]) -> list[Tensor]:
        """log p of every token after the first, one fp32 tensor [len - 1] per text."""
        empty = torch.zeros(0, device=self.device)
        batch = pack_batch(texts, [(1, len(text)) for text in texts], empty, empty, empty, (0, 0))
        hidden, _ = self.read(batch.ids, batch.packing)
        return list(self.score(hidden[batch.rows], batch.targets)[0].split([len(text) - 1 for text in texts]))

    def embed_latents(self, x_t: Tensor, t: Tensor, grid: tuple[int, int]) -> Tensor:
        """x_t [M, N, D], t [M] -> what the generation expert reads [M, N, H]."""
        dtype = self.vae2llm.weight.dtype
        place = self.latent_pos_embed(places(grid, self.config.max_latent_size, x_t.device)).to(dtype)
        return self.vae2llm(x_t.to(dtype)) + self.time_embedder(t)[:, None] + place

    def embed_patches(self, pixels: list[Tensor], grids: list[tuple[int, int]]) -> Tensor:
        """Patches [N, p*p*C] of images -> what the understanding expert reads [sum of N, H]. ValueError if the policy
        was loaded without its understanding tower."""
        if self.vit_model is None or self.connector is None or self.vit_pos_embed is None:
            raise ValueError("this policy is without its understanding tower; load the checkpoint with understanding")
        at = torch.cat([places(grid, self.config.vit_max_num_patch_per_side, self.device) for grid in grids])
        packing = Packing.of([len(patches) for patches in pixels], self.device)
        features = self.vit_model(torch.cat(pixels).to(self.device, self.vae2llm.weight.dtype), at, packing)
        return self.connector(features) + self.vit_pos_embed(at).to(features.dtype)

    def velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        context: Context,
        grid: tuple[int, int],
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Tensor:
        """x_t [M, N, D], t [M], context with M rows -> v [M, N, D] fp32 (v = noise - data); within as for `draw`."""
        latents = self.embed_latents(x_t, t, grid)
        ids = torch.tensor(self.markers, device=x_t.device)
        markers = self.language_model.model.embed_tokens(ids).expand(x_t.shape[0], -1, -1)
        return self.llm2vae(self.language_model.model.draw(latents, markers, context, within)).float()

    def forward(self, batch: PackedBatch, image_grad_to_text: bool = True, temperature: float = 1.0) -> PolicyOutput:
        """The packed forward of the learner: every text once, all images of all chains together."""
        hidden, context = self.read(batch.ids, batch.packing)
        logprobs, entropy = self.score(hidden[batch.rows], batch.targets, temperature)
        if image_grad_to_text:
            velocity = self._velocity_of(batch, context)
        else:
            with self._constant_reasoning():
                velocity = self._velocity_of(batch, context.detach(), self._constant_reasoning)
        return PolicyOutput(logprobs, entropy, velocity)

    def _velocity_of(
        self,
        batch: PackedBatch,
        context: Context,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Tensor:
        """[M, N, D], the branches of guided images in one pass."""
        if batch.cfg is None:
            return self.velocity(batch.x_t, batch.t, context.take(batch.owner), batch.grid, within)
        owners, times = torch.cat([batch.owner, *batch.branches]), 1 + len(batch.branches)
        x_t, t = batch.x_t.repeat(times, 1, 1), batch.t.repeat(times)
        v, v_text, *v_image = self.velocity(x_t, t, context.take(owners), batch.grid, within).chunk(times)
        guided = guidance.combine(v, v_text, v_image[0] if v_image else None, batch.cfg)
        return torch.where(guidance.active(batch.t, batch.cfg)[:, None, None], guided, v)

    @contextmanager
    def _constant_reasoning(self) -> Iterator[None]:
        """The markers around an image take the understanding expert, too; in here its weights get no gradient."""
        parameters = [parameter for _, parameter in self.parameter_groups()["reasoning"]]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def recompute_activations(self) -> None:
        self.language_model.model.recompute = True

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters by role: `reasoning` (understanding expert, embeddings, head) and `denoising`."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {"reasoning": [], "denoising": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                text = name.startswith("language_model.") and "_moe_gen" not in name
                groups["reasoning" if text else "denoising"].append((name, parameter))
        return groups

    def reasoning_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The understanding half as a plain decoder: what the reasoning engine loads. A tied head comes once."""
        weights = {name: w for name, w in self.language_model.state_dict().items() if "_moe_gen" not in name}
        if self.config.llm_config.tie_word_embeddings:
            del weights["lm_head.weight"]
        yield from plain_weights(self.language_model, weights)


def pixels_to_tokens(vae: AutoencoderKL, config: BagelConfig, images: Tensor) -> Tensor:
    """uint8 images [M, H, W, 3] -> latent tokens [M, N, D]."""
    return vae_ops.encode(vae, config, vae_ops.from_uint8(images))


def pack_batch(
    texts: list[list[int]],
    scored: list[tuple[int, int]],
    x_t: Tensor,
    t: Tensor,
    owner: Tensor,
    grid: tuple[int, int],
) -> PackedBatch:
    """Lays out one forward. texts: B token lists; scored[b] = (first, end) of the tokens of text b that are
    predicted; x_t [M, N, D], t [M], owner [M] on the device to use."""
    device = x_t.device
    starts = [0]
    for text in texts:
        starts.append(starts[-1] + len(text))
    flat = torch.tensor([i for text in texts for i in text], device=device)
    place = [s + k for s, (first, end) in zip(starts, scored, strict=False) for k in range(first, end)]
    target = torch.tensor(place, dtype=torch.long, device=device)
    packing = Packing.of([len(text) for text in texts], device)
    return PackedBatch(flat, packing, target - 1, flat[target], x_t, t, owner, grid)
