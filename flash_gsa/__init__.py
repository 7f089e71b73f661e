"""flash-gsa: Gated Slot Attention — operator, models, training, constant-memory inference.

`gated_slot_attention` is the operator; `GSAForCausalLM` a language model on it. Importing `flash_gsa` registers the
model type "gsa" with transformers' Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ._auto_classes import register_when_imported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .layers import HGRN2, GatedLinearAttention, GatedSlotAttention, MultiScaleRetention, SoftmaxAttention
    from .models import GSACache, GSAConfig, GSAForCausalLM, GSAModel
    from .ops import (
        abc_gates,
        abc_gates_step,
        gated_linear_attention,
        gated_linear_attention_step,
        gated_slot_attention,
        gated_slot_attention_step,
    )

_HOME = {
    "GatedLinearAttention": "layers",
    "GatedSlotAttention": "layers",
    "HGRN2": "layers",
    "MultiScaleRetention": "layers",
    "SoftmaxAttention": "layers",
    "GSACache": "models",
    "GSAConfig": "models",
    "GSAForCausalLM": "models",
    "GSAModel": "models",
    "abc_gates": "ops",
    "abc_gates_step": "ops",
    "gated_linear_attention": "ops",
    "gated_linear_attention_step": "ops",
    "gated_slot_attention": "ops",
    "gated_slot_attention_step": "ops",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


register_when_imported()
