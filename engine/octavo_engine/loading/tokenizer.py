"""The tokenizer and the chat template of a model, from its folder or from its GGUF file.

The front end uses this, so nothing here imports torch. Encoding and decoding go straight to the Rust tokenizer, which
may be called from any thread; the `transformers` wrapper around it keeps state between calls and may not.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from octavo_engine.errors import InvalidRequestError, ModelSourceError
from octavo_engine.geometry import read_geometry
from octavo_engine.gguf_file import GgufFile
from octavo_engine.loading.chat_template import ChatTemplate
from octavo_engine.loading.gguf_tokenizer import special_tokens_of_gguf, tokenizer_from_gguf
from octavo_engine.loading.text_stream import REPLACEMENT, TextStream
from octavo_engine.model_source import ModelFiles

# Keys of a GGUF header that name tokens after which a model has finished.
_GGUF_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# The names under which tokenizer_config.json means nothing but tokenizer.json.
_PLAIN_TOKENIZER_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
# How vocabularies spell a byte that is no character of its own: SentencePiece, and the letters of byte-level BPE, which
# are those of Latin-1 that can be seen and for the others, in order, those from U+0100 on (GPT-2's encoder.py).
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_UNSEEN = [byte for byte in range(0x100) if byte not in _VISIBLE]
_BYTES = {chr(byte): byte for byte in _VISIBLE} | {chr(0x100 + i): byte for i, byte in enumerate(_UNSEEN)}


class Tokenizer:
    """Text to tokens and back."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        chat_template: ChatTemplate | None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self.eos_token_ids = eos_token_ids
        self.vocab_size = vocab_size

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The text's tokens; special tokens spelled out in the text count as such."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Each text's tokens, computed on several threads."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The tokens' text; bytes that are no character become U+FFFD."""
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """One token's share of a text, which may be a part of a character; nothing for one that the model lacks."""
        piece = self._backend.id_to_token(token_id) or ""
        if found := _FALLBACK_BYTE.fullmatch(piece):
            return bytes.fromhex(found[1])
        # Behind another token, since some decoders strip a text's first space.
        first = self._backend.encode("a", add_special_tokens=False).ids
        num_before = len(self._backend.decode(first, skip_special_tokens=False))
        text = self._backend.decode([*first, token_id], skip_special_tokens=False)[num_before:]
        if REPLACEMENT in text and all(letter in _BYTES for letter in piece):
            return bytes(_BYTES[letter] for letter in piece)
        return text.encode("utf-8", "replace")

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for one sequence whose tokens come one by one."""
        backend = self._backend
        return TextStream(lambda token_ids: backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as the model was trained to read it; encode it without adding special tokens.

        Raises InvalidRequestError if the model has no chat template, or if its template refuses the conversation.
        """
        if self._chat_template is None:
            raise InvalidRequestError(
                "this model has no chat template: use /v1/completions, or start the server with --chat-template FILE",
                param="messages",
                code="no_chat_template",
            )
        return self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )


def load_tokenizer(files: ModelFiles, chat_template_file: Path | None = None) -> Tokenizer:
    """The model's tokenizer; `chat_template_file` replaces its own template.

    Raises ModelSourceError if a file is missing or unreadable, UnsupportedModelError for an unknown kind.
    """
    backend, special_tokens, template = _from_gguf(files) if files.is_gguf else _from_folder(files)
    if chat_template_file is not None:
        template = _read_template(chat_template_file)
    return Tokenizer(
        backend,
        vocab_size=min(read_geometry(files.path).vocab_size, backend.get_vocab_size(with_added_tokens=True)),
        eos_token_ids=read_eos_token_ids(files),
        chat_template=ChatTemplate(template, special_tokens) if template else None,
    )


_Parts = tuple[tokenizers.Tokenizer, Mapping[str, str], str | None]


def _from_gguf(files: ModelFiles) -> _Parts:
    metadata = GgufFile(files.path).metadata
    return tokenizer_from_gguf(metadata), special_tokens_of_gguf(metadata), metadata.get("tokenizer.chat_template")


def _from_folder(files: ModelFiles) -> _Parts:
    loader = _tokenizer_class(files)
    try:
        wrapper = loader.from_pretrained(str(files.path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelSourceError(f"{files.path} has no tokenizer that can be read: {error}") from None
    backend = getattr(wrapper, "backend_tokenizer", None)
    if backend is None:
        raise ModelSourceError(f"{files.path} has no tokenizer.json, and none can be made from what it has")
    names = {name: str(token) for name, token in wrapper.special_tokens_map.items() if isinstance(token, str)}
    template = wrapper.chat_template
    if isinstance(template, dict):  # several named ones; `default` is for plain chats
        template = template.get("default")
    return backend, names, template


def _tokenizer_class(files: ModelFiles) -> Any:
    """What of transformers reads a folder's tokenizer. It is imported here: a GGUF file needs none of it.

    `AutoTokenizer` imports torch and much else, which takes many seconds on a slow host, to choose in most cases the
    plain class that the folder names.
    """
    if files.read_json("tokenizer_config.json").get("tokenizer_class") in _PLAIN_TOKENIZER_CLASSES:
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelSourceError(f"cannot read the chat template {file}: {error.strerror}") from None


def read_eos_token_ids(files: ModelFiles) -> frozenset[int]:
    """Tokens after which the model has finished, without loading the tokenizer.

    From the GGUF header; for a folder, what generation_config.json (or else config.json) states, and the tokenizer's
    own. Chat models often name the end of a turn in only one of these places.
    """
    if files.is_gguf:
        metadata = GgufFile(files.path).metadata
        stated = [metadata.get(f"tokenizer.ggml.{key}") for key in _GGUF_END_KEYS]
        return frozenset(token_id for token_id in stated if token_id is not None)
    for name in ("generation_config.json", "config.json"):
        if ids := _as_ids(files.read_json(name).get("eos_token_id")):
            break
    return ids | _tokenizer_end_ids(files)


def _as_ids(value: object) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(each for each in values if isinstance(each, int))


def _tokenizer_end_ids(files: ModelFiles) -> frozenset[int]:
    """The id of the `eos_token` in tokenizer_config.json, if it is one of the tokenizer's added tokens."""
    config = files.read_json("tokenizer_config.json")
    token = config.get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    added = files.read_json("tokenizer.json").get("added_tokens") if content else None
    if not isinstance(added, list):
        return frozenset()
    return frozenset(each["id"] for each in added if each.get("content") == content)
