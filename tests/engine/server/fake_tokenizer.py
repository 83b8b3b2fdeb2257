"""A tokenizer whose tokens are bytes, for the vocabulary of `fake_core`."""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

from engine.server.fake_core import END_TOKEN_ID, VOCAB_SIZE
from octavo_engine.errors import InvalidRequestError

END_TEXT = "<end>"
# Of a token that the tokenizer has and the model has not.
ADDED_TEXT = "<added>"


class ByteStream:
    def __init__(self, *, skip_special_tokens: bool) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._skips = skip_special_tokens

    def step(self, token_id: int) -> str:
        if token_id == END_TOKEN_ID:
            return self.flush() + ("" if self._skips else END_TEXT)
        return self._decoder.decode(bytes([token_id]))

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class ByteTokenizer:
    vocab_size = VOCAB_SIZE

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        parts = text.split(ADDED_TEXT)
        return [*parts[0].encode(), *(token for part in parts[1:] for token in (VOCAB_SIZE, *part.encode()))]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        return "".join(stream.step(token_id) for token_id in token_ids) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        return END_TEXT.encode() if token_id == END_TOKEN_ID else bytes([token_id])

    def stream(self, *, skip_special_tokens: bool = True) -> ByteStream:
        return ByteStream(skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        if variables.get("refuse"):
            raise InvalidRequestError("the chat template refuses this", param="messages")
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        if continue_final_message:
            return text.removesuffix("\n")
        return text + "assistant: " if add_generation_prompt else text
