"""`flash-gsa generate`: a model goes on from a text, on the terminal, as it writes."""

import sys
import time
from typing import Annotated, Any

import typer

from flash_gsa.cli.checkpoint import (
    CheckpointArgument,
    DeviceOption,
    load_text_model,
    open_engine,
    prompt_ids,
    read_stdin,
)
from flash_gsa.errors import UsageError


def generate(
    checkpoint: CheckpointArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="Text to go on from; - (or leaving it out, when input is piped) reads it from stdin. Without "
            "any, the model begins a document.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write, at least 1.", metavar="N")] = 200,
    temperature: Annotated[
        float,
        typer.Option(
            help="0 always takes the likeliest token; 1 samples from the model as it is; below 1 is more cautious.",
            metavar="X",
        ),
    ] = 0.8,
    top_k: Annotated[
        int | None,
        typer.Option(help="Sample from the K likeliest tokens only.", metavar="K", show_default="all"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest tokens that together have probability P, above 0, up to 1.",
            metavar="P",
            show_default="all",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Makes sampling repeatable, 0 or more.", metavar="N", show_default="a new one each time"),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Write: print the prompt and go on from it, token by token, until the document ends.

    The state is of constant size, so the thousandth token takes as long as the tenth.

    Examples:

    [bold]flash-gsa generate runs/demo "def read_lines(path):"[/bold]

    [bold]head -c 2000 notes.txt | flash-gsa generate runs/demo --max-new-tokens 500 --temperature 0[/bold]
    """
    settings = sampling(max_new_tokens, temperature, top_k, top_p, seed)
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = read_stdin()
    model, tokenizer = load_text_model(checkpoint, engine := open_engine(device))
    ids = prompt_ids(tokenizer, prompt or "")
    if not ids:
        raise UsageError("this model's tokenizer has no token that begins a text; give a prompt")

    started = time.monotonic()
    print(prompt or "", end="", flush=True)
    with engine.autocast():
        count = len(write(model, tokenizer, ids, settings, on_text=lambda text: print(text, end="", flush=True)))
    print(flush=True)
    if sys.stderr.isatty():
        seconds = time.monotonic() - started
        print(f"[{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s]", file=sys.stderr)


def sampling(
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """The options as `model.generate` wants them; also fixes the seed. Raises UsageError naming a wrong one."""
    import torch

    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}; expected 1 or more")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"--temperature is {temperature}; expected 0 (take the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise UsageError(f"--top-k is {top_k}; expected 1 or more. Leave it out to sample from all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"--top-p is {top_p}; expected above 0 and up to 1. Leave it out to sample from all tokens")
    if seed is not None and not 0 <= seed < 2**63:
        raise UsageError(f"--seed is {seed}; expected a whole number from 0 to 2^63 - 1")
    length = {"max_new_tokens": max_new_tokens}
    if temperature == 0:
        chosen = {"--top-k": top_k, "--top-p": top_p, "--seed": seed}
        if useless := [name for name, value in chosen.items() if value is not None]:
            raise UsageError(
                f"{' and '.join(useless)} would do nothing at --temperature 0, which samples nothing. "
                "Leave that out or raise the temperature"
            )
        return length | {"do_sample": False}
    if seed is not None:
        torch.manual_seed(seed)
    return length | {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k or 0,
        "top_p": 1.0 if top_p is None else top_p,
    }


def write(model: Any, tokenizer: Any, ids: list[int], settings: dict[str, Any], on_text: Any) -> list[int]:
    """Go on from `ids`, giving each piece of text to `on_text` as it comes; returns the new ids."""
    import torch
    from transformers import GenerationConfig

    from flash_gsa.inspection.token_text import IncrementalText

    class Streamer:
        """What `generate` calls: first with the prompt, then with each new token."""

        def __init__(self) -> None:
            self.text = IncrementalText(tokenizer, skip_special_tokens=True)
            self.new: list[int] | None = None

        def put(self, value: torch.Tensor) -> None:
            if self.new is None:
                # Pieces can depend on what stands before them.
                for token in ids[-8:]:
                    self.text.push(token)
                self.text.finish()
                self.new = []
                return
            for token in value.flatten().tolist():
                self.new.append(token)
                on_text(self.text.push(token))

        def end(self) -> None:
            on_text(self.text.finish())

    config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **settings,
    )
    prompt = torch.tensor([ids], device=model.lm_head.weight.device)
    streamer = Streamer()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=streamer)
    return streamer.new or []
