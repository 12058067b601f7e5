"""A policy to and from a directory in BAGEL's released layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.bagel import vae as vae_ops
from common.bagel.cfg import Branches, guided_velocity
from common.bagel.config import BagelConfig
from common.bagel.decoder import Context
from common.bagel.policy import BagelPolicy, PackedBatch, pack_batch
from common.bagel.text import ChatTokenizer
from common.bagel.vae import load_vae, vae_shapes
from common.checkpoint_files import SHARD_BYTES, CheckpointError, TensorFiles, check_finite, write_tensors
from common.config import Cfg
from common.policy import Guidance, OpenPolicy
from common.rundir import replacing_directory

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

WEIGHTS, AUTOENCODER = "ema.safetensors", "ae.safetensors"
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


@dataclass(frozen=True)
class Checkpoint(OpenPolicy):
    """Everything a directory holds: the policy, the tensors of the autoencoder (memory-mapped, under ae.safetensors'
    names), the tokenizer, and what is only passed on: tensors that the policy does not use (memory-mapped too, so in no
    memory until they are saved) and small files."""

    policy: BagelPolicy
    autoencoder: Mapping[str, Tensor]
    chat: ChatTokenizer
    config: BagelConfig
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    extras: Mapping[str, bytes] = field(default_factory=dict)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The frozen autoencoder, in fp32 beside the policy; built when first asked for, as learners seldom do."""
        return load_vae(self.config.vae_config, self.autoencoder, self.policy.device)

    @property
    def token_dim(self) -> int:
        return self.config.token_dim

    @property
    def reasoner(self) -> dict[str, Any]:
        return describe_decoder(self.config, self.extras.get("llm_config.json", b"{}"))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.config.grid(height, width)

    def context(self, texts: list[list[int]]) -> Context:
        return self.policy.prefill(texts)

    def velocities(
        self, texts: list[list[int]], grid: tuple[int, int], guidance: Guidance | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        if guidance is None:
            return super().velocities(texts, grid)
        cfg = guidance.cfg
        branches = Branches.prefill(self.policy, texts, guidance.without_prompt, guidance.without_reasoning, cfg)
        return lambda x_t, t: guided_velocity(self.policy, x_t, t, branches, grid, cfg)

    def guidance(self, prompts: list[str], system: str, cfg: Cfg) -> Guidance:
        ids = [self.chat.cfg_ids(prompt, system) for prompt in prompts]
        return Guidance(cfg, [without for without, _ in ids], [without for _, without in ids])

    def pack(
        self,
        texts: Sequence[tuple[list[int], list[int]]],
        x_t: Tensor,
        t: Tensor,
        owner: Tensor,
        grid: tuple[int, int],
        guidance: Guidance | None = None,
    ) -> PackedBatch:
        whole = [self.chat.context_ids(prompt, response) for prompt, response in texts]
        scored = [(len(prompt), len(prompt) + len(response)) for prompt, response in texts]
        if guidance is None:
            return pack_batch(whole, scored, x_t, t, owner, grid)
        kept = [guidance.without_prompt, *([guidance.without_reasoning] if guidance.cfg.image_scale > 1 else [])]
        # Many chains leave the same text, which is read once.
        row = {tuple(text): 0 for branch in kept for text in branch}
        row = {text: len(whole) + number for number, text in enumerate(row)}
        branches = tuple(
            torch.tensor([row[tuple(text)] for text in branch], device=x_t.device)[owner] for branch in kept
        )
        packed = pack_batch([*whole, *map(list, row)], [*scored, *[(0, 0)] * len(row)], x_t, t, owner, grid)
        return replace(packed, branches=branches, cfg=guidance.cfg)

    def decode(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        return vae_ops.to_uint8(self.pixels(latents, grid))

    def pixels(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        return vae_ops.decode(self.vae, self.config, latents, grid)

    def save(self, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
        save(self, directory, weights)


def describe_decoder(config: BagelConfig, stated: bytes) -> dict[str, Any]:
    """llm_config.json as stated, completed by what it leaves to be understood."""
    return json.loads(stated) | config.llm_config.model_dump(mode="json")


def layout(config: BagelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything in the weights of such a checkpoint."""
    with torch.device("meta"):
        policy = BagelPolicy(config, (0, 0), understanding=config.understands_images)
    return {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}


def check(directory: Path) -> BagelConfig:
    """Cheap look at a checkpoint before anything starts: files, sizes, tokenizer, and the header of every tensor.

    Raises CheckpointError naming the file and the tensor or field.
    """
    if not directory.is_dir():
        raise CheckpointError(f"model: {directory} is not a directory; give the path of a checkpoint")
    config = BagelConfig.read(directory)
    ChatTokenizer.read(directory, config.llm_config.vocab_size)
    _checked_files(directory, config)
    return config


def _checked_files(directory: Path, config: BagelConfig) -> tuple[TensorFiles, TensorFiles]:
    """The policy's files and the autoencoder's, whose headers are as the config says."""
    weights = TensorFiles.find(directory, WEIGHTS, "model.safetensors")
    wanted = layout(config)
    if config.llm_config.tie_word_embeddings and HEAD not in weights.shapes:
        del wanted[HEAD]
    weights.check(wanted)
    autoencoder = TensorFiles.find(directory, AUTOENCODER)
    autoencoder.check(vae_shapes(config.vae_config))
    return weights, autoencoder


def skeleton(config: BagelConfig, chat: ChatTokenizer, understanding: bool = False) -> BagelPolicy:
    """The policy without its numbers: meta tensors."""
    with torch.device("meta"):
        return BagelPolicy(config, (chat.vision_start, chat.vision_end), understanding)


def load(
    directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", understanding: bool = False
) -> Checkpoint:
    """Loads a checkpoint, tensor by tensor from the memory map to where it stays. understanding: with the tower that
    sees images, frozen; otherwise its tensors stay on disk, and `save` copies them from there.

    Raises CheckpointError; every header is checked before the first tensor is read, every number that is used must be
    finite, and nothing is half loaded.
    """
    config = BagelConfig.read(directory)
    chat = ChatTokenizer.read(directory, config.llm_config.vocab_size)
    weights, autoencoder = _checked_files(directory, config)
    if understanding and not config.understands_images:
        raise CheckpointError(f"{directory}/config.json has no vit_config; this checkpoint does not understand images")
    policy = skeleton(config, chat, understanding)
    own = [name for name in policy.state_dict() if name in weights.files]
    tensors = {name: tensor.to(device, dtype, copy=True) for name, tensor in weights.read(own)}
    if config.llm_config.tie_word_embeddings:
        if HEAD in weights.files and not torch.equal(*(tensor for _, tensor in weights.read([HEAD, EMBEDDING]))):
            raise CheckpointError(
                f"{weights.files[HEAD]}: tensor {HEAD} is another than {EMBEDDING}, but llm_config.json says "
                "tie_word_embeddings=true; say false"
            )
        tensors[HEAD] = tensors[EMBEDDING]
    check_finite(tensors.items(), weights.files, weights.path)
    policy.load_state_dict(tensors, assign=True)
    if config.llm_config.tie_word_embeddings:
        # Assigning tensors by name has made two parameters of one.
        policy.language_model.lm_head.weight = policy.language_model.model.embed_tokens.weight
    carried = dict(weights.read(weights.shapes.keys() - set(own)))
    numbers = dict(autoencoder.read(autoencoder.files))
    check_finite(numbers.items(), autoencoder.files, autoencoder.path)
    return Checkpoint(policy, numbers, chat, config, carried, _extras(directory))


def _extras(directory: Path) -> dict[str, bytes]:
    """The small files beside the weights: configs, tokenizer, model card."""
    files = (
        file for file in directory.iterdir() if file.is_file() and file.suffix in {".json", ".txt", ".md", ".jinja"}
    )
    return {file.name: file.read_bytes() for file in files if not file.name.endswith(".index.json")}


def save(
    checkpoint: Checkpoint,
    directory: Path,
    weights: Mapping[str, Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the layout to a new directory: aside first, then renamed. weights replaces the policy's own; above
    shard_bytes they are written as shards."""
    with replacing_directory(directory) as aside:
        tensors = {**checkpoint.carried, **(weights or checkpoint.policy.state_dict())}
        if checkpoint.config.llm_config.tie_word_embeddings:
            tensors.pop(HEAD, None)
        write_tensors(tensors, aside / WEIGHTS, shard_bytes)
        write_tensors(checkpoint.autoencoder, aside / AUTOENCODER, shard_bytes)
        for name, content in checkpoint.extras.items():
            (aside / name).write_bytes(content)
        if not checkpoint.extras:
            config = _release_config(checkpoint.config)
            for name, data in (("config", config), ("llm_config", config["llm_config"])):
                (aside / f"{name}.json").write_text(json.dumps(data, indent=2))
            checkpoint.chat.tokenizer.save(str(aside / "tokenizer.json"))
        for file in aside.iterdir():
            file.chmod(0o644)


def _release_config(config: BagelConfig) -> dict[str, Any]:
    data = config.model_dump(mode="json", exclude_none=True)
    llm = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **data["llm_config"]}
    return {"architectures": ["BagelForConditionalGeneration"], "model_type": "bagel", **data, "llm_config": llm}
