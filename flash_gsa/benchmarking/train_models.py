"""Who trains: this package's GSA model, FLA's, and a Llama of transformers, at sizes that correspond.

All have the same width, depth, MLP and vocabulary. A model is given rows of tokens [B, T] as its own users give them
and returns the mean loss of predicting each token from those before it in its row.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_gsa.errors import UsageError, did_you_mean

NOT_SCORED = -100


@dataclass(frozen=True)
class Size:
    """Sizes of a model: `heads` of GSA, `softmax_heads` of Llama. Other settings are those of published models."""

    name: str
    hidden: int
    layers: int
    heads: int
    softmax_heads: int
    slots: int = 64
    vocabulary: int = 32000
    intermediate: int | None = None

    def config(self, mixer: str = "gsa", **more: Any) -> Any:
        """The `GSAConfig` of this size; with the mixer "attention" it stands for Llama."""
        from flash_gsa.models import GSAConfig

        return GSAConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            token_mixer=mixer,
            num_heads=self.heads if mixer == "gsa" else self.softmax_heads,
            num_slots=self.slots,
            **more,
        )

    def training_flops(self, mixer: str, length: int) -> float:
        """FLOPs a token of a training step, counted as `flash_gsa.models.flops` does, for every package alike."""
        from flash_gsa.models import GSAForCausalLM
        from flash_gsa.models.flops import training_flops

        with torch.device("meta"):
            return training_flops(GSAForCausalLM(self.config(mixer)), length)


SIZES = {
    size.name: size
    for size in (
        Size("130M", hidden=768, layers=12, heads=3, softmax_heads=12),
        Size("340M", hidden=1024, layers=24, heads=4, softmax_heads=8),
        Size("1.3B", hidden=2048, layers=24, heads=4, softmax_heads=16),
        Size("2.7B", hidden=2560, layers=32, heads=5, softmax_heads=20),
        Size("tiny", hidden=64, layers=2, heads=2, softmax_heads=2, slots=16, vocabulary=256),
    )
}


class Trained:
    """One who trains. `name` is what `--peers` calls it.

    variants: ways to run it, the first as it comes. mixer: whose FLOPs its model has. gradients_judged: whether the
    gradients of its parameters are compared with float64, as its logits and its loss are. small_loss: options of
    `loss` with which a small batch is computed the way a large one is.
    """

    name: str
    variants: tuple[str, ...]
    mixer = "gsa"
    gradients_judged = True
    tunes = False
    small_loss: dict[str, Any] = {}  # noqa: RUF012

    def reason_against(self, device: torch.device) -> str | None:
        """None if it can run there, else why not."""
        return None

    def config(self, size: Size, variant: str, **more: Any) -> Any:
        """Its configuration; `more` are settings of `GSAConfig`."""
        raise NotImplementedError

    def build(self, config: Any) -> nn.Module:
        """A model with random weights, on the default device."""
        raise NotImplementedError

    def twin(self, size: Size, **more: Any) -> nn.Module:
        """A model of the same parameters that computes by definition, in any precision."""
        return self.build(self.config(size, self.variants[0], **more))

    def compile(self, model: Any) -> None:
        """Make the variant "compiled" of it."""
        raise NotImplementedError

    def forward(self, model: Any, tokens: Tensor) -> Tensor:
        """What the loss is computed from."""
        return tokens

    def loss(self, model: Any, forwarded: Tensor, tokens: Tensor, **options: Any) -> Tensor:
        """The mean loss, given what `forward` returned."""
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        """[B, T, vocabulary]."""
        return model(input_ids=tokens, use_cache=False).logits


class Ours(Trained):
    """`flash_gsa.GSAForCausalLM` with `next_token_loss`, as the trainer runs it.

    "compiled": each block by torch.compile. "graph": a whole step, optimiser included, as one CUDA graph.
    """

    name = "ours"
    variants = ("plain", "compiled", "graph")
    small_loss = {"at_once": 1 << 14}  # noqa: RUF012

    def config(self, size: Size, variant: str, **more: Any) -> Any:
        return size.config(**more)

    def build(self, config: Any) -> nn.Module:
        from flash_gsa.models import GSAForCausalLM

        return GSAForCausalLM(config)

    def compile(self, model: Any) -> None:
        for block in model.model.layers:
            block.compile()

    def forward(self, model: Any, tokens: Tensor) -> Tensor:
        return model.model(tokens, use_cache=False).last_hidden_state

    def loss(self, model: Any, forwarded: Tensor, tokens: Tensor, **options: Any) -> Tensor:
        from flash_gsa.models.loss import next_token_loss

        targets = F.pad(tokens[:, 1:], (0, 1), value=NOT_SCORED)
        scored = targets.numel() - targets.shape[0]
        return next_token_loss(forwarded, model.lm_head.weight, targets, scored=scored, **options)


class Fla(Trained):
    """`fla.models.GSAForCausalLM` with the fused modules it turns on by itself.

    "linear-loss": with the loss that makes no table of logits. Its kernels keep torch.compile out, so it has no such
    variant. Gradients are not judged: they come of gates in 16 bits.
    """

    name = "fla"
    variants = ("plain", "linear-loss")
    gradients_judged = False
    tunes = True

    def reason_against(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("fla") is None:
            return "flash-linear-attention is not installed"
        return None if device.type == "cuda" else "its kernels need a GPU"

    def config(self, size: Size, variant: str, **more: Any) -> Any:
        from fla.models.gsa import GSAConfig

        linear = variant == "linear-loss"
        return GSAConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            intermediate_size=size.config().intermediate_size,
            num_heads=size.heads,
            num_slots=size.slots,
            fuse_cross_entropy=not linear,
            fuse_linear_cross_entropy=linear,
            **more,
        )

    def build(self, config: Any) -> nn.Module:
        from fla.models.gsa import GSAForCausalLM

        return GSAForCausalLM(config)

    def twin(self, size: Size, **more: Any) -> nn.Module:
        return Ours().twin(size, **more)


class Llama(Trained):
    """`transformers.LlamaForCausalLM` with softmax attention by PyTorch ("sdpa"), heads of 128.

    "compiled": the whole model, its loss included, by torch.compile.
    """

    name = "llama"
    variants = ("plain", "compiled")
    mixer = "attention"

    def config(self, size: Size, variant: str, **more: Any) -> Any:
        from transformers import LlamaConfig

        settings: dict[str, Any] = {"rms_norm_eps": more["norm_eps"]} if "norm_eps" in more else {}
        settings["attn_implementation"] = "sdpa"
        return LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            intermediate_size=size.config("attention").intermediate_size,
            num_attention_heads=size.softmax_heads,
            max_position_embeddings=1 << 20,
            **settings,
        )

    def build(self, config: Any) -> nn.Module:
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM(config)

    def compile(self, model: Any) -> None:
        model.compile()

    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).logits  # as `loss`: compiled once for both


TRAINED: dict[str, Trained] = {who.name: who for who in (Ours(), Llama(), Fla())}
"""By name; what tunes itself for minutes comes last."""

DEFAULT_VARIANTS = ("plain", "compiled")


def all_variants() -> list[str]:
    """The variants of all of them."""
    return list(dict.fromkeys(variant for who in TRAINED.values() for variant in who.variants))


def check_known(what: str, given: tuple[str, ...], known: Any) -> None:
    """Raises UsageError for the first of `given` that is not `known`, naming the nearest that is."""
    for name in given:
        if name not in known:
            raise UsageError(f"there is no {what} {name!r}; choose of {', '.join(known)}.{did_you_mean(name, known)}")
