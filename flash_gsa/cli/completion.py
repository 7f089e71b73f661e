"""What the shell completes: names of recipes, and the keys of a recipe in `key=value`."""

from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, get_args

import typer

from flash_gsa.errors import UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel


def shipped_recipes() -> dict[str, str]:
    """Description of each recipe that comes with flash-gsa, by name."""
    import yaml

    from flash_gsa._resources import shipped

    paths = sorted(shipped("recipes").glob("*.yaml"))
    return {p.stem: str(yaml.safe_load(p.read_text("utf-8")).get("description", "")) for p in paths}


def recipe_names(incomplete: str) -> list[tuple[str, str]]:
    """(name, description) of the shipped recipes and of the YAML files that begin like `incomplete`."""
    shipped = {name: shorten(about, 60, placeholder=" …") for name, about in shipped_recipes().items()}
    own = {str(p): "a recipe file" for p in Path().glob(f"{incomplete}*.yaml")} if incomplete else {}
    return [(n, about) for n, about in (shipped | own).items() if n.startswith(incomplete)]


def recipe_keys(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """("optimizer.lr=", "0.003 in demo") for the keys of the recipe that the command line names, then all others."""
    import yaml

    from flash_gsa.training.recipe import Recipe
    from flash_gsa.training.recipe_file import find_recipe

    if "=" in incomplete:
        return []
    name = context.params.get("recipe") or "demo"
    try:
        values = yaml.safe_load(find_recipe(name).read_text("utf-8"))
    except (UsageError, OSError, ValueError, yaml.YAMLError):
        return []
    keys = {key: f"{value} in {name}" for key, value in _leaves(values)}
    keys |= {key: about for key, about in _schema(Recipe) if key not in keys}
    return [(f"{key}=", about) for key, about in keys.items() if key.startswith(incomplete)]


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _schema(section: "type[BaseModel]", prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, description) of every value a section can have; of the model's, only those in the recipe are offered."""
    for key, field in section.model_fields.items():
        options = (field.annotation, *get_args(field.annotation))
        inner = [option for option in options if hasattr(option, "model_fields")]
        for option in inner:
            yield from _schema(option, f"{prefix}{key}.")
        if not inner and key != "model":
            yield f"{prefix}{key}", field.description or ""
