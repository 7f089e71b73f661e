"""Bring the figures in the documents up to date: `python -m benchmarks.render`, or with --check only compare.

A document holds a block between `<!-- result: NAME -->` and `<!-- end -->`; what stands between is generated
from benchmarks/results/NAME.json by the function of that name below. No figure in the docs is typed by hand.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import bytes_table, decoding_table, step_table
from benchmarks.markdown import minutes, table, told
from benchmarks.operator_table import lengths, operator, summary
from benchmarks.recipe_heads import recipes_with_heads, with_head
from benchmarks.scaling import configurations
from benchmarks.training_table import training, training_summary
from flash_gsa.benchmarking.report import combined

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    *("README.md", "docs/results/README.md", "docs/kernels.md", "docs/parallel.md", "docs/training.md"),
    "docs/data.md",
)
BLOCK = re.compile(r"(<!-- result: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


FILES = {
    "op_gpu-summary": "op_gpu",
    "train_gpu-summary": "train_gpu",
    "train_gpu_power-summary": "train_gpu_power",
    "operator_memory": "operator_bytes",
    "between_products": "train_gpu",
    "step_bounds": "train_gpu",
    "step_energy": "train_gpu",
}
"""Blocks of the file of another block."""


def demo(result: dict[str, Any]) -> str:
    shown = result["demo"]
    bits = shown["bits_per_byte"]
    rows = [[f"byte n-grams, context of {k}", f"{bits[f'order_{k}']:.3f}"] for k in range(1, 6)]
    rows.append([f"**this model, {shown['parameters'] / 1e6:.2f} M parameters**", f"**{bits['model']:.3f}**"])
    rows.sort(key=lambda row: -float(row[1].strip("*")))
    rows.append(["xz -9e of the held-out text", f"{bits['xz']:.3f}"])
    seen = shown["training_bytes"] / 1e6
    return "\n\n".join(
        [
            table(["held-out text", "bits per byte"], rows),
            f"The model and the n-grams saw the same {seen:.2f} MB. Training took {minutes(shown['training_seconds'])} "
            f"({shown['steps']} steps, {shown['tokens']:,} tokens), what comes after it "
            f"{shown['seconds_after_training']:.0f} s, memory {result['largest_memory_bytes'] / 2**30:.1f} GiB.",
            told(result["about"]),
        ]
    )


def mqar_tiny(result: dict[str, Any]) -> str:
    abc = load("mqar_tiny_abc")
    rows = [
        [
            name,
            f"{run['last_evaluation']['accuracy']:.3f}",
            str(run["last_evaluation"]["step"]),
            minutes(run["seconds"]),
        ]
        for name, run in (("GSA", result), ("ABC (`model.gating=abc`)", abc))
    ]
    return "\n\n".join(
        [table(["", "held-out accuracy", "steps", "time"], rows), told(result["about"]), told(abc["about"])]
    )


def prose(result: dict[str, Any]) -> str:
    """A model of text by sources of test documents, and what its run took and did with its slots."""
    sources = {"all": result["test"]["total"], **dict(sorted(result["test"]["by_source"].items()))}
    rows = [
        [name, f"{s['bits_per_byte']:.3f}", f"{s['perplexity']:.1f}", f"{s['bytes']:,}", str(s["documents"])]
        for name, s in sources.items()
    ]
    last = result["last_evaluation"]
    return "\n\n".join(
        [
            table(["test documents of", "bits per byte", "perplexity per token", "bytes", "documents"], rows),
            f"Trained on {last['tokens'] / 1e6:.1f} M tokens in {minutes(result['seconds'])} ({last['step']} steps), "
            f"at most {result['largest_memory_bytes'] / 2**30:.1f} GiB of GPU memory. {_slots(last)}",
            told(result["about"]),
        ]
    )


def _slots(evaluation: dict[str, Any]) -> str:
    """What layers do with their slots, from the smallest to the largest of any layer."""
    parts = []
    for key, said in (("slot_entropy", "of the largest entropy they could have"), ("dead_slots", "are dead")):
        shares = evaluation.get(key, {}).values()
        if shares:
            parts.append(f"{min(shares):.0%} to {max(shares):.0%} {said}")
    return f"Slots, by layer: {', '.join(parts)}." if parts else ""


def kernel_steps(result: dict[str, Any]) -> str:
    # In the order of their launches; inputs_backward took the place of queries_backward and keys_backward.
    every = ["prepare", "states", "outputs", "values_backward", "queries_backward", "states_backward", "keys_backward"]
    every += ["inputs_backward", "across_blocks", "gates_backward"]
    names = [name for name in every if any(name in step["kernels"] for step in result["steps"])]
    rows = []
    for step in result["steps"]:
        kernels = step["kernels"]
        times = [f"{kernels[n]['microseconds']:.0f}" if n in kernels else "" for n in names]
        cut = f"{step['C']} by {step['BT']}" if step.get("BT", step["C"]) != step["C"] else str(step["C"])
        rows.append([f"`{step['commit']}`", cut, *times, f"{sum(k['microseconds'] for k in kernels.values()):.0f}"])
    said = {step["commit"]: step["what"] for step in result["steps"]}
    return "\n\n".join(
        [
            table(["commit", "C", *names, "sum"], rows),
            "\n".join(f"- `{commit}`: {what}." for commit, what in said.items()),
            f"Microseconds. {result['about']['command']}.",
            told(result["about"] | {"command": "see above"}),
        ]
    )


def kernel_counters(result: dict[str, Any]) -> str:
    rows = [
        [
            f"`{r['commit']}`",
            r["kernel"],
            f"{r['C']} by {r['BT']}",
            f"{r['microseconds']:.0f}",
            f"{r['dram_bytes'] / 1e6:.0f}",
            f"{r['dram_bytes_per_second'] / 1e12:.2f}",
            f"{r['l2_hit_percent']:.0f}",
        ]
        for r in result["rows"]
    ]
    heads = ["commit", "kernel", "C by BT", "µs", "MB from and to memory", "TB/s", "L2 hits, %"]
    said = {r["commit"] + r["what"]: f"- `{r['commit']}`, {r['C']} by {r['BT']}: {r['what']}." for r in result["rows"]}
    return "\n\n".join([table(heads, rows), "\n".join(said.values()), told(result["about"])])


def counters(result: dict[str, Any]) -> str:
    rows = []
    for shape in result["shapes"]:
        for k in shape["kernels"]:
            waits = sorted((name for name in k["stalls"] if name != "selected"), key=k["stalls"].get, reverse=True)
            told_waits = ", ".join(f"{name.replace('_', ' ')} {100 * k['stalls'][name]:.0f}" for name in waits[:3])
            rows.append(
                [
                    shape["shape"]["label"] if k is shape["kernels"][0] else "",
                    f"`{k['kernel']}`",
                    f"{1e6 * k['seconds']:.0f}",
                    f"{k['bytes_per_second'] * k['seconds'] / 1e6:.0f}",
                    f"{k['bytes_per_second'] / 1e12:.2f}",
                    f"{k['l2_hit_percent']:.0f}",
                    f"{k['issue_percent']:.0f}",
                    f"{k['tensor_percent']:.0f}",
                    f"{k['warps']:.0f}",
                    told_waits,
                ]
            )
    heads = ["", "kernel", "µs", "MB", "TB/s", "L2 hits, %", "issue, %", "tensor cores, %", "warps"]
    return "\n\n".join([table([*heads, "waits for, %"], rows), told(result["about"])])


def kernel_trials(result: dict[str, Any]) -> str:
    rows, told_of = [], []
    for trial in result["trials"]:
        for r in trial["rows"]:
            kernels = ", ".join(f"{name} {time}" for name, time in r["kernels_us"].items())
            times = ["" if r[name] is None else f"{r[name]:.0f}" for name in ("forward_us", "both_us")]
            rows.append([trial["name"] if r is trial["rows"][0] else "", r["variant"], *times, kernels])
        expected = " to ".join(dict.fromkeys(f"{time:.0f}" for time in trial["expected_both_us"]))
        told_of.append(f"- **{trial['name']}.** {trial['what']}. Expected: {expected} µs. Learnt: {trial['learnt']}.")
    heads = ["trial", "", "forward µs", "+ backward µs", "of it, µs"]
    return "\n\n".join([table(heads, rows), "\n".join(told_of), told(result["about"])])


def operator_on_a_gpu(result: dict[str, Any]) -> str:
    """The start of a process is another command's, and may not be measured yet."""
    if (RESULTS / "op_gpu_cold.json").exists():
        result = combined(result, load("op_gpu_cold") | {"shapes": []})
    return operator(result)


def shapes_alone(result: dict[str, Any]) -> str:
    """Of an earlier run, whose other parts have been measured again since."""
    return operator(result | {"layer": [], "decoding": []})


def step_splits(result: dict[str, Any]) -> str:
    return decoding_table.splits(result)


def step_instructions(result: dict[str, Any]) -> str:
    return decoding_table.instructions(result, load("op_gpu"), load("step_splits"))


def tile_registers(result: dict[str, Any]) -> str:
    """A line for each row of the tile table and GPU, a column for each kernel that takes tiles."""
    names = list(dict.fromkeys(k["kernel"] for r in result["rows"] for k in r["kernels"] if k["kernel"] in TILED))
    rows = []
    for r in result["rows"]:
        kernels = {k["kernel"]: k for k in r["kernels"]}
        cells = []
        for name in names:
            k = kernels.get(name)
            moved = f"{k['spills']:,} / {k['spills_under_strong_gates']:,}" if k else ""
            cells.append(f"{k['registers']}, {moved}, {k['shared_bytes'] / 1024:.0f} KiB" if k else "–")
        major, minor = r["architecture"]
        about_row = f"{r['workload']}, {r['precision']}, up to {r['slots']} slots"
        rows.append([f"{major}.{minor}", about_row, f"{r['C']} / {r['BT']}", "yes" if r["measured"] else "no", *cells])
    heads = ["compute capability", "shape", "C / BT", "tiles measured", *(f"`{name}`" for name in names)]
    return "\n\n".join([table(heads, rows), told(result["about"])])


TILED = (
    *("states_forward", "outputs", "values_backward", "states_backward"),
    *("inputs_backward, keys", "inputs_backward, values"),
)


def operator_bytes(result: dict[str, Any]) -> str:
    return bytes_table.moved(result, load("op_gpu"))


def step_bounds(result: dict[str, Any]) -> str:
    return step_table.step_bounds(result, load("train_gpu_profile"), load("op_gpu"))


def operator_memory(result: dict[str, Any]) -> str:
    return bytes_table.held(result, load("op_gpu"))


def drift(result: dict[str, Any]) -> str:
    rows = result["rows"]
    stops = list(dict.fromkeys(r["steps"] for r in rows))
    shown = [stop for stop in stops if stop >= 100]
    found = {(r["state"], r["span"], r["steps"]): r["output"] for r in rows}
    lines = [
        [f"{span:,}", name, *(f"{100 * found[name, span, stop]:.2f}" for stop in shown)]
        for span in dict.fromkeys(r["span"] for r in rows)
        for name in dict.fromkeys(r["state"] for r in rows)
    ]
    heads = ["slots remember, tokens", "state", *(f"error of o, %, after {stop:,} tokens" for stop in shown)]
    return "\n\n".join([table(heads, lines), told(result["about"])])


def _at_most_1000(x: float) -> str:
    """A ratio to what may be nearly nothing."""
    return f"{x:.2f}" if x <= 1000 else "> 1000"


def gpu_tests_on_four(result: dict[str, Any]) -> str:
    """Without errors, which the whole run's table has."""
    return gpu_tests(result | {"errors": []})


def gpu_tests(result: dict[str, Any]) -> str:
    counts, skipped = result["counts"], result["skipped"]
    why = "".join(f"; {count} skipped ({reason})" for reason, count in skipped.items())
    failed = f"{counts['failed']:,} failed, " if counts.get("failed") else ""
    outcome = f"{failed}{counts['passed']:,} passed{why} in {minutes(result['seconds'])}."
    parts = [outcome]
    if errors := result.get("errors"):
        heads = ["error, of plain PyTorch's", "", "compared", "median", "largest", "above 2", "largest, of allowed"]
        rows = [
            [
                *(f"{e['format']}" if e["format"] != before else "", f"`{e['result']}`", f"{e['compared']:,}"),
                *(f"{e['median']:.2f}", _at_most_1000(e["largest"]), f"{e['above_2']:,}"),
                f"{e['largest_of_allowed']:.2f}",
            ]
            for e, before in zip(errors, [None, *(e["format"] for e in errors)], strict=False)
        ]
        parts.append(table(heads, rows))
    return "\n\n".join([*parts, told(result["about"])])


def context_parallel(result: dict[str, Any]) -> str:
    ranks = result["ranks"]
    heads = ["tokens", f"{ranks} GPUs, ms", "one GPU, ms", "times faster", "one GPU with a stretch, ms"]
    heads.append("bytes a GPU, for each of its tokens")
    times = [
        [
            f"{r['T']:,}",
            f"{r['context_parallel_ms']:.2f}",
            f"{r['one_gpu_ms']:.2f}",
            f"{r['one_gpu_ms'] / r['context_parallel_ms']:.2f}",
            f"{r['one_stretch_ms']:.2f}",
            f"{r['peak_bytes'] * ranks / r['T']:,.0f}",
        ]
        for r in result["times"]
    ]
    values = [
        [
            f"{'packed, ' if r['lengths'] else ''}gates {r['gates']}" if who == "context_parallel" else "",
            f"{ranks} GPUs" if who == "context_parallel" else "one GPU",
            *(f"{100 * error:.2f}" for error in r[who].values()),
        ]
        for r in result["values"]
        for who in ("context_parallel", "one_gpu")
    ]
    tokens = " and ".join(dict.fromkeys(f"{r['T']:,}" for r in result["values"]))
    names = list(result["values"][0]["one_gpu"])
    return "\n\n".join(
        [
            "Forward and backward:",
            table(heads, times),
            f"Errors against float64, %, of {tokens} tokens:",
            table(["", "", *names], values),
            told(result["about"]),
        ]
    )


def scaling(result: dict[str, Any]) -> str:
    """Tokens a second of each configuration, and as many times those of one process that computes as often a step."""
    ones = {run["micro_batches"]: run for run in result["runs"] if run["processes"] == 1 and run.get("row") is None}
    rows = []
    for run in result["runs"]:
        first = [run["name"], str(run["processes"]), str(run["micro_batches"])]
        if run.get("problem"):
            rows.append([*first, run["problem"].partition(". ")[0], "", "", "", ""])
            continue
        rows.append(
            [
                *first,
                f"{run['tokens_per_second']:,.0f}",
                f"{run['tokens_per_second'] / ones[run['micro_batches']]['tokens_per_second']:.2f}",
                "" if run["mfu"] is None else f"{run['mfu']:.0%}",
                f"{run['peak_bytes'] / 2**30:.1f}",
                f"{run['data_share']:.2%}",
            ]
        )
    ran = {(run["name"], run["micro_batches"]) for run in result["runs"]}
    asked = result.get("asked", 2)
    rows += [
        [name, str(1 if several == 1 else asked), str(count), "not run", "", "", "", ""]
        for name, several, count, *_ in configurations(asked)
        if (name, count) not in ran
    ]
    heads = ["engine", "GPUs", "micro-batches", "tokens/s", "times one", "MFU", "GiB a GPU", "waiting for data"]
    title = f"`{result['recipe']}`, {ones[1]['tokens_a_step']:,} tokens a micro-batch and GPU:"
    rows_alike = [run for run in result["runs"] if (run.get("row") or 0) > 1 and "first_loss" in run]
    firsts = [f"{r['name']}: {r['first_loss']:.4f} and {r['first_gradient_norm']:.4f}." for r in rows_alike]
    told_of = ["Loss and gradient norm of the first step. " + " ".join(firsts)] if firsts else []
    return "\n\n".join([title, table(heads, rows), *told_of, told(result["about"])])


def memory(result: dict[str, Any]) -> str:
    rows = []
    for r in result["rows"]:
        estimated, measured = r["estimated_bytes"], r.get("measured_bytes")
        rows.append(
            [
                " ".join([r["recipe"], *(f"`{override}`" for override in r["overrides"])]),
                f"{r['tokens']:,}",
                f"{estimated / 2**30:.1f}",
                r["problem"] or f"{measured / 2**30:.1f}",
                "" if measured is None else f"{round(100 * (estimated / measured - 1)):+d} %",
                f"{r['measured_outside_bytes'] / 2**30:.1f}",
            ]
        )
    heads = ["recipe", "tokens at once", "GiB estimated", "GiB measured", "estimate off by", "GiB outside PyTorch"]
    again = result["about"].get("estimates")
    of = f" · estimates of {again}" if again else ""
    return "\n\n".join([table(heads, rows), told(result["about"]) + of])


def tokenising(result: dict[str, Any]) -> str:
    speed = result["text_bytes"] / result["seconds"] / 1e6
    said = (
        f"{result['documents']:,} documents of {result['text_bytes'] / 1e6:,.0f} MB, with `{result['tokenizer']}`, by "
        f"{result['processes']} processes: {speed:.1f} MB of text a second, {speed / result['processes']:.1f} for "
        f"each; {result['text_bytes'] / result['tokens']:.2f} bytes a token, and "
        f"{result['store_bytes'] / result['tokens']:.2f} bytes of the disk for each."
    )
    return "\n\n".join([said, told(result["about"])])


def host(result: dict[str, Any]) -> str:
    rows = [[name, f"{value:.1f}"] for name, value in result["microseconds"].items()]
    said = f"A forward and backward has {result['launches']} launches."
    return "\n\n".join([table(["µs of the host, without the driver's", ""], rows), said, told(result["about"])])


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "host": host,
    "mqar_tiny": mqar_tiny,
    "prose_15m": prose,
    "prose_100m": prose,
    "op_cpu": operator,
    "op_gpu": operator_on_a_gpu,
    "op_gpu_graphs": shapes_alone,
    "op_gpu_packed": operator,
    "op_gpu-summary": summary,
    "op_gpu_lengths": lengths,
    "operator_bytes": operator_bytes,
    "operator_memory": operator_memory,
    "between_products": step_table.between_products,
    "step_bounds": step_bounds,
    "step_instructions": step_instructions,
    "step_splits": step_splits,
    "tile_registers": tile_registers,
    "step_energy": step_table.step_energy,
    "kernel_steps": kernel_steps,
    "kernel_counters": kernel_counters,
    "counters": counters,
    "kernel_trials": kernel_trials,
    "drift": drift,
    "train_gpu": training,
    "train_gpu-summary": training_summary,
    "train_gpu_power-summary": training_summary,
    "train_gpu_variants": training,
    "train_gpu_cold": training,
    "train_gpu_profile": training,
    "train_gpu_power": training,
    "train_gpu_bf16": training,
    "train_gpu_340m": training,
    "train_gpu_130m": training,
    "context_parallel": context_parallel,
    "memory": memory,
    "memory_sharded": memory,
    "scaling": scaling,
    "scaling_h100": scaling,
    "tokenising": tokenising,
    "test_gpu": gpu_tests,
    "test_gpu_four": gpu_tests_on_four,
}


def load(name: str) -> dict[str, Any]:
    """benchmarks/results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def block(name: str) -> str:
    """What stands in a block of that name."""
    file = FILES.get(name, name)
    if not (RESULTS / f"{file}.json").exists():
        return "Not measured yet."
    return RENDERERS[name](load(file))


def rendered(text: str) -> str:
    """A document with its blocks made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{block(m[2])}\n{m[3]}", text)


def main(arguments: list[str] | None = None) -> None:
    """Rewrite the documents, or with --check exit with 1 if one is out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description="figures into the documents")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a document is out of date")
    options = parser.parse_args(arguments)
    stale = []
    texts = [(ROOT / name, rendered) for name in DOCUMENTS]
    texts += [(path, lambda text, path=path: with_head(path)) for path in recipes_with_heads()]
    for path, made in texts:
        old = path.read_text(encoding="utf-8")
        new = made(old)
        if new != old:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(new, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python -m benchmarks.render")


if __name__ == "__main__":
    main()
