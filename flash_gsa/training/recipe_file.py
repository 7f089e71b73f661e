"""Reading recipe files: YAML with overrides, and messages that name the key that is wrong."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from flash_gsa._resources import shipped
from flash_gsa.errors import UsageError, did_you_mean
from flash_gsa.training.recipe import Recipe, WeightedSource
from flash_gsa.training.schedule import RunLength

REQUIRED = "???"
"""Stands in a recipe for a value that the user must give."""


def recipe_names() -> list[str]:
    """Names of the recipes shipped with flash-gsa."""
    return sorted(p.stem for p in shipped("recipes").glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = (), *, data_named: bool = True) -> Recipe:
    """Reads, overrides and checks a recipe.

    Args:
        name_or_path: the name of a shipped recipe (`demo`), or the path of a YAML file.
        overrides: `key.path=value`, the value written as in YAML: `schedule.minutes=1`, `model.num_slots=32`,
            `tokenizer=null`, `optimizer.betas=[0.9, 0.99]`. The last one of a key counts.
        data_named: False where no data will be read: those still to be given may be left open.

    Raises:
        UsageError: no such recipe, not YAML, an unknown key (with the nearest right one), a wrong type, a
            value still to be given (`???`), or settings that contradict each other.
    """
    path = find_recipe(str(name_or_path))
    return _checked(_overridden(_read(path), overrides), str(name_or_path), data_named)


def parse_recipe(text: str, origin: str = "recipe") -> Recipe:
    """The recipe in a YAML text; `origin` names it in messages. Raises UsageError like `load_recipe`."""
    return _checked(_parse(text, origin), origin)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with every value written out; `parse_recipe` gives an equal object back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def recipe_differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """`{"optimizer.lr": (old, new)}` for every value that differs."""
    before, after = dict(_leaves(old.model_dump(mode="json"))), dict(_leaves(new.model_dump(mode="json")))
    keys = [*before, *(k for k in after if k not in before)]
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe's name, or of a path. Raises UsageError if there is none."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise UsageError(
                f"The recipe file {path} {problem}. Expected a YAML file, or one of {', '.join(recipe_names())}."
            )
        return path
    names = recipe_names()
    if name not in names:
        raise UsageError(
            f"There is no recipe {name!r}.{did_you_mean(name, names)} Shipped are {', '.join(names)}; "
            "a file of your own is given by its path, for instance ./mine.yaml."
        )
    return shipped("recipes") / f"{name}.yaml"


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return _parse(text, str(path))


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `3e-4` is a number (YAML 1.1 wants `3.0e-4`), and no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice in one section", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Loader)  # a SafeLoader: it makes plain values only
    except yaml.YAMLError as error:
        raise UsageError(f"{origin} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{origin} is not a recipe: expected `key: value` lines, got {_kind(values)}")
    return values


def _overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"{override!r} is not an override: expected key.path=value, e.g. optimizer.lr=1e-3")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise UsageError(f"The value in {override!r} is not YAML: {error}") from None
        *sections, last = key.split(".")
        place = values
        for depth, section in enumerate(sections):
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UsageError(
                    f"{override!r}: {'.'.join(sections[: depth + 1])} is a single value, so there is no {key!r} in it"
                )
        place[last] = value
    return values


def _checked(values: dict[str, Any], origin: str, data_named: bool = True) -> Recipe:
    from flash_gsa.training.model import check_model  # imports torch and transformers: seconds

    wrong = list(_unknown_keys(values, Recipe)) or list(_missing_values(values, data_named))
    if not wrong:
        try:
            recipe = Recipe.model_validate(values)
            RunLength(recipe.schedule, recipe.batch)
            check_model(recipe)
            return recipe
        except ValidationError as error:
            wrong = _readable(error)
        except UsageError as error:
            wrong = [str(error)]
    lines = "".join(f"\n  - {line}" for line in wrong)
    raise UsageError(f"The recipe {origin} cannot be used:{lines}")


def _section(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The section class that `value` is to fill; of several, the one with its `kind`."""
    options = [t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)]
    for option in options:
        kind = option.model_fields.get("kind")
        if kind is None or (isinstance(value, Mapping) and value.get("kind") in get_args(kind.annotation)):
            return option
    return None


def _unknown_keys(values: Mapping[str, Any], section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    fields = section.model_fields
    for key, value in values.items():
        if key not in fields:
            where = f"in {prefix.rstrip('.')}" if prefix else "at the top level"
            hint = did_you_mean(str(key), fields) or f" Known {where}: {', '.join(fields)}."
            yield f"unknown key {prefix}{key}.{hint}"
        elif isinstance(value, Mapping):
            inner = _section(fields[key].annotation, value)
            if inner is not None:
                yield from _unknown_keys(value, inner, f"{prefix}{key}.")


def _missing_values(values: Mapping[str, Any], data_named: bool) -> Iterator[str]:
    for key, value in _leaves(values):
        if value == REQUIRED and (data_named or not key.startswith("data.")):
            yield f"{key} must be given: set {key}=…{_meaning(key, values)}"


def _meaning(key: str, values: Mapping[str, Any]) -> str:
    """The description of a key, in brackets, if the schema has one."""
    section: type[BaseModel] | None = Recipe
    *parents, last = key.split(".")
    for parent in parents:
        if section is None or parent not in section.model_fields:
            return ""
        values = values[parent]
        section = _section(section.model_fields[parent].annotation, values)
    field = section.model_fields.get(last) if section else None
    return f" ({field.description})" if field and field.description else ""


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


_EXPECTED = {
    "model_type": "a section of keys",
    "dict_type": "a section of keys",
    "list_type": "a list",
    "string_type": "text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "letters, digits and any of _ . -, the first a letter or a digit",
}


def _readable(error: ValidationError) -> list[str]:
    """One line for each value that pydantic refused."""
    wrong: dict[str, tuple[list[str], str]] = {}
    for detail in error.errors():
        key = _key(detail["loc"])
        value = detail["input"]
        if detail["type"] == "value_error":
            wrong[str(detail["ctx"]["error"])] = ([], "")
        elif detail["type"] == "missing":
            wrong[f"{key} is missing; give it a value"] = ([], "")
        elif detail["type"] == "extra_forbidden":  # in a list of sources: in sections they were found before
            hint = did_you_mean(key.rpartition(".")[2], WeightedSource.model_fields)
            wrong[f"unknown key {key}.{hint}"] = ([], "")
        elif detail["type"].startswith("union_tag"):
            wrong[f"data.kind must be text or mqar, got {value.get('kind')!r}"] = ([], "")
        else:
            message = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            expected, _ = wrong.setdefault(key, ([], f", got {value!r} ({_kind(value)})"))
            limits = detail.get("ctx", {})
            if detail["type"] in ("too_short", "too_long"):
                bound, number = ("least", "min_length") if detail["type"] == "too_short" else ("most", "max_length")
                message = f"at {bound} {limits[number]} entries"
            expected.append(_EXPECTED.get(detail["type"], message))
    return [f"{key}: expected {' or '.join(e)}{got}" if e else key for key, (e, got) in wrong.items()]


_BRANCHES = ("int", "float", "str", "bool", "list[str]", "plain", "weighted")


def _key(location: Sequence[str | int]) -> str:
    """The key as it stands in the file: pydantic also names the branch of a union that it tried."""
    parts = [str(part) for part in location]
    if len(parts) > 1 and parts[0] == "data":
        del parts[1]
    return ".".join(p for p in parts if p not in _BRANCHES and not p.startswith(("literal[", "constrained-")))


def _kind(value: Any) -> str:
    names = {dict: "a section", list: "a list", str: "text", bool: "true/false", int: "a whole number"}
    names |= {float: "a number", type(None): "nothing"}
    return names.get(type(value), type(value).__name__)
