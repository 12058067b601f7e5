"""The reasoner's tokenizer: its own chat template, and the final prompt that a reasoning ends with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from common.checkpoint_files import CheckpointError, read_json
from common.config import ConfigError

THINK_END = "</think>"


def _own_ends(directory: Path) -> list[int]:
    """What generation_config.json says ends an answer: of a chat model often another token than the tokenizer's eos."""
    file = directory / "generation_config.json"
    found = read_json(file).get("eos_token_id") if file.is_file() else None
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(end) is int and end >= 0 for end in ends):
        raise CheckpointError(f"{file}: eos_token_id is {found!r}; it is a token id or a list of them")
    return ends


@dataclass(frozen=True)
class TemplateChat:
    """A tokenizer of transformers with the ids that end an answer."""

    tokenizer: Any
    ends: tuple[int, ...]

    @classmethod
    def read(cls, directory: Path, vocab_size: int) -> TemplateChat:
        """CheckpointError if there is no tokenizer, none of its tokens ends an answer, or ids are out of range."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{directory} holds no tokenizer that transformers reads ({error})") from error
        eos = tokenizer.eos_token_id
        ends = tuple(dict.fromkeys([*_own_ends(directory), *([] if eos is None else [eos])]))
        if not ends:
            raise CheckpointError(f"{directory}: the tokenizer has no eos_token, so that no reasoning would end")
        largest = max((*tokenizer.all_special_ids, *ends, len(tokenizer) - 1))
        if largest >= vocab_size:
            raise CheckpointError(
                f"{directory}: the tokenizer has id {largest}, outside the vocabulary of {vocab_size} in config.json"
            )
        return cls(tokenizer, ends)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt_ids(self, prompt: str, system: str = "", think: bool = True) -> list[int]:
        """The chat template with the opening of the answer; without a template, system prompt and prompt as lines. An
        image without reasoning is conditioned on the bare prompt."""
        if not think:
            return self.tokenizer.encode(prompt, add_special_tokens=False)
        if not self.tokenizer.chat_template:
            return self.tokenizer.encode("\n".join([*([system] if system else []), prompt, ""]))
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise ConfigError(
                f"model.system_prompt: the tokenizer's chat template does not take it ({error}); leave it empty"
            ) from error

    def context_ids(self, prompt_ids: list[int], response_ids: list[int]) -> list[int]:
        """The image is conditioned on the answer alone, of which `final_prompt` is drawn."""
        return response_ids or prompt_ids

    def final_prompt(self, response_ids: list[int]) -> str:
        """What the pipeline draws: the text after </think>, the whole text if there is none."""
        # </think> may itself be a special token, which skipping those would lose.
        text = self.tokenizer.decode(response_ids, skip_special_tokens=False).rpartition(THINK_END)[2]
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text.strip()
