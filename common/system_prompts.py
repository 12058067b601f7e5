"""The system prompts that a recipe may name."""

from __future__ import annotations

THINK_SYSTEM_PROMPT = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> "
    "image here"
)
REWRITE_SYSTEM_PROMPT = (
    "Plan the picture that the user asks for: its objects, their number, colors, places and relations. Write the plan "
    "between <think> and </think>. After </think>, write one prompt for an image generator that leaves nothing of the "
    "request out, and nothing else."
)
SYSTEM_PROMPTS = {"bagel-think": THINK_SYSTEM_PROMPT, "rewrite-think": REWRITE_SYSTEM_PROMPT}


def system_prompt(setting: str) -> str:
    """The system prompt that a recipe's `model.system_prompt` means."""
    return SYSTEM_PROMPTS.get(setting, setting)
