"""Context parallelism of a whole model: every layer's work along time, by what the processes of a group exchange.

The model is not rewritten. Its mixers and convolutions ask their `sequences` for all that reaches across tokens; here
another object is put there. The rest of a model treats each token on its own.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..layers import SoftmaxAttention
from ..layers.sequences import WholeSequences
from ..models import GSAForCausalLM, GSAModel
from .abc import context_parallel_abc_gates
from .context import context_parallel_gated_linear_attention, context_parallel_gated_slot_attention
from .exchange import Gather, Group, Tied, place

REFUSED = {
    "attention_mask": "padding has no place in stretches; pack the sequences and give cu_seqlens",
    "past_key_values": "a cache belongs to whole sequences; leave it out",
    "use_cache": "a cache belongs to whole sequences; give use_cache=False",
}
REFUSED_LABELS = (
    "labels are shifted by one token, and the last one's next token is on the next process; give targets that are "
    "shifted already to flash_gsa.models.loss.next_token_loss (flash_gsa.parallel.stretch cuts them)"
)


class Stretches(WholeSequences):
    """Along time, for a process that has a stretch of every sequence, as many tokens as every other of `group`."""

    def __init__(self, group: Group):
        self.group = group
        self.rank, self.ranks = place(group)

    def gated_slot_attention(self, *inputs: Tensor | None, **options: Any) -> tuple[Tensor, Any]:
        return context_parallel_gated_slot_attention(*inputs, group=self.group, **options)

    def gated_linear_attention(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, Any]:
        return context_parallel_gated_linear_attention(*inputs, group=self.group, **options)

    def abc_gates(self, logits: Tensor, normalizer: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Any, ...]:
        assert normalizer is None, "no cache under context parallelism"
        return *context_parallel_abc_gates(logits, group=self.group, cu_seqlens=cu_seqlens), None

    @torch.compiler.disable
    def before(self, x: Tensor, tokens: int) -> Tensor:
        """The last inputs of the process before; their gradient goes back to it."""
        if x.shape[1] < tokens:
            raise UsageError(
                f"a short convolution reaches {tokens} tokens back, but a process has {x.shape[1]}; use fewer processes"
            )
        every = Gather.apply(x[:, -tokens:], self.group)
        return every[self.rank - 1] if self.rank > 0 else Tied.apply(super().before(x, tokens), every)

    def first(self, length: int) -> int:
        return self.rank * length


class ContextParallel:
    """What `apply_context_parallel` has done to a model."""

    def __init__(self, model: nn.Module, group: Group):
        self._stretches = Stretches(group)
        self._layers: list[Any] = [module for module in model.modules() if hasattr(module, "sequences")]
        self._on = False
        for module in model.modules():
            if isinstance(module, GSAModel):
                _before_forward(module, self._without_cache)
            elif isinstance(module, GSAForCausalLM):
                _before_forward(module, self._without_labels)
        self._switch(True)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within it, the model computes whole sequences, each process on its own: to evaluate, or to generate."""
        self._switch(False)
        try:
            yield
        finally:
            self._switch(True)

    def _switch(self, on: bool) -> None:
        self._on = on
        for layer in self._layers:
            layer.sequences = self._stretches if on else WholeSequences()

    def _without_cache(self, given: dict[str, Any]) -> dict[str, Any]:
        if not self._on:
            return given
        for name, why in REFUSED.items():
            if given.get(name) is not None and given[name] is not False:
                raise UsageError(f"{name} was given to a model under context parallelism: {why}")
        return given | {"use_cache": False}  # None would mean one in eval()

    def _without_labels(self, given: dict[str, Any]) -> dict[str, Any]:
        if self._on and given.get("labels") is not None:
            raise UsageError(f"labels were given to a model under context parallelism: {REFUSED_LABELS}")
        return given


def check_recurrent(index: int, mixer: nn.Module) -> None:
    """Raises UsageError if `mixer`, that of layer `index`, is softmax attention, which hands no state over."""
    if isinstance(mixer, SoftmaxAttention):
        raise UsageError(
            f"layer {index} is softmax attention, which has no state that could be handed from process to process; "
            "context parallelism is for models whose layers are all recurrent. Leave it out (engine.context of a "
            "recipe), or make all layers recurrent"
        )


def apply_context_parallel(model: nn.Module, group: Group = None) -> ContextParallel:
    """Make a model compute stretches of sequences, of which the other processes of `group` have the others.

    Afterwards every process runs the model on its tokens, input_ids [B, T] being tokens rank·T … (rank + 1)·T - 1 of
    every row of [B, ranks·T], with `cu_seqlens`, if given, of the whole packed row (B = 1), the same everywhere. It
    gets the hidden states and logits of its tokens as one process with whole rows would. What it finds as gradients of
    the parameters is its tokens' part of them: the sum over the group is the gradient of the whole.

    Every process must run every forward and backward, in the same order. Apply this before a model is wrapped for DDP
    or FSDP and before its blocks are compiled. Blocks may be checkpointed without reentering, and compiled:
    torch.compile then breaks its graph at every exchange.

    Args:
        model: a `GSAForCausalLM`, a `GSAModel`, or what contains one; changed in place, its parameters are not.
        group: the processes in the order of stretches; None: all.

    Returns:
        An object whose `suspended()` is a context in which the model computes whole sequences again.

    Raises:
        UsageError: no process group is initialised; no GSA model in `model`, one this was applied to before, or one
            with softmax attention, which needs keys and values of all tokens before, or with another mixer that has no
            `sequences`. Later, in a forward: attention_mask, a cache, or labels; stretches shorter than a convolution;
            boundaries that do not end at ranks·T.
    """
    models = [module for module in model.modules() if isinstance(module, GSAModel)]
    if not models:
        raise UsageError(f"context parallelism needs a GSAForCausalLM or GSAModel, got {type(model).__name__}")
    for index, block in ((i, block) for model in models for i, block in enumerate(model.layers)):
        mixer: Any = block.attn
        check_recurrent(index, mixer)
        if not hasattr(mixer, "sequences"):
            raise UsageError(
                f"layer {index} is of type {type(mixer).__name__}, which does not say how it reaches across tokens; "
                "context parallelism needs mixers with an attribute `sequences` (flash_gsa/layers/sequences.py)"
            )
        if isinstance(mixer.sequences, Stretches):
            raise UsageError("context parallelism was applied to this model before; apply it once")
    return ContextParallel(model, group)


def _before_forward(module: nn.Module, check: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Give all arguments of a module's forward, by their names, to `check`, and what it returns to the forward."""
    names = list(inspect.signature(module.forward).parameters)

    def checked(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return (), check(dict(zip(names, args, strict=False)) | kwargs)

    module.register_forward_pre_hook(checked, with_kwargs=True)
