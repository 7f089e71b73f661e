"""The training loop.

    for each step:  draw `accumulation` batches → Σ loss over their scored tokens → gradients → clip
                    → check that all is finite → AdamW with this step's learning rate
                    → metrics, now and then a held-out score and a checkpoint

A run can be stopped at any moment and continued by the same call: what decides the following steps (weights,
optimiser moments, position in the data, random states, number of steps, time spent) is in each checkpoint.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from safetensors.torch import load_model

from flash_gsa.data import NOT_SCORED, Batch
from flash_gsa.errors import UsageError
from flash_gsa.inspection.usage import slot_usage
from flash_gsa.models import GSAForCausalLM
from flash_gsa.models.flops import training_flops
from flash_gsa.models.loss import next_token_loss
from flash_gsa.training import events
from flash_gsa.training.checkpoint import (
    Checkpoint,
    check_space,
    disk_errors,
    latest_checkpoint,
    save_checkpoint,
)
from flash_gsa.training.engine import Engine
from flash_gsa.training.errors import TrainingStopped
from flash_gsa.training.inputs import Inputs, prepare_inputs
from flash_gsa.training.interrupts import Interrupts
from flash_gsa.training.metrics import MetricsWriter, read_metrics
from flash_gsa.training.model import model_config
from flash_gsa.training.optimizer import (
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from flash_gsa.training.plots import plot_loss
from flash_gsa.training.recipe import Recipe
from flash_gsa.training.run_folder import Existing, open_run_folder
from flash_gsa.training.schedule import RunLength

# Of held-out data, for `slot_usage`: token by token, so not many.
_TOKENS_LOOKED_AT = 256


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind.

    Attributes:
        run_dir: its folder.
        checkpoint: the newest checkpoint.
        step: steps taken in all.
        metrics: the last `eval` line of metrics.jsonl.
        picture: loss.png.
        signal: "SIGINT" or "SIGTERM" if the run was stopped before its end; the same call goes on.
    """

    run_dir: Path
    checkpoint: Path
    step: int
    metrics: dict[str, Any]
    picture: Path
    signal: str | None


def train(
    recipe: Recipe,
    *,
    existing: Existing = "resume",
    on_event: events.Listener = lambda event: None,
    engine: Engine | None = None,
) -> TrainResult:
    """Trains a model by a recipe, from the start or from where the run in its folder stopped.

    Args:
        recipe: from `load_recipe`.
        existing: what to do if the folder holds a run: "resume" it, "overwrite" it, or "refuse".
        on_event: told what happens, see `events`; `ProgressDisplay` shows it in a terminal.
        engine: where it runs; by default what `recipe.device` and `recipe.precision` say.

    Raises:
        UsageError: before anything is trained: the recipe cannot run here, its folder or data cannot be used, a
            checkpoint is damaged; later: the disk is full.
        TrainingStopped: the loss or the gradient is no longer finite.
    """
    engine = engine or Engine(recipe.device, recipe.precision)
    length = RunLength(recipe.schedule, recipe.batch)
    with open_run_folder(recipe, existing) as run_dir:
        saved = latest_checkpoint(run_dir)
        on_event(events.Preparing("preparing the data"))
        inputs = prepare_inputs(
            recipe,
            saved_tokenizer=saved.folder if saved else None,
            progress=lambda documents, size: on_event(
                events.Preparing(f"tokenising: {documents:,} documents, {size / 1e6:,.1f} MB so far")
            ),
        )
        run = _Run(recipe, engine, run_dir, inputs, length, on_event)
        if saved is not None:
            run.restore(saved)
        with Interrupts() as interrupts:
            return run.to_the_end(interrupts)


class _Run:
    """A model in training, with everything that changes from step to step."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        run_dir: Path,
        inputs: Inputs,
        length: RunLength,
        on_event: events.Listener,
    ) -> None:
        self.recipe, self.engine, self.run_dir, self.inputs = recipe, engine, run_dir, inputs
        self.length, self.on_event = length, on_event
        torch.manual_seed(recipe.seed)
        self.model = GSAForCausalLM(model_config(recipe, inputs.vocab_size, inputs.tokenizer))
        self.model.to(engine.device).train()  # type: ignore[arg-type]
        if recipe.gradient_checkpointing:
            _enable_gradient_checkpointing(self.model)
        self.parameters = list(self.model.parameters())
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.flops = training_flops(self.model, recipe.batch.length)
        self.step = 0
        self.seconds = 0.0
        self.checkpoint: Path | None = None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts everything back as it was when the checkpoint was written."""
        load_model(self.model, checkpoint.folder / "model.safetensors", device=str(self.engine.device))
        load_optimizer_tensors(self.optimizer, self.model, checkpoint.tensors)
        self.inputs.batches.load_state_dict(checkpoint.state["data"])
        random = {n.removeprefix("random/"): t for n, t in checkpoint.tensors.items() if n.startswith("random/")}
        self.engine.set_random_state(random)
        self.length.total_steps = checkpoint.state["total_steps"]
        self.step, self.seconds = checkpoint.step, checkpoint.state["seconds"]
        self.checkpoint = checkpoint.folder

    def to_the_end(self, interrupts: Interrupts) -> TrainResult:
        """Trains until the run is over or a signal comes."""
        recipe = self.recipe
        self._check_space()
        resume_step = None if self.checkpoint is None else self.step
        with self._writing_metrics():
            self.metrics = MetricsWriter(self.run_dir, resume_step=resume_step, tensorboard=recipe.logging.tensorboard)
        count = sum(p.numel() for p in self.parameters)
        self.on_event(events.Started(self.run_dir, self.step, count, recipe.batch.tokens, self.engine.describe()))
        try:
            if self.step == 0:
                self._evaluate()
            self._loop(interrupts)
        finally:
            self.metrics.close()
        signal = None if self.length.is_over(self.step) else interrupts.received
        self.on_event(events.Ended(self.step, signal))
        assert self.checkpoint is not None
        records = read_metrics(self.metrics.path)
        return TrainResult(
            run_dir=self.run_dir,
            checkpoint=self.checkpoint,
            step=self.step,
            metrics=[r for r in records if r["kind"] == "eval"][-1],
            picture=plot_loss(self.metrics.path),
            signal=signal,
        )

    def _loop(self, interrupts: Interrupts) -> None:
        recipe = self.recipe
        first, before, start = self.step, self.seconds, time.monotonic()
        while not self.length.is_over(self.step):
            record = self._take_step()
            self.seconds = before + time.monotonic() - start
            self.length.update(self.step, self.seconds)
            over = self.length.is_over(self.step)
            if self.step % recipe.logging.every == 0 or over:
                self._write("train", record)
            each = (self.seconds - before) / (self.step - first)
            self.on_event(
                events.Stepped(
                    record | {"step": self.step},
                    self.length.total_steps,
                    self.length.fraction(self.step, self.seconds),
                    self.length.seconds_left(self.step, self.seconds, each),
                )
            )
            if self.step % recipe.evaluation.every == 0 or over:
                self._evaluate()
            if self.step % recipe.checkpoints.every == 0 or over or interrupts.received:
                self._save()
            if interrupts.received:
                return

    def _take_step(self) -> dict[str, Any]:
        """One step of the optimiser. Returns its figures for metrics.jsonl."""
        recipe, engine, start = self.recipe, self.engine, time.monotonic()
        index = self.inputs.batches.state_dict()["position"]
        batches = [next(self.inputs.batches) for _ in range(recipe.batch.accumulation)]
        scored = sum(int((b.targets != NOT_SCORED).sum()) for b in batches)
        losses = []
        for i, batch in enumerate(batches):
            try:
                losses.append(self._accumulate(batch, scored))
            except UsageError as error:  # on a CPU the operator looks at its inputs itself, and refuses NaN
                self._stop(str(error), index + i, batch)
        norm = engine.clip(self.parameters, recipe.optimizer.clip)
        # Reading them waits for the device, once a step; in exchange a bad gradient never reaches the weights.
        *parts, gradient_norm = torch.stack([*losses, norm.to(losses[0])]).tolist()
        loss = math.fsum(parts)
        if not math.isfinite(loss) or not math.isfinite(gradient_norm):
            worst = next((i for i, part in enumerate(parts) if not math.isfinite(part)), 0)
            self._stop(f"loss {loss}, gradient norm {gradient_norm}", index + worst, batches[worst])
        self.step += 1
        settings = recipe.optimizer
        rate = learning_rate(
            self.step,
            peak=settings.lr,
            floor=settings.min_lr,
            warmup_steps=self.length.warmup_steps,
            total_steps=self.length.total_steps,
        )
        set_learning_rate(self.optimizer, rate)
        engine.optimizer_step(self.optimizer)
        record: dict[str, Any] = {"loss": loss}
        if self.inputs.bytes_per_token:
            record["bits_per_byte"] = loss / math.log(2) / self.inputs.bytes_per_token
        speed = recipe.batch.tokens / (time.monotonic() - start)
        record |= {"lr": rate, "grad_norm": gradient_norm, "tokens_per_second": speed}
        record["flops_per_second"] = speed * self.flops
        if (peak := engine.peak_flops()) is not None:
            record["mfu"] = speed * self.flops / peak
        return record | {"memory_bytes": engine.peak_memory()}

    def _accumulate(self, batch: Batch, scored: int) -> torch.Tensor:
        """Adds the gradient of one batch to that of the step; returns its part of the step's loss."""
        engine, model = self.engine, self.model
        batch = batch.to(engine.device)
        with engine.autocast():
            hidden = model.model(batch.input_ids, cu_seqlens=batch.cu_seqlens).last_hidden_state
            loss = next_token_loss(hidden, model.lm_head.weight, batch.targets, scored=scored)
        engine.backward(loss)
        return loss.detach()

    def _evaluate(self) -> None:
        try:
            record = self.inputs.held_out.score(self.model, self.engine)
            with self.engine.autocast():
                record |= slot_usage(self.model, self.inputs.held_out.sample(_TOKENS_LOOKED_AT))
            bad = [n for n, x in record.items() if not isinstance(x, dict) and not math.isfinite(x)]
        except UsageError as error:
            bad = [str(error)]
        if bad:
            self._stop(f"the held-out score after step {self.step} is not finite ({', '.join(bad)})")
        self.on_event(events.Evaluated(self._write("eval", record)))

    def _save(self) -> None:
        with self._writing_metrics():
            self.metrics.sync()
        random = {f"random/{name}": state for name, state in self.engine.random_state().items()}
        self.checkpoint = save_checkpoint(
            self.run_dir,
            self.step,
            write_model=self._write_model,
            tensors=optimizer_tensors(self.optimizer, self.model) | random,
            state={
                "seconds": self.seconds,
                "total_steps": self.length.total_steps,
                "data": self.inputs.batches.state_dict(),
            },
            keep=self.recipe.checkpoints.keep,
        )
        self.on_event(events.Saved(self.checkpoint))

    def _write_model(self, folder: Path) -> None:
        with _without_bars():
            self.model.save_pretrained(folder, max_shard_size="1TB")  # one file, which restore() reads
        if self.inputs.tokenizer is not None:
            self.inputs.tokenizer.save_pretrained(folder)

    def _write(self, kind: str, figures: dict[str, Any]) -> dict[str, Any]:
        record = {
            "kind": kind,
            "step": self.step,
            "tokens": self.step * self.recipe.batch.tokens,
            "seconds": round(self.seconds, 3),
            **figures,
        }
        with self._writing_metrics():
            self.metrics.write(record)
        return record

    def _writing_metrics(self) -> AbstractContextManager:
        return disk_errors(f"The metrics in {self.run_dir} could not be written", self.run_dir)

    def _check_space(self) -> None:
        # fp32 weights and two moments each, for the checkpoints that are kept and the one being written.
        one = 12 * sum(p.numel() for p in self.parameters)
        present = self.recipe.checkpoints.keep if self.checkpoint else 0
        check_space(self.run_dir, one * (self.recipe.checkpoints.keep + 1 - present))

    def _stop(self, what: str, index: int = -1, batch: Batch | None = None) -> NoReturn:
        where = ""
        if batch is not None:
            where = f" It was batch {index} of the stream of seed {self.recipe.seed}, {self.inputs.describe(batch)}."
        safe = f"{self.checkpoint} is intact." if self.checkpoint else "No checkpoint had been written yet."
        raise TrainingStopped(
            f"Training stopped at step {self.step + 1}: {what}. Expected finite numbers.{where} {safe} "
            "Look at that text, or start a new run (output_dir) with a lower optimizer.lr, a longer warm-up or "
            "precision=fp32.",
            step=self.step + 1,
            checkpoint=self.checkpoint,
        )


def _enable_gradient_checkpointing(model: GSAForCausalLM) -> None:
    # transformers is renaming it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers shows a bar for every file it writes, in the middle of ours."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()
