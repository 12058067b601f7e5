"""Composed policies against the libraries' own code: every family's pipeline call, files, prompts, adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_numbers import close
from safetensors.torch import load_file, save_file

from common import lora
from common.checkpoint_files import CheckpointError
from common.composed.chat import TemplateChat
from common.config import ConfigError, Lora, Model
from common.policy import OpenPolicy, open_policy, outline

PROMPTS = ["a red ring", "two blue squares left of a cross"]
HEIGHT, WIDTH, STEPS = 32, 48, 4
FAMILIES = ("sd3", "flux", "qwen_image")


@pytest.fixture(scope="module")
def opened(tiny_models: Path) -> dict[str, OpenPolicy]:
    return {family: open_policy(model(tiny_models, family)) for family in FAMILIES}


def model(root: Path, family: str, reasoner: str = "qwen2") -> Model:
    return Model(path=str(root / reasoner), pipeline=str(root / family), guidance=3.5)


def answers(policy: OpenPolicy, texts: list[str]) -> list[list[int]]:
    tokenizer = policy.chat.tokenizer  # type: ignore[attr-defined]
    return [[*tokenizer.encode(f"so: </think> {text}"), policy.chat.ends[0]] for text in texts]


def tokens_of(latents: torch.Tensor) -> torch.Tensor:
    """What a pipeline's loop holds, [M, C, h, w] or packed already, as [M, N, D]."""
    return latents.flatten(2).transpose(1, 2) if latents.ndim == 4 else latents


def velocity(policy: OpenPolicy, x_t: torch.Tensor, t: float, texts: list[str], size: tuple[int, int]) -> torch.Tensor:
    with torch.no_grad():
        context = policy.context(answers(policy, texts))
        return policy.policy.velocity(x_t, torch.full((len(x_t),), t), context, policy.grid(*size))


@pytest.mark.parametrize("family", FAMILIES)
def test_velocities_steps_and_image_are_those_of_the_pipelines_own_call(
    opened: dict[str, OpenPolicy], family: str
) -> None:
    """The pipeline draws; at each of its states our velocity is what its transformer said, an Euler step along it is
    its scheduler's next state, and the last state decodes to its image."""
    from diffusers import DiffusionPipeline

    policy = opened[family]
    pipeline: DiffusionPipeline = policy.pipeline  # type: ignore[attr-defined]
    said: list[torch.Tensor] = []
    hook = pipeline.transformer.register_forward_hook(lambda module, args, output: said.append(output[0]))
    states: list[torch.Tensor] = []
    guidance = {"sd3": {"guidance_scale": 1.0}, "flux": {"guidance_scale": 3.5}, "qwen_image": {"true_cfg_scale": 1.0}}
    try:
        image = pipeline(
            PROMPTS,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            callback_on_step_end=lambda p, i, t, kept: states.append(kept["latents"]) or {},
            **guidance[family],
        ).images
    finally:
        hook.remove()
    sigmas = pipeline.scheduler.sigmas.tolist()
    assert sigmas[0] > 0.99 and sigmas[-1] == 0 and len(said) == STEPS
    # The first state is what makes the first step come out.
    x = tokens_of(states[0]) - (sigmas[1] - sigmas[0]) * tokens_of(said[0])
    for step in range(STEPS):
        v = velocity(policy, x, sigmas[step], PROMPTS, (HEIGHT, WIDTH))
        close(v, tokens_of(said[step]), atol=1e-5)
        assert v.std() > 0.05
        close(x + (sigmas[step + 1] - sigmas[step]) * v, tokens_of(states[step]), atol=1e-5)
        x = tokens_of(states[step])
    with torch.no_grad():
        pixels = policy.decode(x, policy.grid(HEIGHT, WIDTH)).numpy()
    assert pixels.shape == (2, HEIGHT, WIDTH, 3)
    # An exact half may round to either side.
    assert np.abs(pixels.astype(int) - (255 * image).round().astype(int)).max() <= 1
    assert (pixels == (255 * image).round().astype(np.uint8)).mean() > 0.999


@pytest.mark.parametrize("family", FAMILIES)
def test_velocity_depends_on_prompt_time_and_guidance_but_not_on_the_rest_of_the_batch(
    opened: dict[str, OpenPolicy], family: str
) -> None:
    policy, size = opened[family], (HEIGHT, HEIGHT)
    rows, columns = policy.grid(*size)
    x = torch.randn(1, rows * columns, policy.token_dim, generator=torch.Generator().manual_seed(1))
    alone = velocity(policy, x, 0.7, PROMPTS[:1], size)
    beside = velocity(policy, x.expand(2, -1, -1), 0.7, PROMPTS, size)
    close(beside[:1], alone, atol=1e-5)
    assert (beside[1] - beside[0]).abs().max() > 1e-3
    assert (velocity(policy, x, 0.2, PROMPTS[:1], size) - alone).abs().max() > 1e-3
    told = policy.family.guidance  # type: ignore[attr-defined]
    try:
        policy.family.guidance = 1.0  # type: ignore[attr-defined]
        other = velocity(policy, x, 0.7, PROMPTS[:1], size)
    finally:
        policy.family.guidance = told  # type: ignore[attr-defined]
    assert torch.equal(other, alone) == (family != "flux")


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ("<think> hm </think> a red ring<|im_end|>", "a red ring"),
        ("a red ring", "a red ring"),
        ("one </think> two </think>\nthree<|im_end|>", "three"),
        ("cut short <think> before it", "cut short <think> before it"),
        ("all thought </think><|im_end|>", ""),
    ],
)
def test_final_prompt(opened: dict[str, OpenPolicy], answer: str, prompt: str) -> None:
    chat = opened["sd3"].chat
    assert isinstance(chat, TemplateChat)
    ids = chat.tokenizer.encode(answer)
    assert chat.context_ids([1, 2], ids) == ids
    assert chat.final_prompt(ids) == prompt


def test_prompts_take_the_chat_template_if_there_is_one(tiny_models: Path) -> None:
    chat = outline(model(tiny_models, "sd3")).chat
    assert isinstance(chat, TemplateChat)
    assert chat.tokenizer.decode(chat.prompt_ids("draw", "think")) == (
        "<|im_start|>system\nthink<|im_end|>\n<|im_start|>user\ndraw<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = outline(model(tiny_models, "sd3", "llama")).chat
    assert plain.decode(plain.prompt_ids("draw", "think")) == "think\ndraw\n"
    assert plain.decode(plain.prompt_ids("draw")) == "draw\n"


def test_token_logprobs_of_a_padded_batch_are_those_of_each_text(opened: dict[str, OpenPolicy]) -> None:
    policy = opened["sd3"].policy
    texts = [[5, 9, 260, 7], [3, 1, 4, 1, 5, 9, 2, 6]]
    with torch.no_grad():
        for text, found in zip(texts, policy.token_logprobs(texts), strict=True):
            logits = policy.reasoner(input_ids=torch.tensor([text])).logits[0].float()  # type: ignore[operator]
            close(found, logits.log_softmax(-1)[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0], atol=1e-5)


def test_a_language_model_kept_in_host_memory_goes_on_answering(tiny_models: Path) -> None:
    """The meta device stands in for the GPU that the transformer stays on."""
    policy = open_policy(Model(path=str(tiny_models / "qwen2"), pipeline=str(tiny_models / "sd3")), frozen=None).policy
    (before,) = policy.token_logprobs([[5, 6, 7]])
    policy.transformer.to("meta")
    policy.keep_for_drawing()
    assert policy.device.type == "meta"
    assert torch.equal(policy.token_logprobs([[5, 6, 7]])[0], before)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_read_by_both_libraries_and_by_us(
    opened: dict[str, OpenPolicy], tmp_path: Path, family: str
) -> None:
    from diffusers import DiffusionPipeline
    from transformers import AutoModelForCausalLM

    policy = opened[family]
    trained = {name: tensor + 0.01 for name, tensor in policy.policy.state_dict().items()}
    policy.save(tmp_path / "saved", trained)
    reasoner = AutoModelForCausalLM.from_pretrained(tmp_path / "saved/reasoner")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "saved/pipeline", use_safetensors=True)
    ours = open_policy(Model(path=str(tmp_path / "saved")))
    for half, found in (("reasoner", reasoner), ("transformer", pipeline.transformer)):
        for name, parameter in found.named_parameters():
            assert torch.equal(parameter, trained[f"{half}.{name}"]), name
            assert torch.equal(parameter, ours.policy.get_parameter(f"{half}.{name}")), name
    assert (
        type(pipeline).__name__ == json.loads((tmp_path / "saved/pipeline/model_index.json").read_text())["_class_name"]
    )
    with pytest.raises(ConfigError, match=r"model\.pipeline is .* has its own; leave one out"):
        outline(Model(path=str(tmp_path / "saved"), pipeline=str(tmp_path)))


def test_adapters_start_without_effect_and_merge_into_plain_weights(tiny_models: Path) -> None:
    opened = open_policy(model(tiny_models, "qwen_image"))
    policy, text, size = opened.policy, [[4, 8, 15, 16]], (HEIGHT, HEIGHT)
    x = torch.randn(1, 16, opened.token_dim, generator=torch.Generator().manual_seed(0))
    names = set(policy.state_dict())
    before = policy.token_logprobs(text)[0], velocity(opened, x, 0.5, PROMPTS[:1], size)
    lora.add_adapters(policy, Lora(rank=4, target_modules=("q_proj", "to_q")))
    trained = [name for pairs in policy.parameter_groups().values() for name, _ in pairs]
    assert len(trained) == 8 and all("lora_" in name and ("q_proj" in name or "to_q" in name) for name in trained)
    assert torch.equal(policy.token_logprobs(text)[0], before[0])
    assert torch.equal(velocity(opened, x, 0.5, PROMPTS[:1], size), before[1])
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    after = policy.token_logprobs(text)[0], velocity(opened, x, 0.5, PROMPTS[:1], size)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(after, before, strict=True))
    plain = dict(lora.plain_weights(policy, policy.state_dict()))
    assert plain.keys() == names
    fresh = open_policy(model(tiny_models, "qwen_image"))
    changed = {name for name, tensor in fresh.policy.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert changed == {f"{name}.weight" for name, _ in lora.adapted(policy)}
    reasoning = dict(policy.reasoning_weights())
    assert reasoning.keys() == dict(fresh.policy.reasoning_weights()).keys()
    assert all(torch.equal(tensor, plain[f"reasoner.{name}"]) for name, tensor in reasoning.items())
    fresh.policy.load_state_dict(plain)
    close(fresh.policy.token_logprobs(text)[0], after[0], atol=1e-5)
    close(velocity(fresh, x, 0.5, PROMPTS[:1], size), after[1], atol=1e-5)


def test_adapters_of_bagel_are_in_both_experts_and_merge_into_its_own_names() -> None:
    from golden_numbers import CHECKPOINT

    opened = open_policy(Model(path=str(CHECKPOINT)))
    policy, text = opened.policy, [[4, 8, 15, 16]]
    names, before = set(policy.state_dict()), policy.token_logprobs(text)[0]
    lora.add_adapters(policy, Lora(rank=4))
    assert torch.equal(policy.token_logprobs(text)[0], before)
    groups = policy.parameter_groups()
    for role, pairs in groups.items():
        assert all("lora_" in name and ("_moe_gen" in name) == (role == "denoising") for name, _ in pairs)
    with torch.no_grad():
        for _, parameter in [*groups["reasoning"], *groups["denoising"]]:
            parameter.normal_(std=0.1)
    after, plain = policy.token_logprobs(text)[0], dict(lora.plain_weights(policy, policy.state_dict()))
    assert plain.keys() == names and (after - before).abs().max() > 1e-3
    fresh = open_policy(Model(path=str(CHECKPOINT))).policy
    fresh.load_state_dict(plain)
    reasoning = dict(policy.reasoning_weights())
    assert all(torch.equal(tensor, reasoning.pop(name)) for name, tensor in fresh.reasoning_weights()) and not reasoning
    close(fresh.token_logprobs(text)[0], after, atol=1e-4)


def test_a_model_may_end_its_answers_with_another_token_than_the_tokenizers(tiny_models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "llama"
    shutil.copytree(tiny_models / "llama", directory)
    own = TemplateChat.read(directory, 10**6).tokenizer.eos_token_id
    for told, ends in ((7, (7, own)), ([7, own], (7, own)), (None, (own,))):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": told}))
        assert TemplateChat.read(directory, 10**6).ends == ends


def test_a_mixture_of_experts_is_refused(tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "qwen2", tmp_path / "moe")
    sizes = json.loads((tmp_path / "moe/config.json").read_text())
    sizes |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 16}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    (tmp_path / "moe/config.json").write_text(json.dumps(sizes))
    mixture = Model(path=str(tmp_path / "moe"), pipeline=str(tiny_models / "flux"))
    with pytest.raises(CheckpointError, match=r"moe is a mixture of experts \(.*experts.*\).* give a dense model"):
        outline(mixture).skeleton()  # type: ignore[misc]


def test_adapters_need_a_layer_in_both_halves(tiny_models: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner\.lora\.target_modules is q_proj: no linear layer of the denoising"):
        lora.add_adapters(open_policy(model(tiny_models, "flux"), frozen=None).policy, Lora(target_modules=("q_proj",)))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def as_pickle(root: Path) -> None:
    path = root / "flux/text_encoder/model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


INDEX, LLM = "flux/model_index.json", "llama/model.safetensors"
DIT = "flux/transformer/diffusion_pytorch_model.safetensors"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unet": (
        lambda root: edit_json(root / INDEX, _class_name="StableDiffusionPipeline"),
        r"model_index\.json is a StableDiffusionPipeline, which is not a flow-matching pipeline",
    ),
    "scheduler": (
        lambda root: edit_json(root / INDEX, scheduler=["diffusers", "DDPMScheduler"]),
        r"model_index\.json: the scheduler is DDPMScheduler; flow matching has",
    ),
    "foreign class": (
        lambda root: edit_json(root / INDEX, vae=["os", "system"]),
        r"vae is os\.system, which neither transformers nor diffusers has",
    ),
    "ends": (
        lambda root: (root / "llama/generation_config.json").write_text('{"eos_token_id": "<end_of_turn>"}'),
        r"generation_config\.json: eos_token_id is '<end_of_turn>'; it is a token id or a list",
    ),
    "pickle": (as_pickle, r"text_encoder holds only pytorch_model\.bin, a pickle, which is never opened"),
    "truncated": (lambda root: truncate(root / DIT), r"diffusion_pytorch_model\.safetensors is truncated"),
    "missing": (
        lambda root: edit_weights(root / DIT, lambda tensors: tensors.pop("x_embedder.bias")),
        r"/diffusion_pytorch_model\.safetensors: tensor x_embedder\.bias is missing",
    ),
    "extra": (
        lambda root: edit_weights(root / LLM, lambda tensors: tensors.update(more=torch.ones(2))),
        r"llama/model\.safetensors: tensor more is not part of the configured model",
    ),
    "misshapen": (
        lambda root: edit_weights(
            root / "llama/model.safetensors", lambda t: t.update({"lm_head.weight": torch.ones(2)})
        ),
        r"llama/model\.safetensors: tensor lm_head\.weight has shape \(2,\), config\.json says \(272, 64\)",
    ),
    "NaN": (
        lambda root: edit_weights(root / DIT, lambda tensors: tensors["x_embedder.bias"].fill_(float("nan"))),
        r"/diffusion_pytorch_model\.safetensors: tensor x_embedder\.bias has NaN or infinite numbers",
    ),
    "vocabulary": (
        lambda root: edit_json(root / "llama/config.json", vocab_size=200),
        r"id 259, outside the vocabulary of 200",
    ),
    "not a language model": (lambda root: edit_json(root / "llama/config.json", vocab_size=None), r"has no vocab_size"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_named(tiny_models: Path, tmp_path: Path, case: str) -> None:
    for part in ("flux", "llama"):
        shutil.copytree(tiny_models / part, tmp_path / part)
    spoil, message = BAD[case]
    spoil(tmp_path)
    settings = model(tmp_path, "flux", "llama")
    with pytest.raises(CheckpointError, match=message):
        # What headers and JSON show is found before anything starts; the rest when tensors are read.
        outline(settings)
        open_policy(settings, frozen=None)


def test_image_sizes_that_do_not_fit(opened: dict[str, OpenPolicy]) -> None:
    for family, wrong in (("sd3", (36, 32)), ("sd3", (72, 32)), ("flux", (36, 32)), ("qwen_image", (32, 36))):
        with pytest.raises(ValueError, match=f"image size {wrong[0]}x{wrong[1]}"):
            opened[family].grid(*wrong)
