"""The training loop.

    for each step:  draw this process's micro-batches → Σ loss over their scored tokens → gradients → clip
                    → check that all is finite → AdamW with this step's learning rate
                    → metrics, now and then a held-out score and a checkpoint

A run can be stopped at any moment and continued by the same call: what decides the following steps (weights,
optimiser moments, position in the data, random states, number of steps, time spent) is in each checkpoint.
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from flash_gsa.data import NOT_SCORED, Batch
from flash_gsa.data.store import DamagedShard
from flash_gsa.errors import UsageError
from flash_gsa.inspection.usage import slot_usage
from flash_gsa.models import GSAForCausalLM
from flash_gsa.models.flops import training_flops
from flash_gsa.models.loss import next_token_loss
from flash_gsa.training import events
from flash_gsa.training.checkpoint import (
    BackgroundWriter,
    Checkpoint,
    begin_checkpoint,
    check_space,
    checkpoint_folder,
    disk_errors,
    latest_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from flash_gsa.training.dry_run import check_fits
from flash_gsa.training.engine import Engine, Outcome, Piece
from flash_gsa.training.engines import open_engine
from flash_gsa.training.errors import TrainingStopped
from flash_gsa.training.feed import Feed
from flash_gsa.training.inputs import Inputs, prepare_inputs
from flash_gsa.training.interrupts import Interrupts
from flash_gsa.training.metrics import METRICS_FILE, MetricsWriter, read_metrics
from flash_gsa.training.model import model_config
from flash_gsa.training.optimizer import learning_rate
from flash_gsa.training.plots import plot_loss
from flash_gsa.training.recipe import Recipe
from flash_gsa.training.report import REPORT_FILE, write_report
from flash_gsa.training.run_folder import Existing, open_run_folder, run_dir_of
from flash_gsa.training.schedule import RunLength
from flash_gsa.training.spikes import SpikeDetector
from flash_gsa.training.starts import record_start
from flash_gsa.training.trackers import check_trackers, start_trackers

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
        report: report.html.
        signal: "SIGINT" or "SIGTERM" if the run was stopped before its end; the same call goes on.
    """

    run_dir: Path
    checkpoint: Path
    step: int
    metrics: dict[str, Any]
    picture: Path
    report: Path
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
        on_event: told what happens, see `events`; `ProgressDisplay` shows it in a terminal. Of several processes the
            main one tells; of tokenising the one that does it.
        engine: where it runs; by default what the recipe says.

    Raises:
        UsageError: before anything is trained: the recipe cannot run here, its folder or data cannot be used, a
            checkpoint is damaged; later: the disk is full.
        TrainingStopped: the loss or the gradient is no longer finite.
    """
    check_trackers(recipe.logging.trackers)
    engine = engine or open_engine(recipe)
    micro_rows, count = recipe.batch.micro_batches(engine.ranks, engine.context)
    if (memory := engine.device_memory()) is not None:
        check_fits(recipe, engine.ranks, memory)
    length = RunLength(recipe.schedule, recipe.batch)
    tell = on_event if engine.is_main else lambda event: None
    with ExitStack() as stack:

        def open_folder() -> Path | None:
            found = latest_checkpoint(stack.enter_context(open_run_folder(recipe, existing)))
            return None if found is None else found.folder

        # The main process verifies a checkpoint, and all open what it found.
        run_dir, folder = run_dir_of(recipe), engine.told_by_main(open_folder)
        saved = None if folder is None else open_checkpoint(folder)
        tell(events.Preparing("preparing the data"))
        inputs = prepare_inputs(
            recipe,
            saved_tokenizer=saved.folder if saved else None,
            # Whichever process tokenises or verifies tells, while the others wait for it.
            progress=lambda documents, size: on_event(
                events.Preparing(f"tokenising: {documents:,} documents, {size / 1e6:,.1f} MB so far")
            ),
            verifying=lambda size, of: on_event(
                events.Preparing(f"comparing the checksums of tokens: {size / 1e9:,.1f} of {of / 1e9:,.1f} GB")
            ),
        )
        run = _Run(recipe, engine, run_dir, inputs, length, tell)
        if saved is not None:
            run.restore(saved)
        groups, group = engine.ranks // engine.context, engine.rank // engine.context
        first = [(i * groups + group) * micro_rows for i in range(count)]
        run.feed = Feed(inputs.batches, [slice(row, row + micro_rows) for row in first])
        try:
            with Interrupts() as interrupts:
                result = run.to_the_end(interrupts)
        finally:
            run.feed.close()
        engine.close()
        return result


def step_loss(model: GSAForCausalLM, batch: Batch, scored: float | torch.Tensor) -> torch.Tensor:
    """Σ nll over the batch, divided by `scored`: the batch's part of a step's mean over its scored tokens."""
    hidden = model.model(batch.input_ids, cu_seqlens=batch.cu_seqlens).last_hidden_state
    return next_token_loss(hidden, model.lm_head.weight, batch.targets, scored=1) / scored


class _Run:
    """A model in training, with everything that changes from step to step."""

    feed: Feed

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
        model = GSAForCausalLM(model_config(recipe, inputs.vocab_size, inputs.tokenizer))
        model.config.architectures = [type(model).__name__]
        self.config, self.generation_config = model.config, model.generation_config
        self.size = sum(p.numel() for p in model.parameters())
        self.flops = training_flops(model, recipe.batch.length)
        engine.prepare(model, recipe.optimizer)
        self.writer, self.spikes = BackgroundWriter(), SpikeDetector()
        self.step = 0
        self.seconds = 0.0
        self.checkpoint: Path | None = None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts everything back as it was when the checkpoint was written."""
        self.engine.load(checkpoint.read)
        self.inputs.batches.load_state_dict(checkpoint.state["data"])
        random = [name for name in checkpoint.names() if name.startswith("random/")]
        self.engine.set_random_state({name.removeprefix("random/"): checkpoint.read(name) for name in random})
        self.length.total_steps = checkpoint.state["total_steps"]
        self.spikes.load_state_dict(checkpoint.state["spikes"])
        self.step, self.seconds = checkpoint.step, checkpoint.state["seconds"]
        self.checkpoint = checkpoint.folder

    def to_the_end(self, interrupts: Interrupts) -> TrainResult:
        """Trains until the run is over or a signal comes."""
        recipe, engine = self.recipe, self.engine
        self.metrics: MetricsWriter | None = None
        engine.told_by_main(self._open_records)
        data = self.inputs.told(self.length.total_steps)
        self.on_event(events.Started(self.run_dir, self.step, self.size, recipe.batch.tokens, engine.describe(), data))
        try:
            if self.step == 0:
                self._evaluate()
            stopped = self._loop(interrupts)
            self._tell_saved(self.writer.wait())
        except BaseException as error:
            # What to tell is the first error. By this, what a full disk has not taken is written once more,
            with suppress(Exception):
                self._close_metrics()
            # and a checkpoint is finished, unless the user does not wait.
            if isinstance(error, Exception):
                with suppress(Exception):
                    self._tell_saved(self.writer.wait())
            raise
        self._close_metrics()
        engine.barrier()
        signal = (interrupts.received or "SIGTERM") if stopped and not self.length.is_over(self.step) else None
        self.on_event(events.Ended(self.step, signal))
        records = read_metrics(self.run_dir / METRICS_FILE)
        picture, report = self.run_dir / "loss.png", self.run_dir / REPORT_FILE
        if engine.is_main:
            picture, report = plot_loss(self.run_dir), write_report(self.run_dir)
        engine.barrier()
        return TrainResult(
            run_dir=self.run_dir,
            checkpoint=checkpoint_folder(self.run_dir, self.step),
            step=self.step,
            metrics=[r for r in records if r["kind"] == "eval"][-1],
            picture=picture,
            report=report,
            signal=signal,
        )

    def _loop(self, interrupts: Interrupts) -> bool:
        """Takes steps; whether it was told to stop."""
        recipe = self.recipe
        first, before, start = self.step, self.seconds, time.monotonic()
        while not self.length.is_over(self.step):
            record, outcome = self._take_step(before + time.monotonic() - start, interrupts.received is not None)
            self.seconds = outcome.seconds
            self.length.update(self.step, self.seconds)
            over = self.length.is_over(self.step)
            if self.step % recipe.logging.every == 0 or over:
                self._write("train", record)
            if spike := self.spikes.see(outcome.loss):
                told = self._write("spike", {**asdict(spike), "batch": self.inputs.batches.position - 1})
                self.on_event(events.Spiked(told))
            each = (self.seconds - before) / (self.step - first)
            self.on_event(
                events.Stepped(
                    record | {"step": self.step},
                    self.length.total_steps,
                    self.length.fraction(self.step, self.seconds),
                    self.length.seconds_left(self.step, self.seconds, each),
                )
            )
            self._tell_saved(self.writer.poll())
            if self.step % recipe.evaluation.every == 0 or over:
                self._evaluate()
            # Several processes hear of a signal together, with the next step.
            stop = outcome.stop or (self.engine.ranks == 1 and interrupts.received is not None)
            if self.step % recipe.checkpoints.every == 0 or over or stop:
                self._save()
            if stop:
                return True
        return False

    def _take_step(self, seconds: float, stop: bool) -> tuple[dict[str, Any], Outcome]:
        """One step of the optimiser. Returns its figures for metrics.jsonl."""
        recipe, engine, start = self.recipe, self.engine, time.monotonic()
        index = self.inputs.batches.position
        batches = self.feed.take()
        scored = engine.total(sum(int((b.targets != NOT_SCORED).sum()) for b in batches))
        losses = []
        for i, batch in enumerate(batches):
            on_device = engine.stretch(batch).to(engine.device)
            try:
                losses.append(engine.accumulate(step_loss, on_device, scored, last=i == len(batches) - 1))
            except UsageError as error:  # on a CPU the operator looks at its inputs itself, and refuses NaN
                self._stop(str(error), index, batch)
        settings = recipe.optimizer
        rate = learning_rate(
            self.step + 1,
            peak=settings.lr,
            floor=settings.min_lr,
            warmup_steps=self.length.warmup_steps,
            total_steps=self.length.total_steps,
        )
        outcome = engine.update(losses, rate, settings.clip, seconds=seconds, stop=stop)
        if not outcome.finite:
            bad = next((i for i, part in enumerate(outcome.parts) if not math.isfinite(part)), None)
            # Of several processes' batches, the first that is to blame; of none, any.
            found = engine.gather((bad is None, self.inputs.describe(batches[bad or 0])))
            what = f"loss {outcome.loss}, gradient norm {outcome.norm}"
            self._stop(what, index, min(found)[1], everywhere=True)
        self.step += 1
        record: dict[str, Any] = {"loss": outcome.loss}
        if self.inputs.bytes_per_token:
            record["bits_per_byte"] = outcome.loss / math.log(2) / self.inputs.bytes_per_token
        speed = recipe.batch.tokens / (time.monotonic() - start)
        record |= {"lr": rate, "grad_norm": outcome.norm, "tokens_per_second": speed}
        record["flops_per_second"] = speed * self.flops
        if (peak := engine.peak_flops()) is not None:
            record["mfu"] = speed * self.flops / (peak * engine.ranks)
        record |= {"data_seconds": self.feed.seconds, "devices": engine.ranks, "memory_bytes": engine.peak_memory()}
        return record, outcome

    def _open_records(self) -> None:
        self._check_space()
        resume_step = None if self.checkpoint is None else self.step
        with self._writing_metrics():
            path = self.run_dir / METRICS_FILE
            shown = read_metrics(path) if resume_step is not None and path.exists() else []
            trackers = start_trackers(self.recipe, self.run_dir, resume_step=resume_step, shown=shown)
            self.metrics = MetricsWriter(self.run_dir, resume_step=resume_step, trackers=trackers)
        if not self.length.is_over(self.step):
            device, name = str(self.engine.device), self.engine.describe()
            record_start(self.run_dir, resume_step=resume_step, device=device, engine=name)

    def _evaluate(self) -> None:
        try:
            record = self.inputs.held_out.score(self.engine)
            record |= self.engine.score(slot_usage, self.inputs.held_out.sample(_TOKENS_LOOKED_AT))
            bad = [n for n, x in record.items() if not isinstance(x, dict) and not math.isfinite(x)]
        except DamagedShard:
            raise
        except UsageError as error:  # see `_take_step`
            bad = [str(error)]
        if bad:
            self._stop(f"the held-out score after step {self.step} is not finite ({', '.join(bad)})", everywhere=True)
        self.on_event(events.Evaluated(self._write("eval", record)))

    def _save(self) -> None:
        """Copies what a checkpoint holds to the CPU; a thread writes it while training goes on."""
        engine = self.engine
        self._tell_saved(self.writer.wait())
        if self.metrics is not None:
            with self._writing_metrics():
                self.metrics.sync()
        pieces = engine.pieces()
        if engine.is_main:
            pieces |= {f"random/{name}": Piece(state) for name, state in engine.random_state().items()}
            begin_checkpoint(self.run_dir, self.step)
        engine.barrier()
        if not (engine.sharded or engine.is_main):
            return
        save = partial(
            save_checkpoint,
            self.run_dir,
            self.step,
            write_model=self._write_model,
            pieces={name: replace(p, tensor=_copied(p.tensor)) for name, p in pieces.items()},
            state={
                "seconds": self.seconds,
                "total_steps": self.length.total_steps,
                "data": self.inputs.batches.state_dict(),
                "spikes": self.spikes.state_dict(),
            },
            keep=self.recipe.checkpoints.keep,
            keep_every=self.recipe.checkpoints.keep_every,
            sharded=engine.sharded,
            rank=engine.rank,
            ranks=engine.ranks,
            patience=self.recipe.engine.timeout,
        )
        self.writer.start(save)

    def _tell_saved(self, folder: Path | None) -> None:
        if folder is not None:
            self.checkpoint = folder
            self.on_event(events.Saved(folder))

    def _write_model(self, folder: Path) -> None:
        self.config.save_pretrained(folder)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)
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
        if self.metrics is not None:
            with self._writing_metrics():
                self.metrics.write(record)
        return record

    def _close_metrics(self) -> None:
        if self.metrics is not None:
            with self._writing_metrics():
                self.metrics.close()

    @contextmanager
    def _writing_metrics(self) -> Iterator[None]:
        with disk_errors(f"The metrics in {self.run_dir} could not be written", self.run_dir):
            try:
                yield
            except OSError:
                # What is told of it names the newest checkpoint, so the one being written is waited for.
                with suppress(Exception):
                    self._tell_saved(self.writer.wait())
                raise

    def _check_space(self) -> None:
        # fp32 weights and two moments each, for the checkpoints that are kept and the one being written.
        one, section = 12 * self.size, self.recipe.checkpoints
        present = section.keep if self.checkpoint else 0
        # A timed run does not know yet how many it will leave for good.
        end, apart = self.length.total_steps, section.keep_every
        for_good = 0 if apart is None or end is None else end // apart - self.step // apart
        check_space(self.run_dir, one * (section.keep + 1 - present + for_good))

    def _stop(self, what: str, index: int = -1, batch: Batch | str | None = None, everywhere: bool = False) -> NoReturn:
        self._tell_saved(self.writer.wait())
        where = ""
        if batch is not None:
            description = batch if isinstance(batch, str) else self.inputs.describe(batch)
            where = f" It was batch {index} of the stream of seed {self.recipe.seed}, {description}."
        safe = f"{self.checkpoint} is intact." if self.checkpoint else "No checkpoint had been written yet."
        raise TrainingStopped(
            f"Training stopped at step {self.step + 1}: {what}. Expected finite numbers.{where} {safe} "
            "Look at that text, or start a new run (output_dir) with a lower optimizer.lr, a longer warm-up or "
            "precision=fp32.",
            step=self.step + 1,
            checkpoint=self.checkpoint,
            everywhere=everywhere,
        )


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, and changed no more by the steps that follow."""
    return tensor.detach().to("cpu", copy=True).contiguous()
