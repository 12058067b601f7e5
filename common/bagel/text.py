"""Token ids of the chat: every chunk is <|im_start|> ids <|im_end|>, and the reasoning is such a chunk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from common.checkpoint_files import CheckpointError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


@dataclass(frozen=True)
class ChatTokenizer:
    """The checkpoint's tokenizer with the ids that the chat format needs."""

    tokenizer: Tokenizer
    start: int
    end: int
    vision_start: int
    vision_end: int

    @classmethod
    def read(cls, directory: Path, vocab_size: int) -> ChatTokenizer:
        """From tokenizer.json. CheckpointError if it is missing, broken, or has ids outside the embedding table."""
        path = directory / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(f"{path} is missing; a checkpoint in BAGEL's layout has it")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer file ({error})") from error
        ids = []
        for token in SPECIAL_TOKENS[1:]:
            number = tokenizer.token_to_id(token)
            if number is None:
                raise CheckpointError(f"{path} has no token {token}; the chat format needs it")
            if number >= vocab_size:
                raise CheckpointError(f"{path}: {token} has id {number}, outside the vocabulary of {vocab_size}")
            ids.append(number)
        return cls(tokenizer, *ids)

    @property
    def ends(self) -> tuple[int, ...]:
        """What ends a reasoning."""
        return (self.end,)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def wrap(self, text: str) -> list[int]:
        """One chunk of the chat; an empty text is none."""
        return [self.start, *self.encode(text), self.end] if text else []

    def prompt_ids(self, prompt: str, system: str = "", think: bool = True) -> list[int]:
        """What the reasoning is sampled from: the wrapped system prompt (if any) and prompt, and the opening of the
        answer's chunk. Without reasoning that opening is left out: what the image is conditioned on."""
        return [*self.wrap(system), *self.wrap(prompt), *([self.start] if think else [])]

    def cfg_ids(self, prompt: str, system: str = "") -> tuple[list[int], list[int]]:
        """The contexts that guidance leaves something out of: the prompt (possibly nothing is left), the reasoning."""
        return self.wrap(system), [*self.wrap(system), *self.wrap(prompt)]

    def context_ids(self, prompt_ids: list[int], response_ids: list[int]) -> list[int]:
        """What the image is conditioned on: the sampled ids themselves, closed if the sample was cut short; the prompt
        alone if there are none."""
        closing = [self.end] if response_ids and response_ids[-1] != self.end else []
        return [*prompt_ids, *response_ids, *closing]
