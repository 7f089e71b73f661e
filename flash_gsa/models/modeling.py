"""The GSA language model: embeddings, blocks of token mixer and SwiGLU, output logits."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..errors import UsageError
from ..layers import HGRN2, MIXERS, GatedSlotAttention, RMSNorm, ShortConvolution
from ..layers.hgrn2 import lower_bounds
from ..layers.linears import is_product
from ..layers.norm import AddRMSNorm
from ..ops.linears import swiglu_mlp
from ..ops.pointwise import swiglu
from .cache import GSACache
from .configuration import GSAConfig


class SwiGLU(nn.Module):
    """y = W_down (SiLU(W_gate x) ∘ W_up x), [B, T, d] → [B, T, d]. Source: Shazeer, 2020."""

    def __init__(self, config: GSAConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.gate_proj, self.up_proj, self.down_proj
        if all(is_product(linear) for linear in maps):
            return swiglu_mlp(x, *(linear.weight for linear in maps))
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class GSABlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)): [B, T, d] → [B, T, d]."""

    def __init__(self, config: GSAConfig, layer_idx: int):
        super().__init__()
        self.attn_norm = AddRMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = MIXERS[config.mixer_of(layer_idx)](config, layer_idx)
        self.mlp_norm = AddRMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: GSACache | None = None,
        lower_bound: Tensor | None = None,
    ) -> Tensor:
        own = {} if lower_bound is None else {"lower_bound": lower_bound}  # only HGRN2 layers are given one
        x, normed = self.attn_norm(x)
        mixed = self.attn(normed, attention_mask=attention_mask, cu_seqlens=cu_seqlens, cache=cache, **own)
        x, normed = self.mlp_norm(x, mixed)
        return x + self.mlp(normed)


class GSAPreTrainedModel(PreTrainedModel):
    """What GSA models share with Hugging Face: initialisation, saving, loading."""

    config_class = GSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GSABlock"]  # noqa: RUF012
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            if module.weight is not None:
                nn.init.ones_(module.weight)
        elif isinstance(module, ShortConvolution):
            nn.init.uniform_(module.weight, -(module.width**-0.5), module.width**-0.5)
        elif isinstance(module, GatedSlotAttention) and module.gating == "data_independent":
            # Gates may be loaded already where another weight of the layer is missing. (For the functions of nn.init
            # transformers sees to that itself.)
            loaded = getattr(module.f_bias, "_is_hf_initialized", False)
            if not loaded:
                module.reset_gates()
        elif isinstance(module, GSAModel) and module.lower_bounds is not None:
            nn.init.zeros_(module.lower_bounds)


class GSAModel(GSAPreTrainedModel):
    """Embeddings and blocks, without the output logits. `config`: a `GSAConfig`."""

    def __init__(self, config: GSAConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([GSABlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lower_bounds: nn.Parameter | None = None
        if width := next((block.attn.kv_key_dim for block in self.layers if isinstance(block.attn, HGRN2)), None):
            self.lower_bounds = nn.Parameter(torch.zeros(config.num_hidden_layers, width))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: GSACache | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """Run the blocks.

        Args:
            input_ids: [B, T]; or inputs_embeds [B, T, d].
            attention_mask: [B, T] for these tokens, or [B, S + T] for the S seen before and these; 1 for a
                token, 0 for padding. Padding changes no other position's result; to go on from a padded
                batch (use_cache), pad on the left.
            past_key_values: cache of the S tokens before; filled in place.
            use_cache: return a cache; None: as the configuration says, never in training.
            cu_seqlens: [N+1] boundaries of packed sequences, with B = 1 and no attention_mask.
            output_hidden_states: also return the residual stream before each block and the final output.

        Returns:
            `last_hidden_state` [B, T, d], `past_key_values`, `hidden_states`.

        Raises:
            UsageError: arguments that exclude each other or do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("give either input_ids or inputs_embeds")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        x = inputs_embeds if input_ids is None else self.embeddings(self._checked(input_ids))
        assert x is not None
        T = x.shape[1]

        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seqlens is None
        if self.gradient_checkpointing and self.training and (use_cache or past_key_values is not None):
            raise UsageError(
                "gradient checkpointing runs a block twice, which would advance the cache twice; "
                "call with use_cache=False and no past_key_values"
            )
        if past_key_values is not None and not isinstance(past_key_values, GSACache):
            raise UsageError(
                f"past_key_values must be a flash_gsa GSACache, got {type(past_key_values).__name__}; "
                "pass None and use_cache=True to get one"
            )
        cache = past_key_values if past_key_values is not None else GSACache() if use_cache else None
        attention_mask = self._mask(attention_mask, cu_seqlens, x, cache)

        hidden = [x] if output_hidden_states else None
        for block, bound in zip(self.layers, self._lower_bounds(), strict=True):
            x = block(x, attention_mask=attention_mask, cu_seqlens=cu_seqlens, cache=cache, lower_bound=bound)
            if hidden is not None:
                hidden.append(x)
        x = self.norm(x)
        if hidden is not None:
            hidden[-1] = x
        if cache is not None:
            cache.advance(T)
        out = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,  # type: ignore[arg-type]  # a cache of our own
            hidden_states=None if hidden is None else tuple(hidden),
        )
        return out if return_dict else out.to_tuple()

    def _lower_bounds(self) -> list[Tensor | None]:
        """For each block the lower bound of its forget gates, if it is HGRN2."""
        if self.lower_bounds is None:
            return [None] * len(self.layers)
        bounds = lower_bounds(self.lower_bounds)
        return [
            bound if isinstance(block.attn, HGRN2) else None for block, bound in zip(self.layers, bounds, strict=True)
        ]

    def _checked(self, input_ids: Tensor) -> Tensor:
        """Token ids inside the vocabulary, looked at where that costs no wait for a device."""
        if input_ids.dim() != 2:
            raise UsageError(f"input_ids must be [B, T], got {list(input_ids.shape)}")
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling() and input_ids.numel():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise UsageError(
                    f"input_ids holds id {low if low < 0 else high}, but the vocabulary has {self.config.vocab_size} "
                    "ids; was the text tokenised with this checkpoint's tokenizer?"
                )
        return input_ids

    def _mask(self, mask, cu_seqlens, x: Tensor, cache: GSACache | None) -> Tensor | None:
        if mask is None:
            return None
        B, T, _ = x.shape
        if cu_seqlens is not None:
            raise UsageError("give attention_mask (padded batch) or cu_seqlens (packed sequences), not both")
        seen = 0 if cache is None else cache.get_seq_length()
        if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] not in (T, seen + T):
            raise UsageError(
                f"attention_mask must be [B, T] = {[B, T]}"
                + (f" or, with the {seen} tokens seen before, {[B, seen + T]}" if seen else "")
                + f", got {list(mask.shape)}"
            )
        mask = mask[:, -T:]
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            if bool(mask.bool().all()):
                return None
            if cache is not None and not bool(mask[:, -1].bool().all()):
                raise UsageError(
                    "attention_mask ends in padding, and a cache is to be kept: what follows would come after the "
                    "padding. Pad on the left (tokenizer.padding_side = 'left'), or call with use_cache=False"
                )
        return mask


class GSAForCausalLM(GSAPreTrainedModel, GenerationMixin):
    """`GSAModel` with output logits: a language model for training, scoring and `generate()`."""

    accepts_loss_kwargs = True  # the Trainer may pass num_items_in_batch
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: GSAConfig):
        super().__init__(config)
        self.model = GSAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: GSACache | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits and, with `labels`, the loss.

        Args:
            labels: [B, T], as input_ids; position t is scored against labels[t+1], -100 is not scored. Across
                boundaries of packed sequences nothing is scored.
            logits_to_keep: compute logits of the last so many positions only; 0: all.
            num_items_in_batch: divide the summed loss by this instead of by the number of scored tokens; the
                Hugging Face Trainer gives it when it accumulates gradients.
            The others: see `GSAModel.forward`.

        Returns:
            `loss` (mean nats a scored token), `logits` [B, T, vocab_size], `past_key_values`, `hidden_states`.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise UsageError("labels score every position, so logits_to_keep must be 0 with them")
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            if cu_seqlens is not None:
                labels = labels.clone()
                starts = cu_seqlens[:-1].to(labels.device, torch.int64)
                labels[0, starts[starts < labels.shape[1]]] = -100
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return result if return_dict else result.to_tuple()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The model makes its own cache; generate() must not make one.
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]  # only what this model needs
        self,
        input_ids: Tensor,
        past_key_values: GSACache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `generate()` passes to `forward` for the next step: the tokens not seen yet."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs: dict[str, Any] = {"past_key_values": past_key_values, "use_cache": use_cache}
        if inputs_embeds is not None and seen == 0:
            inputs["inputs_embeds"] = inputs_embeds
            length = inputs_embeds.shape[1]
        else:
            # After inputs_embeds, input_ids holds only what was generated.
            new = input_ids[:, seen:] if inputs_embeds is None else input_ids[:, seen - inputs_embeds.shape[1] :]
            if new.shape[1] == 0:
                raise UsageError(
                    f"past_key_values has seen {seen} tokens and input_ids holds no later one; give the whole "
                    "sequence, ending in at least one token that is not in the cache yet"
                )
            inputs["input_ids"] = new
            length = new.shape[1]
        if attention_mask is not None and (seen == 0 or length > 1):
            # A single generated token is never padding.
            inputs["attention_mask"] = attention_mask[:, -length:]
        if "logits_to_keep" in kwargs:
            inputs["logits_to_keep"] = kwargs["logits_to_keep"]
        return inputs
