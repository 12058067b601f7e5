"""A recipe file and overrides of the command line -> the validated configuration of a run."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from common.config import REPOSITORY, ConfigError, TrainConfig
from common.runtime import one_line

RECIPES = REPOSITORY / "deploy" / "recipes"


class _PlainData(yaml.SafeLoader):
    """YAML of what JSON has, too: a date is text, and a key comes once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for number, key in enumerate(keys):
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no name of a field", node.start_mark)
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_PlainData.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainData.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}


def _parse(text: str) -> Any:
    """YAMLError for what is not YAML, or goes round in a circle."""
    data = yaml.load(text, _PlainData)
    try:
        json.dumps(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise yaml.YAMLError(one_line(error)) from error
    return data


def read_recipe(recipe: str, within: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe's content by path or by the name of a file in deploy/recipes, on top of the recipe it `extends`:
    sections are merged, everything else (lists too) is replaced. within: the recipes that led here."""
    path = Path(recipe)
    if not path.is_file():
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        close = difflib.get_close_matches(recipe, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"known recipes: {', '.join(known)}"
        raise ConfigError(f"recipe {recipe} is neither a file nor a known recipe; {hint}")
    try:
        data = _parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}); save it as such") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}; a recipe is a mapping of fields")
    if "extends" not in data:
        return data
    base, chain = str(data.pop("extends")), (*within, recipe)
    if base in chain:
        raise ConfigError(
            f"extends: the recipes {' -> '.join((*chain, base))} extend each other; remove one of the links"
        )
    return _merged(read_recipe(base, chain), data)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section."""
    both = {key: _merged(base[key], over[key]) for key in base.keys() & over if _sections(base[key], over[key])}
    return {**base, **over, **both}


def _sections(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`a.b=value` pairs over a recipe; values are read as YAML, list entries are addressed by number."""
    data = json.loads(json.dumps(data))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not key=value, e.g. steps=2 or optimizer.lr_denoising=1e-4")
        try:
            value = _parse(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML ({one_line(error)})") from error
        if isinstance(value, str):
            value = _number(value)
        node: Any = data
        *parents, last = key.split(".")
        for part in parents:
            if part.isdecimal() and not isinstance(node, list):
                raise ConfigError(f"override {key}: the recipe has no list there; write the list into a recipe file")
            node = node[_entry(node, part, key)] if isinstance(node, list) else node.setdefault(part, {})
            if not isinstance(node, dict | list):
                raise ConfigError(f"override {key}: {part} is a value, not a section")
        node[_entry(node, last, key) if isinstance(node, list) else last] = value
    return data


def _entry(node: list[Any], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(f"override {key}: {part} is not an entry of a list of {len(node)}")
    return int(part)


def _number(value: str) -> str | float:
    """YAML 1.1 reads 1e-4 as text; people mean the number."""
    try:
        return float(value)
    except ValueError:
        return value


def load_config(recipe: str, overrides: list[str] | None = None, model: dict[str, Any] | None = None) -> TrainConfig:
    """Recipe plus overrides, validated. ConfigError names the field, the value and the remedy. model: what takes the
    place of the recipe's fields of the model before the overrides, such as a path that is not to be read as YAML."""
    data = read_recipe(recipe)
    if "out" in data:
        raise ConfigError(f"recipe {recipe} is one of supervised fine-tuning; it is for `unigrpo sft {recipe}`")
    if model:
        data["model"] = {**(data.get("model") or {}), **model}
    return validate(apply_overrides(data, overrides or []))


def validate(data: dict[str, Any]) -> TrainConfig:
    """A mapping -> TrainConfig; ConfigError for the first thing that is wrong."""
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, TrainConfig)) from error


_REMEDIES = {
    "string_type": "; put it in quotes",
    "tuple_type": "; give a list, e.g. [a, b]",
    "model_type": "; give its fields, e.g. {name: value}",
}


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line for people: field, value, what is wrong, and the closest known key for a mistyped one."""
    first = error.errors()[0]
    # Where several types are allowed, pydantic names the one that it tried.
    field = ".".join(str(part) for part in first["loc"] if not re.match(r"constrained-|literal\[", str(part)))
    if first["type"] == "extra_forbidden":
        known = list(_fields_at(root, first["loc"][:-1]))
        close = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        hint = f"did you mean {close[0]}?" if close else f"known keys here: {', '.join(known)}"
        return f"config: {field} is not a known key; {hint}"
    if first["type"] == "missing":
        return f"config: {field} is missing; give it"
    message = first["msg"].removeprefix("Value error, ") + _REMEDIES.get(first["type"], "")
    return f"config: {field} is {first['input']!r}: {message}" if field else f"config: {message}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        annotation: Any = model.model_fields[part].annotation
        inner = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
        model = next(a for a in inner if issubclass(a, BaseModel))
    return list(model.model_fields)


def to_yaml(config: TrainConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
