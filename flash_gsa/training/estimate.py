"""What one process of a run will hold, in bytes, and whether that fits a device.

With P parameters, of which each process keeps 1/S:

    kind         weights               moments   gradients   gathered meanwhile
    single       4 P                   8 P       4 P         –
    ddp          4 P                   8 P       4 P         4 P: buckets, in which gradients are added up
    zero2        2 P + 4 P / S         8 P / S   2 P / S     a bucket of gradients
    fsdp2, hsdp  4 P / S               8 P / S   4 P / S     embedding, output, two blocks; gradients of one unit
      by step    4 P / S               8 P / S   4 P         all weights; gradients of one unit
    zero3        2 P / S + 4 P / S     8 P / S   6 P / S     as fsdp2, and a bucket of gradients

bytes, in precision bf16. S is the number of processes, in hsdp of those in one group. In fp32 every 2 is a 4; in
pure_bf16 there are bf16 weights, gradients and moments and nothing else. "By step" is `reshard_after: step`; its
gradients are whole, and DDP's are there beside the buckets, where several micro-batches add to them. Activations,
logits and what operations take meanwhile: `step_memory.py`.
"""

from dataclasses import dataclass

import torch

from flash_gsa.data import load_tokenizer
from flash_gsa.data.tokenizers import bpe_size
from flash_gsa.errors import UsageError
from flash_gsa.models import GSAForCausalLM
from flash_gsa.models.flops import training_flops
from flash_gsa.training.model import model_config
from flash_gsa.training.recipe import MQARData, Recipe
from flash_gsa.training.step_memory import step_memory

GIB = 2**30
OUTSIDE = GIB
"""What a process takes of a GPU beside its tensors: CUDA's context with all loaded kernels, workspaces of cuBLAS."""
COLLECTIVES = GIB
"""More of it where processes exchange: NCCL's buffers for each kind of exchange."""
BUCKET = 500_000_000
"""Numbers in a bucket of gradients that DeepSpeed reduces at once, its default."""


@dataclass(frozen=True)
class Size:
    """How large the model of a recipe is.

    Attributes:
        vocabulary: token ids.
        parameters: all; `embedding` of them in the embedding, `embeddings` with the output matrix if it is another;
            `largest_block` in the largest block, `outside_blocks` in none.
        flops: of a token, forward and backward: see `flash_gsa.models.flops`.
    """

    vocabulary: int
    parameters: int
    embedding: int
    embeddings: int
    largest_block: int
    outside_blocks: int
    flops: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the worst moment of a step.

    Attributes:
        weights, gradients, moments: what it keeps of them then.
        gathered: weights and gradients of others that it has for a while.
        working: activations, logits and what operations take meanwhile.
        outside: what no tensor of PyTorch shows.
    """

    weights: int
    gradients: int
    moments: int
    gathered: int
    working: int
    outside: int

    @property
    def tensors(self) -> int:
        """Without what is outside: to compare with `torch.cuda.max_memory_allocated`."""
        return self.total - self.outside

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.gathered + self.working + self.outside


def vocabulary_size(recipe: Recipe) -> int:
    """How many token ids the recipe's model has, found without data.

    Raises:
        UsageError: the tokenizer cannot be used.
    """
    if isinstance(recipe.data, MQARData):
        return recipe.data.vocab_size
    assert recipe.tokenizer is not None
    if recipe.tokenizer.startswith("bpe:"):
        return bpe_size(recipe.tokenizer)
    return len(load_tokenizer(recipe.tokenizer))


def model_size(recipe: Recipe) -> Size:
    """Counts the recipe's model, built without memory.

    Raises:
        UsageError: the tokenizer cannot be used.
    """
    vocabulary = vocabulary_size(recipe)
    with torch.device("meta"):
        model = GSAForCausalLM(model_config(recipe, vocabulary))
    total = _count(model)
    blocks = [_count(block) for block in model.model.layers]
    embedding = model.model.embeddings.weight.numel()
    tied = model.lm_head.weight is model.model.embeddings.weight
    return Size(
        vocabulary=vocabulary,
        parameters=total,
        embedding=embedding,
        embeddings=embedding * (1 if tied else 2),
        largest_block=max(blocks),
        outside_blocks=total - sum(blocks),
        flops=training_flops(model, recipe.batch.length),
    )


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def check_processes(recipe: Recipe, processes: int) -> None:
    """Raises UsageError if the recipe cannot run on so many processes; the message says on how many it can."""
    engine = recipe.engine
    if engine.kind == "single" and processes > 1:
        raise UsageError(
            f"engine.kind=single is one process, and there are {processes}. Set engine.kind=ddp (whole copies) or "
            "engine.kind=fsdp2 (weights and moments in shards), or start one process"
        )
    engine.shards(processes)
    recipe.batch.micro_batches(processes, engine.context)


def estimate_memory(recipe: Recipe, processes: int = 1, size: Size | None = None) -> Memory:
    """The memory of one of `processes` that train by a recipe on GPUs.

    Args:
        recipe: precision `auto` is taken for bf16.
        processes: all of them.
        size: of the recipe's model, where it is known already.

    Raises:
        UsageError: the recipe cannot run on so many processes.
    """
    check_processes(recipe, processes)
    size = size or model_size(recipe)
    engine, precision = recipe.engine, recipe.precision
    rows, micro_batches = recipe.batch.micro_batches(processes, engine.context)
    kept, compute = (2, 2) if precision == "pure_bf16" else (4, 4 if precision == "fp32" else 2)
    shards = engine.shards(processes)
    whole_copy = engine.kind in ("single", "ddp")
    zero = engine.kind in ("zero2", "zero3")

    # Of P / S numbers each: the copy that the optimiser updates, and its two moments.
    part = -(-size.parameters // shards)
    moments = 2 * kept * part
    weights, gathered = kept * part, 0
    gradient = kept * part  # bytes of all gradients, once whole
    summed = gradient  # of it, what is left when the processes have added theirs up
    held = kept if whole_copy else compute  # bytes of a number of the weights that layers compute with
    if zero and compute != kept:
        weights += compute * (size.parameters if engine.kind == "zero2" else part)
        gradient = summed = (compute if engine.kind == "zero2" else compute + kept) * part
    elif engine.kind == "zero2":
        weights += compute * (size.parameters - part)
    if engine.kind in ("fsdp2", "hsdp", "zero3"):
        unit = max(size.largest_block, size.outside_blocks - size.embedding)
        whole = size.outside_blocks + 2 * size.largest_block
        if engine.reshard_after == "step":
            whole = size.parameters
            gradient = 4 * size.parameters if micro_batches > 1 else gradient
        gathered += compute * whole + (compute + 4) * unit
    if engine.kind == "ddp":
        gathered = kept * size.parameters
        gradient = gradient if micro_batches > 1 else 0  # of one micro-batch they go into the buckets one by one
    if zero:
        gathered += compute * min(size.parameters, BUCKET)

    config = model_config(recipe, size.vocabulary)
    worst = step_memory(
        config.to_json_string(),
        rows,
        recipe.batch.length // engine.context,
        torch.float32 if held == 4 else torch.bfloat16,
        torch.float32 if compute == 4 else torch.bfloat16,
        engine.checkpointing,
        micro_batches > 1,
        gradient / (held * size.parameters),
    )
    outside = OUTSIDE + (COLLECTIVES if processes > 1 else 0)
    return max(
        Memory(weights, worst.gradients, moments, gathered, worst.working, outside),
        Memory(weights, summed, moments, 0, 0, outside),  # during the optimiser's step
        key=lambda memory: memory.total,
    )
