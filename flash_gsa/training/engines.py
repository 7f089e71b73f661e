"""The engine that a recipe names."""

import os

import torch.distributed as dist

from flash_gsa.errors import UsageError
from flash_gsa.training.engine import Engine
from flash_gsa.training.recipe import Recipe


def open_engine(recipe: Recipe) -> Engine:
    """One process, or this one of several; they have found each other when this returns.

    Raises:
        UsageError: the device is not there, processes were started that the recipe does not use, or the other way
            round, or they do not find each other.
    """
    section = recipe.engine
    if section.kind == "single":
        ranks = int(os.environ.get("WORLD_SIZE", 1)) if not dist.is_initialized() else dist.get_world_size()
        if ranks > 1:
            raise UsageError(
                f"{ranks} processes were started, and engine.kind=single uses one: each would train the same model. "
                "Set engine.kind=ddp or fsdp2, or start one process"
            )
        return Engine(recipe.device, recipe.precision, section)
    # They import torch.distributed's sharding and DeepSpeed: seconds.
    if section.kind in ("zero2", "zero3"):
        from flash_gsa.training.zero import Zero

        return Zero(recipe.device, recipe.precision, section)
    from flash_gsa.training.distributed import DataParallel, Sharded

    kinds = {"ddp": DataParallel, "fsdp2": Sharded, "hsdp": Sharded}
    return kinds[section.kind](recipe.device, recipe.precision, section)
