"""BAGEL's architecture with random weights on one device, at growing size: speed, memory, and agreement with the CPU.

    python -m deploy.bench.gpu                        every size that fits, on the GPU
    python -m deploy.bench.gpu --device cpu --sizes tiny

Needs torch, pydantic, PyYAML, safetensors and tokenizers alone: no vLLM, DeepSpeed or diffusers. The learner's step is
forward, backward and torch's fused AdamW on the compute weights, without fp32 masters.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.bagel.config import BagelConfig
from common.bagel.flops import draw_flops
from common.bagel.policy import BagelPolicy
from common.sizes import describing
from deploy.bench.measure import MIDDLE, bagel_config, best, matrix_rate, random_policy
from deploy.bench.packed import Work, compare, packed, packed_flops, random_work


@dataclass(frozen=True)
class Size:
    """One model: its configuration, side of the token grid, tokens of text, chains of a forward."""

    config: BagelConfig
    side: int
    text: int
    chains: int


def size(name: str) -> Size:
    """tiny, 40M, 1B, 3B, or 7B-MoT, the released shapes at 1024 pixels."""
    if name == "tiny":
        return Size(BagelConfig.read(describing("deploy/models/shapes")), 4, 40, 4)
    released = BagelConfig.read(describing("models/BAGEL-7B-MoT"))
    if name == "7B-MoT":
        return Size(released, 64, 1200, 2)
    if name == "40M":
        return Size(bagel_config(MIDDLE, 16), 16, 64, 24)
    hidden, layers, heads, intermediate = {"1B": (1024, 24, 16, 4096), "3B": (2048, 24, 16, 5504)}[name]
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "intermediate_size": intermediate,
        "vocab_size": released.llm_config.vocab_size,
    }
    return Size(bagel_config(sizes, 64), 32, 600, 4)


def denoiser(policy: BagelPolicy, work: Work, rate: float, steps: int = 24) -> dict[str, float]:
    """Images per second at `steps` denoising steps, and the velocity's share of the matrix rate."""
    image = work.grid[0] * work.grid[1]
    with torch.no_grad():
        context = policy.prefill(work.texts)
        x, t = work.x_t[:, 0], work.t[:, 0]
        seconds = best(lambda: policy.velocity(x, t, context, work.grid), 3, policy.device.type)
    flops = sum(draw_flops(policy.config, image, len(text)) for text in work.texts)
    return {"images_per_s": work.chains / (steps * seconds), "denoiser_of_matrix_rate": flops / seconds / rate}


def learner(policy: BagelPolicy, work: Work, rate: float) -> dict[str, float]:
    """One packed forward, backward and optimizer step with recomputed activations; a third of a pass is recomputed."""
    cuda = policy.device.type == "cuda"
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=cuda)

    def step() -> None:
        packed(policy, work, micro=1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = best(step, 2, policy.device.type)
    peak = {"learner_peak_gb": torch.cuda.max_memory_allocated() / 1e9} if cuda else {}
    flops = packed_flops(policy.config, work) * 4 / 3
    return {"learner_step_s": seconds, "learner_of_matrix_rate": flops / seconds / rate, **peak}


def check(name: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """All measurements of one size."""
    what = size(name)
    rate = matrix_rate(dtype, device)
    policy = random_policy(what.config, dtype, device)
    work = random_work(
        what.config,
        chains=what.chains,
        window=3,
        context=(what.text, what.text),
        scored=what.text * 2 // 3,
        grid=(what.side, what.side),
        device=device,
    )
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in policy.parameters()),
        "matrix_tflops": rate / 1e12,
        **denoiser(policy, work, rate),
    }
    policy.language_model.model.recompute = True
    found |= learner(policy, work, rate)
    # Of the larger ones, packed keeps more than one device holds; their learner takes a chain at a time.
    if name in ("tiny", "40M"):
        policy.language_model.model.recompute = False
        found["packed_and_plain"] = dict(compare(policy, work, repeat=1))
    return found


def golden_policy(directory: Path, device: str, dtype: torch.dtype) -> BagelPolicy:
    """The recorded checkpoint's policy alone."""
    from safetensors.torch import load_file

    from common.bagel.text import ChatTokenizer

    config = BagelConfig.read(directory)
    chat = ChatTokenizer.read(directory, config.llm_config.vocab_size)
    policy = BagelPolicy(config, (chat.vision_start, chat.vision_end))
    wanted = policy.state_dict()
    found = {k: v for k, v in load_file(directory / "ema.safetensors").items() if k in wanted}
    # A tied head is stored once.
    policy.load_state_dict(found, strict=not config.llm_config.tie_word_embeddings)
    return policy.to(device, dtype).eval()


def parity(golden: Path, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Largest differences on the golden data: log-probs to the recorded ones, log-probs, velocities and gradients to
    those of fp32 on this machine's CPU."""
    with np.load(golden / "bagel" / "text.npz") as file:
        ids, recorded = file["c_ids"].tolist(), torch.from_numpy(file["c_logprobs"]).float()
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []
    for where, kind in (("cpu", torch.float32), (device, dtype)):
        policy = golden_policy(golden / "ckpt", where, kind)
        work = random_work(policy.config, chains=2, window=2, context=(20, 30), scored=8, grid=(2, 3), device=where)
        with torch.no_grad():
            logprobs = policy.token_logprobs([ids])[0].cpu()
            velocity = policy.velocity(work.x_t[:, 0], work.t[:, 0], policy.prefill(work.texts), work.grid).cpu()
        packed(policy, work)
        gradient = torch.cat([p.grad.flatten().float().cpu() for p in policy.parameters() if p.grad is not None])
        outputs.append((logprobs, velocity, gradient))
    (_, velocity, gradient), (logprobs, other, again) = outputs
    return {
        "logprobs_to_recorded": float((logprobs - recorded).abs().max()),
        "logprobs_to_cpu": float((logprobs - outputs[0][0]).abs().max()),
        "velocity_to_cpu": float((other - velocity).abs().max()),
        "gradient_to_cpu_relative": float((again - gradient).norm() / gradient.norm()),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Prints one JSON object per size as it is measured; a size that does not fit is reported as such."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--sizes", nargs="*", default=["tiny", "40M", "1B", "3B", "7B-MoT"])
    parser.add_argument("--golden", type=Path, default=Path(os.environ.get("UNIGRPO_GOLDEN") or "tests/golden"))
    chosen = parser.parse_args(arguments)
    dtype = getattr(torch, chosen.dtype)
    # TF32 is not what fp32 means to the golden numbers.
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name() if chosen.device.startswith("cuda") else "CPU"
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "dtype": chosen.dtype}
    for kind in (torch.float32, dtype):
        results[f"parity {str(kind).removeprefix('torch.')}"] = parity(chosen.golden, chosen.device, kind)
    print(json.dumps(results, indent=1), flush=True)
    for each in chosen.sizes:
        try:
            results[each] = check(each, chosen.device, dtype)
        except torch.OutOfMemoryError as error:
            results[each] = {"does_not_fit": str(error).splitlines()[0]}
            torch.cuda.empty_cache()
        print(json.dumps({each: results[each]}, indent=1), flush=True)
    return results


if __name__ == "__main__":
    main()
