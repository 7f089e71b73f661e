"""Tokenizers by name. Every one is a `transformers.PreTrainedTokenizerFast`, saved with each checkpoint.

| spec | vocabulary | special tokens |
|---|---|---|
| `byte` | ids 0 … 255 are the bytes of UTF-8 | `<bos>` 256, `<eos>` 257, `<pad>` 258 |
| `bpe:N` | N pieces of byte-level BPE, trained on the texts given | `<bos>` 0, `<eos>` 1, `<pad>` 2 (counted in N) |
| `mistral` | the 32,000 pieces of Mistral's first model | `<unk>` 0 (also padding), `<s>` 1, `</s>` 2 |
| a folder | what its `tokenizer.json` says | what its `tokenizer_config.json` says |

The built-in ones encode what looks like a special token in a text (`"<s>"`) as the plain text it is.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from flash_gsa.data.mistral import mistral_tokenizer
from flash_gsa.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

BUILT_IN = ("byte", "bpe:N", "mistral")
SMALLEST_BPE, LARGEST_BPE = 300, 65_536
_SPECIALS = ("<bos>", "<eos>", "<pad>")


def load_tokenizer(
    spec: str, *, training_texts: Callable[[], Iterable[str]] | None = None
) -> "PreTrainedTokenizerFast":
    """The tokenizer that `spec` names.

    Args:
        spec: `"byte"`, `"bpe:N"` (300 ≤ N ≤ 65,536), `"mistral"`, or a folder that holds a `tokenizer.json`
            (a Hugging Face tokenizer, or a checkpoint of ours).
        training_texts: gives the texts a `bpe:N` is trained on; not called for any other spec. The
            result depends on nothing but N and the texts.

    Raises:
        UsageError: an unknown name, a folder without `tokenizer.json`, an unreadable `tokenizer.json`, N out of
            range, no or too few training texts, `mistral-common` not installed.
    """
    if spec == "byte":
        return _byte_tokenizer()
    if spec == "mistral":
        return mistral_tokenizer()
    if spec == "bpe" or spec.startswith("bpe:"):
        return _trained_bpe(bpe_size(spec), training_texts)
    return _from_folder(spec)


def _byte_tokenizer() -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, models, pre_tokenizers

    # ByteLevel writes byte b as one visible character: itself where it has one, else the next code point from 256.
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    vocabulary = {chr(256 + hidden.index(b)) if b in hidden else chr(b): b for b in range(256)}
    vocabulary |= {token: 256 + i for i, token in enumerate(_SPECIALS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _wrap_byte_level(tokenizer)


def bpe_size(spec: str) -> int:
    """N of `bpe:N`. Raises UsageError if it is no whole number in range."""
    digits = spec.partition(":")[2].replace("_", "")
    size = int(digits) if digits.isascii() and digits.isdigit() else 0
    if not SMALLEST_BPE <= size <= LARGEST_BPE:
        raise UsageError(
            f"tokenizer {spec!r}: expected 'bpe:N' with a whole number of pieces N from {SMALLEST_BPE} to "
            f"{LARGEST_BPE}, for instance 'bpe:4096'"
        )
    return size


def _trained_bpe(size: int, training_texts: Callable[[], Iterable[str]] | None) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if training_texts is None:
        raise UsageError(
            f"tokenizer 'bpe:{size}' is trained on the training texts, and there are none here. To use one that was "
            "trained before, name the folder of its checkpoint instead"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(_SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    if tokenizer.get_vocab_size() < size:
        raise UsageError(
            f"tokenizer 'bpe:{size}': the training texts give only {tokenizer.get_vocab_size()} pieces. "
            "Train on more text or ask for fewer pieces"
        )
    return _wrap_byte_level(tokenizer)


def _wrap_byte_level(tokenizer: "Tokenizer") -> "PreTrainedTokenizerFast":
    from tokenizers import decoders, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIALS))
    bos, eos, pad = _SPECIALS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _from_folder(spec: str) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    folder = Path(spec).expanduser()
    if not (folder / "tokenizer.json").is_file():
        if folder.is_dir():
            wrong = f"the folder {spec!r} has no tokenizer.json"
        else:
            wrong = f"there is no tokenizer and no folder of the name {spec!r}"
        raise UsageError(
            f"{wrong}. Expected one of the built-in {', '.join(BUILT_IN)}, or a folder with a tokenizer.json "
            f"(a Hugging Face tokenizer or a checkpoint).{did_you_mean(spec, BUILT_IN)}"
        )
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:
        raise UsageError(
            f"the tokenizer in {spec!r} cannot be read ({error}). Expected a whole tokenizer.json and "
            "tokenizer_config.json as save_pretrained writes them; copy or save the tokenizer again"
        ) from error
