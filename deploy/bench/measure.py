"""What benchmarks share: timing on a CPU or a GPU, the rate of a plain matrix product, random policies of any size."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from common.bagel.config import BagelConfig, VAEConfig
from common.bagel.policy import BagelPolicy, sincos_2d

MIDDLE = {
    "hidden_size": 512,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1408,
    "vocab_size": 4096,
}


def best(function: Callable[[], object], repeat: int, device: str = "cpu", warm: bool = True) -> float:
    """Shortest wall time of several calls in seconds, after one unmeasured if `warm`; waits for the device."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    if warm:
        function()
    times = []
    for _ in range(repeat):
        wait()
        started = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - started)
    return min(times)


def matrix_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations per second of a square product: 2048 a side on a CPU, 8192 on a GPU."""
    side = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / best(lambda: a @ b, 10, device)


def bagel_config(sizes: dict[str, int], max_latent_size: int) -> BagelConfig:
    """The released autoencoder's geometry around a decoder of the given sizes."""
    return BagelConfig.model_validate(
        {"llm_config": sizes, "vae_config": VAEConfig().model_dump(), "max_latent_size": max_latent_size}
    )


def random_policy(config: BagelConfig, dtype: torch.dtype, device: str = "cpu") -> BagelPolicy:
    """Random weights made on the device itself, so that a model of any size exists once; nothing is zero."""
    with torch.device("meta"):
        policy = BagelPolicy(config, (3, 4)).to(dtype)
    policy.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name else 0.0)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        policy.latent_pos_embed.pos_embed.copy_(sincos_2d(config.max_latent_size, config.llm_config.hidden_size))
    return policy
