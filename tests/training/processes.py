"""One of several processes that train together: `torchrun … -m tests.training.processes RECIPE RUN…`.

Each RUN is a JSON object: {"overrides": […], "after": [folder, step], "killed": step, "pass": tokens}. With "after",
the run goes on from that checkpoint of another run, whose recipe it takes over; with "killed", the first process is
killed at that step, as soon as there is a checkpoint; with "pass", held-out documents are scored so many tokens at a
time. One run follows the other in the same processes, because starting them costs more than a run. What is refused
leaves its message in DIR/refused-RANK.txt.

Other ways to die: {"random": [rank, steps, seconds]} kills a process so long after it has begun so many steps, see
`killed_from_outside`; {"writing": [rank, step]} while that step's checkpoint is written, see `killed_writing`.

`python -m tests.training.processes RECIPE LAUNCH…` starts two such processes for each LAUNCH, a JSON list of RUNs, one
launch after the other. They are forks, so that nothing is imported anew; else it does as torchrun does. The folder of
launch N's last RUN is copied to DIR-left-N. The last line printed is a list of exit codes of each launch.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import flash_gsa.training.trainer as trainer
from flash_gsa.errors import UsageError
from flash_gsa.training import checkpoint, held_out
from flash_gsa.training.events import Event, Stepped
from flash_gsa.training.feed import Feed
from flash_gsa.training.recipe_file import load_recipe

TOKENS_A_PASS = held_out._TOKENS_A_PASS
SHARDS = checkpoint._write_shard, checkpoint._others_shards, checkpoint._write_json


def main(file: str, *runs: str) -> None:
    torch.set_num_threads(1)
    trainer.write_report = lambda run_dir: run_dir / "report.html"  # its pictures take longer than these runs
    # Which the runs share.
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    for run in map(json.loads, runs):
        recipe = load_recipe(file, run["overrides"])
        held_out._TOKENS_A_PASS = run.get("pass", TOKENS_A_PASS)
        folder = Path(recipe.output_dir)
        if "after" in run and dist.get_rank() == 0:
            go_on_from(Path(run["after"][0]), run["after"][1], folder)
        if "random" in run:
            killed_from_outside(*run["random"])
        if "writing" in run:
            killed_writing(*run["writing"])
        dist.barrier()
        try:
            trainer.train(recipe, **{"on_event": killed_at(run["killed"], folder)} if "killed" in run else {})
        except UsageError as error:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"refused-{dist.get_rank()}.txt").write_text(str(error))
    dist.destroy_process_group()


def killed_at(step: int, folder: Path):
    """A listener that ends its process, the first, at a step, after the first checkpoint has come to be."""

    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.record["step"] == step:
            end = time.monotonic() + 60
            while not list(folder.glob("checkpoints/step-*")) and time.monotonic() < end:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    return listen


def killed_from_outside(rank: int, steps: int, seconds: float) -> None:
    """Lets this process, if it is that one, be killed whatever it does then; the disk is slow, so it often writes."""
    flush = checkpoint._flush

    def flush_slowly(path: Path) -> None:
        time.sleep(0.02)
        flush(path)

    class LastFeed(Feed):
        taken = 0

        def take(self):
            self.taken += 1
            if self.taken == steps:
                subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -9 {os.getpid()}"])
            if self.taken == steps + 3:
                time.sleep(60)  # on a busy machine a kill may come late, but never after the end
            return super().take()

    checkpoint._flush = flush_slowly
    if dist.get_rank() == rank:
        trainer.Feed = LastFeed


def killed_writing(rank: int, step: int) -> None:
    """Process 0 dies when it first waits for another's shard; another one when its own is on the disk, but not yet the
    file that says so."""
    mine, (write_shard, others_shards, write_json) = dist.get_rank(), SHARDS
    folder = f".writing-step-{step:08d}"

    def die(*_) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_shard_late(writing: Path, *more) -> None:
        if writing.name == folder:
            time.sleep(60)
        write_shard(writing, *more)

    def die_waiting(writing: Path, *more):
        if writing.name == folder:
            checkpoint.time = SimpleNamespace(sleep=die, monotonic=time.monotonic)
        return others_shards(writing, *more)

    def die_before_json(path: Path, value) -> None:
        if folder in path.parts and path.suffix == ".unfinished":
            die()
        write_json(path, value)

    if rank == 0 and mine == 0:
        checkpoint._others_shards = die_waiting
    elif rank == 0:
        checkpoint._write_shard = write_shard_late
    elif rank == mine:
        checkpoint._write_json = die_before_json


def launch_each(file: str, *launches: str) -> None:
    codes = []
    for number, runs in enumerate(map(json.loads, launches)):
        # As torchrun's, it outlives the processes, whichever is killed.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        codes.append(launch(file, *map(json.dumps, runs)))
        folder = Path(load_recipe(file, runs[-1]["overrides"]).output_dir)
        shutil.copytree(folder, f"{folder}-left-{number}")
    print(json.dumps(codes))


def launch(*arguments: str, processes: int = 2) -> list[int]:
    """Exit codes, -9 for SIGKILL. When one process has failed, the others get SIGTERM until they end."""
    running, codes = {}, {}
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            for name, value in (("RANK", rank), ("WORLD_SIZE", processes)):
                os.environ[name] = os.environ["LOCAL_" + name] = str(value)
            try:
                main(*arguments)
                os._exit(0)
            except BaseException as error:
                print(f"process {rank}: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
        running[child] = rank
    signalled = 0.0
    while running:
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) and time.monotonic() - signalled > 1:
            signalled = time.monotonic()
            for child in running:
                os.kill(child, signal.SIGTERM)
        time.sleep(0.01)
    return [codes[rank] for rank in range(processes)]


def go_on_from(other: Path, step: int, folder: Path) -> None:
    """A copy of another run as it was when the checkpoint of `step` had just been written."""
    shutil.copytree(other, folder, ignore=shutil.ignore_patterns("refused*", ".lock"))
    for present in (folder / "checkpoints").iterdir():
        if present.name != f"step-{step:08d}":
            shutil.rmtree(present)


if __name__ == "__main__":
    (main if "RANK" in os.environ else launch_each)(*sys.argv[1:])
