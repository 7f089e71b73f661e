"""What a recipe holds: everything that decides how a training run goes.

Types and limits of single values are stated here, and so is what contradicts what. Reading recipe files,
overrides and readable messages: `recipe_file.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe. Its values cannot change after it has been checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TextData(Section):
    """Documents, tokenised and packed into rows of `batch.length` tokens."""

    kind: Literal["text"]
    source: str | list[str] = Field(
        description="training text: stdlib, hf:ORG/NAME, a file, folder or pattern, or a list of these"
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
        None, description="read no more than so many bytes of data.source (for one without end); null: all"
    )
    text_field: str = Field("text", description="field of a record that holds the text")
    source_field: str | None = Field(
        None, description="field that labels a record's part of the corpus; null: `source`, or the file's name"
    )
    cache_dir: str | None = Field(None, description="where tokens are cached; null: the user's cache folder")

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
    warmup_fraction: float | None = Field(None, ge=0, lt=1)

    @model_validator(mode="after")
    def _one_each(self) -> "ScheduleSection":
        lengths = [name for name in ("steps", "tokens", "minutes") if getattr(self, name) is not None]
        if not lengths:
            raise ValueError("give one of schedule.steps, schedule.tokens, schedule.minutes")
        if len(lengths) > 1:
            drop = " or ".join(f"schedule.{name}=null" for name in lengths)
            raise ValueError(f"schedule gives {' and '.join(lengths)}; keep one of them: add {drop}")
        if (self.warmup_steps is None) == (self.warmup_fraction is None):
            raise ValueError("give one of schedule.warmup_steps and schedule.warmup_fraction (set the other to null)")
        if self.minutes is not None and self.warmup_fraction is not None:
            raise ValueError(
                "schedule.warmup_fraction needs a known number of steps, and schedule.minutes leaves it "
                "open; give schedule.warmup_steps and schedule.warmup_fraction=null"
            )
        return self


class BatchSection(Section):
    """One optimiser step sees `rows · length · accumulation` tokens."""

    rows: Positive
    length: Positive
    accumulation: Positive = 1

    @property
    def tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.rows * self.length * self.accumulation


class EvaluationSection(Section):
    """The held-out score during training; also before the first step and after the last."""

    every: Positive = Field(description="steps between evaluations")
    max_bytes: Positive | None = Field(
        None, description="score held-out documents with at most so many bytes together; null: all"
    )


class CheckpointSection(Section):
    """When to write checkpoints (one is also written at the end) and how many to keep."""

    every: Positive = Field(description="steps between checkpoints")
    keep: Positive = 2


class LoggingSection(Section):
    """What goes to metrics.jsonl."""

    every: Positive = Field(default=1, description="steps between lines")
    tensorboard: bool = True


class Recipe(Section):
    """Everything about a run. Loading what `to_yaml` wrote gives an equal object."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="names the run's folder: runs/<name>")
    description: str
    seed: Count = 0
    output_dir: str | None = Field(None, description="the run's folder; null: runs/<name>")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:<n>")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 on a GPU that has it, else fp32")
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more time")
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
        return self
