"""Which parameters are trained, at which rate, and which stay as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from common.config import ConfigError, Learner, Objective, Optimizer
from common.contradictions import unreached
from common.policy import Policy


def freeze(policy: Policy, patterns: Iterable[str]) -> None:
    """Takes what `optimizer.frozen` names, groups or patterns of parameter names, out of the training.

    ConfigError for an entry that fits nothing and if nothing is left to train.
    """
    for pattern in patterns:
        groups = policy.parameter_groups()
        named = [pair for pairs in groups.values() for pair in pairs]
        chosen = groups[pattern] if pattern in groups else [pair for pair in named if fnmatchcase(pair[0], pattern)]
        if not chosen:
            raise ConfigError(
                f"optimizer.frozen names {pattern!r}, which is neither a group ({', '.join(groups)}) nor fits a "
                "parameter that is still trained; correct or remove it (--dry-run without it lists all)"
            )
        for _, parameter in chosen:
            parameter.requires_grad_(False)
    if not any(policy.parameter_groups().values()):
        raise ConfigError("optimizer.frozen leaves nothing to train; remove an entry")


def choose(policy: Policy, learner: Learner, optimizer: Optimizer) -> None:
    """Adapters, if they are what is trained, and then what is frozen. ConfigError as for both."""
    if learner.lora:
        from common.lora import add_adapters

        add_adapters(policy, learner.lora)
    freeze(policy, optimizer.frozen)


def groups(policy: Policy, optimizer: Optimizer) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """What is trained, by the optimizer's groups, less empty ones: a parameter is in the first of `optimizer.groups`
    whose pattern fits its name, or else in its half. ConfigError for a pattern that is left without parameters."""
    halves = policy.parameter_groups()
    found: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in rates(optimizer)}
    for half, pairs in halves.items():
        for name, parameter in pairs:
            fitting = (group.name for group in optimizer.groups if fnmatchcase(name, group.pattern))
            found[next(fitting, half)].append((name, parameter))
    for place, group in enumerate(optimizer.groups):
        if not found[group.name]:
            raise ConfigError(
                f"optimizer.groups.{place}.pattern is {group.pattern!r}, which fits no parameter that is trained and "
                "in no group before it; correct or remove it (--dry-run without it lists all)"
            )
    return {name: pairs for name, pairs in found.items() if pairs}


def rates(optimizer: Optimizer) -> dict[str, float]:
    """Base learning rate by group."""
    halves = {"reasoning": optimizer.lr_reasoning, "denoising": optimizer.lr_denoising}
    return halves | {group.name: group.lr for group in optimizer.groups}


def check_reached(policy: Policy, optimizer: Optimizer, objective: Objective) -> None:
    """ConfigError for an objective with a weight that reaches no parameter which is trained at a rate above 0."""
    rate = rates(optimizer)
    moving = {name for group, pairs in groups(policy, optimizer).items() if rate[group] for name, _ in pairs}
    trained = {half for half, pairs in policy.parameter_groups().items() if any(name in moving for name, _ in pairs)}
    for problem in unreached(objective, trained, policy.image_trains_reasoning):
        raise ConfigError(problem)


def table(policy: Policy, optimizer: Optimizer) -> str:
    """Every group with its rate, size and members, and the rest as frozen, for people; layers are counted."""
    trained = groups(policy, optimizer)
    names = {name for pairs in trained.values() for name, _ in pairs}
    titles = {f"{name}, learning rate {rate:g}": trained.get(name, []) for name, rate in rates(optimizer).items()}
    titles["frozen"] = [pair for pair in policy.named_parameters() if pair[0] not in names]
    lines = ["parameters"]
    for title, pairs in titles.items():
        lines.append(f"  {title}: {sum(p.numel() for _, p in pairs):,} in {len(pairs)} tensors")
        counted: dict[str, int] = {}
        for name, _ in pairs:
            family = re.sub(r"\.\d+\.", ".*.", name)
            counted[family] = counted.get(family, 0) + 1
        lines += [f"    {family}" + (f" x {count}" if count > 1 else "") for family, count in counted.items()]
    return "\n".join(lines)
