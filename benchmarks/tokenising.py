"""How fast text becomes tokens, and what they take of the disk: `python -m benchmarks.tokenising SOURCE`.

    python -m benchmarks.tokenising train.jsonl.xz --output benchmarks/results/tokenising.json

Prepares documents as a run does, with a process on every core, into a new folder. The time counts from the source's
first byte to the whole store, with unpacking and checksums. (With fewer processes the tokenizer's threads would take
the other cores.)
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flash_gsa.benchmarking.about import about, write
from flash_gsa.data import load_tokenizer, prepare_tokens
from flash_gsa.data.tokenizing import usable_cores
from flash_gsa.errors import UsageError


def measure(source: str, tokenizer: str, max_bytes: int, processes: int) -> dict[str, Any]:
    """Seconds, text and store of one preparation."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store = prepare_tokens(
            source, load_tokenizer(tokenizer), cache_dir=folder, max_bytes=max_bytes, processes=processes
        )
        seconds = time.perf_counter() - start
        return {
            "processes": processes,
            "seconds": seconds,
            "documents": store.num_documents,
            "text_bytes": sum(int(shard.num_bytes[:].sum()) for shard in store.shards),
            "tokens": store.num_tokens,
            "store_bytes": sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()),
        }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenising", description=__doc__.partition(":")[0])
    parser.add_argument("source", help="as in a recipe: a file, a folder, hf:NAME@SPLIT")
    parser.add_argument("--tokenizer", default="mistral")
    parser.add_argument("--max-bytes", type=int, default=100_000_000, help="of text")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    options = f"--tokenizer {given.tokenizer} --max-bytes {given.max_bytes}"
    command = f"python -m benchmarks.tokenising {Path(given.source).name} {options}"
    result = {"about": about(command, "cpu"), "tokenizer": given.tokenizer}
    result |= measure(given.source, given.tokenizer, given.max_bytes, usable_cores())
    print(f"{result['processes']} processes: {result['text_bytes'] / result['seconds'] / 1e6:.1f} MB/s")
    if given.output is not None:
        write(result, given.output)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"benchmarks.tokenising: {error}")
