"""A tokenizer out of a GGUF file's own metadata: vocabulary, merges, pre-tokenizer and special tokens.

Two kinds exist for the llama architecture: byte-level BPE (`gpt2`), whose way of splitting text is named by
`tokenizer.ggml.pre`, and SentencePiece BPE (`llama`), whose merges follow from the scores. Field names: the GGUF
specification; the splits: the regular expressions that each model's tokenizer.json states.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from octavo_engine.errors import UnsupportedModelError

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama3": _LLAMA3_SPLIT, "llama-v3": _LLAMA3_SPLIT, "llama-bpe": _LLAMA3_SPLIT, "falcon3": _LLAMA3_SPLIT,
    "qwen2": _QWEN2_SPLIT, "deepseek-r1-qwen": _QWEN2_SPLIT, "tekken": _TEKKEN_SPLIT,
}  # fmt: skip
# Tokenizers of LLaMA 3's and of Tekken's kind take a word that is a token as it is, without building it by merges, and
# begin a text with BOS unless the file says otherwise.
_WHOLE_WORDS = {name for name, split in _SPLITS.items() if split in (_LLAMA3_SPLIT, _TEKKEN_SPLIT)}
_PLAIN_BYTE_LEVEL = ("default", "gpt-2")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer.

    Raises UnsupportedModelError for a kind or a pre-tokenizer that is unknown, and where something is missing.
    """
    model, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    for name in {"llama": ("tokens", "scores"), "gpt2": ("tokens",)}.get(str(model), ()):
        if metadata.get(f"tokenizer.ggml.{name}") is None:
            raise UnsupportedModelError(f"the GGUF tokenizer lacks tokenizer.ggml.{name}")
    if model == "gpt2":
        tokenizer = _byte_level(metadata)
    elif model == "llama":
        tokenizer = _sentencepiece(metadata)
    else:
        raise UnsupportedModelError(f"the GGUF tokenizer {model!r} is not supported; supported: gpt2, llama")
    _add_special_tokens(tokenizer, metadata)
    _add_begin_and_end(tokenizer, metadata, begin_by_default=model == "llama" or split in _WHOLE_WORDS)
    return tokenizer


def special_tokens_of_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on, as chat templates name them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    keys = {
        "bos_token": "bos_token_id", "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id", "pad_token": "padding_token_id",
    }  # fmt: skip
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: tokens[token_id] for name, token_id in ids.items() if token_id is not None}


def _vocab(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {token: token_id for token_id, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    merges = [_split_merge(merge) for merge in metadata.get("tokenizer.ggml.merges", [])]
    split = str(metadata.get("tokenizer.ggml.pre", "default"))
    tokenizer = Tokenizer(BPE(vocab=_vocab(metadata), merges=merges, ignore_merges=split in _WHOLE_WORDS))
    tokenizer.pre_tokenizer = _pre_tokenizer(split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name in _PLAIN_BYTE_LEVEL:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[name]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(sorted([*_PLAIN_BYTE_LEVEL, *_SINGLE_DIGITS, *_SPLITS]))
    raise UnsupportedModelError(f"the GGUF pre-tokenizer {name!r} is not supported; supported: {known}")


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    vocab = _vocab(metadata)
    unknown = metadata["tokenizer.ggml.tokens"][metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges_from_scores(vocab, metadata["tokenizer.ggml.scores"])
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    add_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prepend = [normalizers.Prepend(_SPACE)] if add_space else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if add_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_from_scores(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose result has the best score: every split of a token is a merge, best first."""
    merges = []
    for token, token_id in vocab.items():
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(vocab[left], vocab[right], left, right) for left, right in splits if left in vocab and right in vocab]
        merges += [(-scores[token_id], *pair) for pair in sorted(pairs)]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, _, _, left, right in merges]


def _add_special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Tokens that are matched whole in a text, before anything else splits it."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    control = [token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    own = [token for token, kind in zip(tokens, types, strict=False) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])


def _add_begin_and_end(tokenizer: Tokenizer, metadata: Mapping[str, Any], *, begin_by_default: bool) -> None:
    """The tokens that `add_special_tokens` puts around a text."""
    tokens = metadata["tokenizer.ggml.tokens"]
    begin_id = metadata.get("tokenizer.ggml.bos_token_id")
    end_id = metadata.get("tokenizer.ggml.eos_token_id")
    adds_begin = metadata.get("tokenizer.ggml.add_bos_token", begin_by_default) and begin_id is not None
    adds_end = metadata.get("tokenizer.ggml.add_eos_token", False) and end_id is not None
    around = {tokens[token_id]: token_id for token_id, adds in ((begin_id, adds_begin), (end_id, adds_end)) if adds}
    if around:
        begin = f"{tokens[begin_id]} " if adds_begin else ""
        end = f" {tokens[end_id]}" if adds_end else ""
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin}$A{end}", special_tokens=list(around.items())
        )
