"""The 32,000-piece Mistral vocabulary as a `tokenizers` BPE with the ids of sentencepiece.

sentencepiece merges, again and again, the adjacent pair whose union has the best score, the leftmost
of several. `tokenizers` merges the adjacent pair whose *rule* comes first in a list. The two agree
when the list holds every split of every piece into two pieces, ordered by the score of the whole.

One thing is left open by that: the splits of one piece, which share its score. Their order matters
only where two of them overlap, P = xy = yz in a text …xyz…; sentencepiece takes the left one, xy. In
this vocabulary x is the longer of x and y in every such case where x ≠ z, hence the longest left part
comes first. (Where x = z, P is a run of one character, and the same order is the right one: with the
opposite order a run of 15 spaces is cut differently.) The tests check both statements.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from flash_gsa.data.sentencepiece_model import PieceType, SentencePieceModel, read_sentencepiece_model
from flash_gsa.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPACE = "▁"


def mistral_model_path() -> Path:
    """Where the installed `mistral-common` keeps its first sentencepiece model.

    Raises:
        UsageError: the package is not installed, or no longer carries the model.
    """
    package = importlib.util.find_spec("mistral_common")
    if package is None or not package.submodule_search_locations:
        raise UsageError(
            "tokenizer 'mistral' needs the package mistral-common, which carries its vocabulary and is not "
            'installed. Install it with: pip install "flash-gsa[mistral]"'
        )
    path = Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
    if not path.is_file():
        raise UsageError(
            f"tokenizer 'mistral': the installed mistral-common has no {path.name} (looked at {path}). "
            'Install a version that does: pip install "mistral-common==1.13.1"'
        )
    return path


def merge_rules(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every split of every normal piece into two normal pieces, best first (see the module's text)."""
    score = {piece.text: piece.score for piece in model.pieces if piece.type == PieceType.NORMAL}
    splits = [
        (text[:cut], text[cut:])
        for text in score
        for cut in range(1, len(text))
        if text[:cut] in score and text[cut:] in score
    ]
    return sorted(splits, key=lambda pair: (-score[pair[0] + pair[1]], -len(pair[0])))


def mistral_tokenizer() -> "PreTrainedTokenizerFast":
    """BOS `<s>` 1, EOS `</s>` 2, `<unk>` 0, which is also the padding: byte fallback covers every
    character, so no text encodes to it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    model = read_sentencepiece_model(mistral_model_path())
    expected = (32_000, "identity", True, False, True)
    if (len(model.pieces), *model[1:]) != expected:
        raise UsageError(
            "tokenizer 'mistral': the model in the installed mistral-common is not the 32,000-piece one this "
            'conversion was made for. Install the tested version: pip install "mistral-common==1.13.1"'
        )
    vocabulary = {piece.text: index for index, piece in enumerate(model.pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merge_rules(model),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    # No piece has a space right after anything but a space, so no merge crosses such a place: cutting there
    # changes nothing, lets words be cached and keeps the time linear in the length of the text.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
