"""The model that a recipe asks for."""

from typing import TYPE_CHECKING, Any

import torch

from flash_gsa.errors import UsageError
from flash_gsa.models import GSAConfig, GSAForCausalLM
from flash_gsa.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def model_config(recipe: Recipe, vocab_size: int, tokenizer: "PreTrainedTokenizerFast | None" = None) -> GSAConfig:
    """The recipe's `model` section with the vocabulary's size and the tokenizer's special tokens filled in.

    Raises:
        UsageError: an unknown or contradictory setting.
    """
    special: dict[str, Any] = {
        name: None if tokenizer is None else getattr(tokenizer, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return GSAConfig(**recipe.model, vocab_size=vocab_size, **special)


def check_model(recipe: Recipe) -> None:
    """Raises UsageError if no model can be built from the recipe; builds one without memory to find out."""
    try:
        with torch.device("meta"):
            model = GSAForCausalLM(model_config(recipe, vocab_size=1))
    except UsageError as error:
        raise UsageError(f"in the section model: {error}") from None
    every, blocks = recipe.engine.checkpointing, len(model.model.layers)
    if isinstance(every, int) and every > blocks:
        raise UsageError(
            f"engine.checkpointing={every} would compute no block again: the model has {blocks}. Set a number up to "
            f"{blocks}, all, or none"
        )
    if recipe.engine.context > 1:
        from flash_gsa.parallel.model import check_recurrent  # torch.distributed, which few recipes need

        for index, block in enumerate(model.model.layers):
            check_recurrent(index, block.attn)
