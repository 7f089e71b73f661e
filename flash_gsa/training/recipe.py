"""What a recipe holds: everything that decides how a training run goes.

Types and limits of single values are stated here, and so is what contradicts what. Reading recipe files,
overrides and readable messages: `recipe_file.py`.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from flash_gsa.errors import UsageError

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe. Its values cannot change after it has been checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class WeightedSource(Section):
    """One of several sources of training text, and its part of the rows."""

    source: str | list[str] = Field(description="stdlib, hf:ORG/NAME, a file, folder or pattern, or a list of these")
    weight: float = Field(gt=0, description="its part of the rows; only the proportions of the weights count")
    name: str | None = Field(None, description="label of all its documents; null: the labels that they have")


def _how_sources_are_given(value: Any) -> str:
    entries = value if isinstance(value, list) else []
    return "weighted" if any(isinstance(entry, dict | WeightedSource) for entry in entries) else "plain"


class TextData(Section):
    """Documents, tokenised and packed into rows of `batch.length` tokens.

    Where `source` is a list of weighted sources, a number of bytes (`held_out`, `train_bytes`, `max_bytes`) is divided
    between them by weight, and a share of bytes (`held_out` below 1) is taken of each.
    """

    kind: Literal["text"]
    source: Annotated[
        Annotated[str | list[str], Tag("plain")] | Annotated[list[WeightedSource], Tag("weighted")],
        Discriminator(_how_sources_are_given),
    ] = Field(
        description="training text: stdlib, hf:ORG/NAME, a file, folder or pattern, or a list of these, read one after "
        "the other; or a list of {source, weight}, mixed"
    )
    valid_source: str | list[str] | None = Field(
        None, description="held-out text: like data.source; or null, and data.held_out says how much"
    )
    held_out: int | float | None = Field(
        None, description="set aside from data.source: a share of its bytes (below 1) or a number of bytes"
    )
    train_bytes: Positive | None = Field(
        None, description="train on a fixed random sample of documents with so many bytes; null: on all"
    )
    max_bytes: Positive | None = Field(
        None, description="stop after the document that reaches so many bytes (for a source without end); null: all"
    )
    text_field: str = Field("text", description="field of a record that holds the text")
    source_field: str | None = Field(
        None, description="field that labels a record's part of the corpus; null: `source`, or the file's name"
    )
    cache_dir: str | None = Field(None, description="where tokens are cached; null: the user's cache folder")
    verify: Literal["once"] | bool = Field(
        "once",
        description="compare the checksums of cached tokens before the run, which reads them. once: of those not "
        "compared before, or changed since; true: of all; false: of none",
    )

    @property
    def weighted_sources(self) -> list[WeightedSource]:
        """The sources to be mixed; one where `source` is plain."""
        if isinstance(self.source, str):
            return [WeightedSource(source=self.source, weight=1.0, name=None)]
        plain = [source for source in self.source if isinstance(source, str)]
        weighted = [source for source in self.source if isinstance(source, WeightedSource)]
        return weighted or [WeightedSource(source=plain, weight=1.0, name=None)]

    @model_validator(mode="after")
    def _some_text(self) -> "TextData":
        given: dict[str, Any] = {"data.source": self.source, "data.valid_source": self.valid_source}
        for i, entry in enumerate(self.source):
            if isinstance(entry, WeightedSource):
                given[f"data.source.{i}.source"] = entry.source
        for key, value in given.items():
            if value == []:
                raise ValueError(f"{key} is an empty list: name at least one source of text")
        return self

    @model_validator(mode="after")
    def _one_held_out(self) -> "TextData":
        if (self.valid_source is None) == (self.held_out is None):
            raise ValueError("give one of data.held_out (how much of data.source is set aside) and data.valid_source")
        size = self.held_out
        if size is not None and not (0 < size < 1 or (isinstance(size, int) and size >= 1)):
            raise ValueError(f"data.held_out={size}: expected a share between 0 and 1, or a number of bytes")
        return self


class MQARData(Section):
    """Multi-query associative recall, made up as it is needed; rows of `batch.length` tokens.

    See `flash_gsa.data.multi_query_associative_recall`.
    """

    kind: Literal["mqar"]
    vocab_size: Positive = 8192
    num_kv_pairs: Positive = Field(description="key-value pairs in a row")
    power_a: float = Field(0.01, gt=0, le=1, description="exponent of the gaps' power law")
    random_non_queries: bool = True
    held_out: Positive = Field(1000, description="rows scored at each evaluation; rounded up to whole batches")


class OptimizerSection(Section):
    """AdamW and its learning rate: linear warm-up to `lr`, then a cosine to `min_lr`."""

    lr: float = Field(gt=0)
    min_lr: float = Field(ge=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.95], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0, description="largest joint L2 norm of the gradients")

    @model_validator(mode="after")
    def _order(self) -> "OptimizerSection":
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr ({self.min_lr}) is above optimizer.lr ({self.lr})")
        return self


class ScheduleSection(Section):
    """How long to train: exactly one of `steps`, `tokens` and `minutes`; and how long to warm up."""

    steps: Positive | None = None
    tokens: Positive | None = Field(None, description="tokens in all; rounded up to whole steps")
    minutes: float | None = Field(None, gt=0, description="time in all, without preparing the data")
    warmup_steps: Count | None = None
    warmup_tokens: Count | None = Field(None, description="tokens to warm up over; rounded up to whole steps")
    warmup_fraction: float | None = Field(None, ge=0, lt=1)

    @model_validator(mode="after")
    def _one_each(self) -> "ScheduleSection":
        lengths = [name for name in ("steps", "tokens", "minutes") if getattr(self, name) is not None]
        if not lengths:
            raise ValueError("give one of schedule.steps, schedule.tokens, schedule.minutes")
        if len(lengths) > 1:
            drop = " or ".join(f"schedule.{name}=null" for name in lengths)
            raise ValueError(f"schedule gives {' and '.join(lengths)}; keep one of them: add {drop}")
        warmups = ("warmup_steps", "warmup_tokens", "warmup_fraction")
        if sum(getattr(self, name) is not None for name in warmups) != 1:
            raise ValueError(
                f"give one of {', '.join(f'schedule.{name}' for name in warmups)} (set the others to null)"
            )
        if self.minutes is not None and self.warmup_fraction is not None:
            raise ValueError(
                "schedule.warmup_fraction needs a known number of steps, and schedule.minutes leaves it "
                "open; give schedule.warmup_steps and schedule.warmup_fraction=null"
            )
        return self


class BatchSection(Section):
    """One optimiser step sees `rows · length` tokens, on however many processes."""

    rows: Positive = Field(description="rows of one optimiser step, of all processes together")
    length: Positive = Field(description="tokens a row")
    micro_rows: Positive | None = Field(
        None,
        description="rows one process computes at once; null: all its rows. Gradients are accumulated over the rest",
    )

    @property
    def tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.rows * self.length

    def micro_batches(self, processes: int, context: int = 1) -> tuple[int, int]:
        """Rows of a micro-batch, and how many of them one process (or each group of `context`) does a step.

            rows = (processes / context) · micro rows · micro-batches

        Args:
            processes: how many train together.
            context: processes that share each row.

        Raises:
            UsageError: it does not divide; the message names the nearest numbers that do.
        """
        if found := self._divided(processes, context):
            return found
        if processes % context:
            raise UsageError(
                f"{processes} processes cannot form groups of engine.context={context} that share rows: "
                f"start {_nearest(processes, range(context, processes + 2 * context, context))} processes, "
                f"or set engine.context to a divisor of {processes}"
            )
        groups = processes // context
        micro = self.micro_rows or max(1, self.rows // groups)
        if micro * self.length % context:
            longer = _nearest(self.length, range(context, self.length + 2 * context, context))
            fewer = [f"engine.context={n}" for n in range(context - 1, 0, -1) if self._divided(processes, n)]
            raise UsageError(
                f"{micro * self.length} tokens at once (batch.micro_rows={micro}, batch.length={self.length}) cannot "
                f"be cut into equal stretches for the processes of engine.context={context}. "
                f"Set {' or '.join([*fewer[:1], f'batch.length={longer}'])}"
            )
        at_once = self.micro_rows or 1
        together = groups * at_once
        changes = [f"batch.rows={_nearest(self.rows, range(together, self.rows + 2 * together, together))}"]
        if at_once > 1 and self.rows % groups == 0:
            changes.append(f"batch.micro_rows={_nearest(at_once, _divisors(self.rows // groups))}")
        if self.rows % at_once == 0:
            counts = [context * n for n in _divisors(self.rows // at_once)]
            changes.append(f"{_nearest(processes, counts)} processes")
        if at_once > 1 and groups > self.rows // at_once:  # more processes than micro-batches
            most = _nearest(processes, [context * n for n in _divisors(self.rows)])
            changes.append(f"{most} processes with batch.micro_rows=1")
        raise UsageError(
            f"batch.rows={self.rows}, the rows of one step of all processes, cannot be divided over "
            + (f"{groups} processes" if context == 1 else f"{groups} groups of engine.context={context} processes")
            + (f" with batch.micro_rows={at_once}" if self.micro_rows else "")
            + f". The nearest that can: {', or '.join(changes)}"
        )

    def _divided(self, processes: int, context: int) -> tuple[int, int] | None:
        """What `micro_batches` returns; None where it refuses."""
        if processes % context:
            return None
        groups = processes // context
        micro = self.micro_rows or max(1, self.rows // groups)
        if micro * self.length % context or self.rows % (groups * micro):
            return None
        return micro, self.rows // (groups * micro)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest(number: int, candidates: Iterable[int]) -> int:
    return min(candidates, key=lambda n: (abs(n - number), n))


class EngineSection(Section):
    """On how many devices, and what each of them holds."""

    kind: Literal["single", "ddp", "fsdp2", "hsdp", "zero2", "zero3"] = Field(
        default="single",
        description="single: one process. ddp: whole copies. fsdp2, zero3: weights, gradients and moments in shards; "
        "hsdp: in shards within each of `replicas` groups; zero2: gradients and moments in shards",
    )
    replicas: Positive | None = Field(
        default=None, description="groups of processes that hold a whole model each; hsdp only"
    )
    reshard_after: Literal["block", "step"] = Field(
        default="block",
        description="when gathered weights are let go of and gradients summed; step exchanges once a step, and takes "
        "memory for all weights, and for all gradients where a step has several micro-batches. fsdp2 and hsdp only",
    )
    context: Positive = Field(
        default=1, description="processes that one row is cut over, for rows beyond one device's memory"
    )
    timeout: Positive = Field(default=600, description="seconds that processes wait for each other before they give up")
    compile: bool = Field(default=False, description="compile each block with torch.compile")
    checkpointing: Literal["none", "all"] | Positive = Field(
        default="none",
        description="compute blocks again in the backward instead of keeping their activations: all, or every n-th",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "EngineSection":
        if (self.kind == "hsdp") != (self.replicas is not None):
            raise ValueError("engine.replicas goes with engine.kind=hsdp: give both, or neither")
        if self.reshard_after == "step" and self.kind not in ("fsdp2", "hsdp"):
            raise ValueError(
                f"engine.reshard_after=step is for engine.kind=fsdp2 and hsdp, whose weights are gathered; {self.kind} "
                "has no such choice. Leave it out"
            )
        if self.kind == "single" and self.context > 1:
            raise ValueError(
                f"engine.context={self.context} cuts rows over several processes; engine.kind=single has one. "
                "Set engine.kind=ddp or fsdp2"
            )
        if self.kind in ("zero2", "zero3") and self.context > 1:
            raise ValueError("engine.context needs engine.kind=ddp, fsdp2 or hsdp")
        return self

    def shards(self, processes: int) -> int:
        """Over how many of so many processes weights or moments are divided.

        Raises:
            UsageError: `processes` cannot be divided into `replicas` groups.
        """
        if self.kind in ("single", "ddp"):
            return 1
        groups = self.replicas or 1
        if processes % groups:
            fewer, more = processes // groups * groups, -(-processes // groups) * groups
            divisors = ", ".join(str(n) for n in range(1, processes + 1) if processes % n == 0)
            raise UsageError(
                f"{processes} processes cannot be divided into engine.replicas={groups} groups of equal size: "
                f"start {f'{fewer} or ' if fewer else ''}{more}, or set engine.replicas to one of {divisors}"
            )
        return processes // groups


class EvaluationSection(Section):
    """The held-out score during training; also before the first step and after the last."""

    every: Positive = Field(description="steps between evaluations")
    max_bytes: Positive | None = Field(
        None, description="score held-out documents with at most so many bytes together; null: all"
    )


class CheckpointSection(Section):
    """When to write checkpoints (one is also written at the end) and how many to keep."""

    every: Positive = Field(description="steps between checkpoints")
    keep: Positive = Field(2, description="how many of the newest to keep")
    keep_every: Positive | None = Field(
        None, description="beside the newest, those of every so many steps are never deleted; a multiple of every"
    )

    @model_validator(mode="after")
    def _there_are_such(self) -> "CheckpointSection":
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(
                f"checkpoints.keep_every={self.keep_every} must be a multiple of checkpoints.every={self.every}: "
                "between those there are no checkpoints"
            )
        return self


class LoggingSection(Section):
    """What goes to metrics.jsonl, and who else is told."""

    every: Positive = Field(default=1, description="steps between lines")
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        default=["tensorboard"], description="who else is told the same figures; []: nobody"
    )
    project: str = Field(
        default="flash-gsa", min_length=1, description="the project that trackio and wandb file the run under"
    )

    @model_validator(mode="after")
    def _each_once(self) -> "LoggingSection":
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"logging.trackers names one twice: {', '.join(self.trackers)}")
        return self


class Recipe(Section):
    """Everything about a run. Loading what `to_yaml` wrote gives an equal object."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="names the run's folder: runs/<name>")
    description: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    output_dir: str | None = Field(None, description="the run's folder; null: runs/<name>")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:<n>")
    precision: Literal["auto", "bf16", "fp32", "pure_bf16"] = Field(
        "auto",
        description="bf16: products in bf16, weights and moments fp32; pure_bf16: all in bf16; auto: bf16 on a GPU "
        "that has it, else fp32",
    )
    engine: EngineSection = Field(default_factory=EngineSection)
    tokenizer: str | None = Field(None, description="byte, mistral, bpe:<size> or a tokenizer's folder")
    model: dict[str, Any] = Field(description="values of GSAConfig")
    data: TextData | MQARData = Field(discriminator="kind")
    batch: BatchSection
    schedule: ScheduleSection
    optimizer: OptimizerSection
    evaluation: EvaluationSection
    checkpoints: CheckpointSection
    logging: LoggingSection = Field(default_factory=LoggingSection)

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.data.kind == "text" and self.tokenizer is None:
            raise ValueError("tokenizer is missing: text needs one (byte, mistral, bpe:<size> or a folder)")
        if self.data.kind == "mqar" and self.tokenizer is not None:
            raise ValueError("data.kind=mqar makes token numbers itself; set tokenizer=null")
        if self.data.kind == "mqar" and self.evaluation.max_bytes is not None:
            raise ValueError("evaluation.max_bytes is for text; with data.kind=mqar data.held_out says how much")
        origin = "the tokenizer" if self.data.kind == "text" else "data"
        for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
            if name in self.model:
                raise ValueError(f"model.{name} is taken from {origin}; leave it out")
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device):
            raise ValueError(f"device={self.device!r} is not a device: expected auto, cpu, cuda or cuda:0")
        if self.engine.kind in ("zero2", "zero3") and self.precision == "pure_bf16":
            raise ValueError(
                f"engine.kind={self.engine.kind} keeps fp32 weights beside the bf16 ones; use precision=bf16, or "
                "engine.kind=fsdp2 for precision=pure_bf16"
            )
        return self
