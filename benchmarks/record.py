"""Keep the result of a finished run: `python -m benchmarks.record NAME RUN_FOLDER [options]`.

Writes benchmarks/results/NAME.json: device, versions, commit, date and command, the recipe as it ran, its last
evaluation, and what the options add; and puts the run's pictures beside the docs as docs/results/NAME-*.png, with
--report its report page, too. Then `python -m benchmarks.render` brings the documents up to date.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from flash_gsa.training.metrics import read_metrics
from flash_gsa.training.starts import read_starts

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "results"


def record(run: Path, command: str | None = None) -> dict[str, Any]:
    """What a run's folder holds, without the paths of the machine it ran on; `command` if it was not `train`."""
    lines = read_metrics(run / "metrics.jsonl")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe.pop("output_dir", None)
    for key in ("source", "valid_source", "cache_dir"):
        recipe["data"].pop(key, None)
    steps = [line for line in lines if line["kind"] == "train"]
    *_, start = read_starts(run)
    return {
        "about": {key: value for key, value in start.items() if key != "step"}
        | ({"command": command} if command else {}),
        "recipe": recipe,
        "last_evaluation": [line for line in lines if line["kind"] == "eval"][-1],
        "largest_memory_bytes": max(line["memory_bytes"] for line in steps),
        "seconds": steps[-1]["seconds"],
    }


def main(arguments: list[str] | None = None) -> None:
    """Read the run, write the result file, copy the pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description="keep the result of a run")
    parser.add_argument("name", help="of the result")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--command", help="what was typed to make it, where that was not the training itself")
    parser.add_argument("--report", action="store_true", help="keep the report page")
    parser.add_argument("--test", type=Path, help="output of `flash-gsa eval --json` on test documents")
    options = parser.parse_args(arguments)

    result = record(options.run, options.command)
    if options.test:
        result["test"] = json.loads(options.test.read_text(encoding="utf-8"))
    if (shown := options.run / "result.json").exists():
        demo = json.loads(shown.read_text(encoding="utf-8"))
        result["demo"] = {key: value for key, value in demo.items() if key != "paths"}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (RESULTS / f"{options.name}.json").write_text(text + "\n", encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for picture in ("loss", "slots"):
        if (options.run / f"{picture}.png").exists():
            shutil.copy(options.run / f"{picture}.png", PICTURES / f"{options.name}-{picture}.png")
    if options.report:
        shutil.copy(options.run / "report.html", PICTURES / f"{options.name}-report.html")


if __name__ == "__main__":
    main()
