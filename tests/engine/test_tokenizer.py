"""Tokenisers and chat templates: equal to `transformers`, whole characters while streaming, typed refusals."""

import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from octavo_engine.errors import InvalidRequestError, ModelSourceError, UnsupportedModelError
from octavo_engine.loading.chat_template import ChatTemplate
from octavo_engine.loading.gguf_tokenizer import tokenizer_from_gguf
from octavo_engine.loading.text_stream import REPLACEMENT, TextStream
from octavo_engine.loading.tokenizer import Tokenizer, load_tokenizer, read_eos_token_ids
from octavo_engine.model_source import ModelFiles

TEXTS = [
    "",
    "Hello, world!",
    "  leading and trailing  ",
    "one\n\n\ntwo\t\tthree\r\nfour",
    "def f(x):\n    return [y**2 for y in x if y != None]  # comment",
    "I'll say we've won; don't you think they'd mind?",
    "naïve café, Grüße, ﬁne",
    "日本語のテスト 你好世界 한국어",
    "العربية हिन्दी ไทย",
    "🎉👨‍👩‍👧‍👦🇫🇷 emoji ✨",
    "zero\u200bwidth\ufeff and \u00a0 spaces",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a" * 300,
    "x = 12345 + 3.14",
]
CHAT = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is <2 + 2>?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure? 🎉"},
]


def files_of(path: Path) -> ModelFiles:
    return ModelFiles(str(path), path)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(files_of(smollm2_path))


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)


def random_text(rng: random.Random) -> str:
    """Printable ASCII, many scripts, emoji, spaces and newlines; digits are tested on their own."""
    ranges = [(32, 127), (0x80, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1F700), (32, 33), (10, 11)]
    characters = (chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 60)))
    return "".join(character for character in characters if not character.isnumeric())


@pytest.mark.model
def test_tokens_equal_transformers(smollm2: Tokenizer, reference: Any) -> None:
    rng = random.Random(0)
    for text in [*TEXTS, *(random_text(rng) for _ in range(1000))]:
        token_ids = smollm2.encode(text)
        assert token_ids == reference.encode(text)
        assert smollm2.decode(token_ids, skip_special_tokens=False) == text


@pytest.mark.model
def test_every_digit_is_split_off_before_anything_else(smollm2: Tokenizer) -> None:
    """As SmolLM2's tokenizer.json and llama.cpp do; `transformers` drops that step when it reads a GGUF file."""
    assert smollm2.encode("\n\n1.") == [*smollm2.encode("\n\n"), *smollm2.encode("1"), *smollm2.encode(".")]
    assert [smollm2.decode([token]) for token in smollm2.encode("a 123")] == ["a", " ", "1", "2", "3"]


@pytest.mark.model
def test_batches_equal_single_texts(smollm2: Tokenizer) -> None:
    assert smollm2.encode_batch(TEXTS) == [smollm2.encode(text) for text in TEXTS]


@pytest.mark.model
def test_smollm2_ends_at_the_end_of_a_turn(smollm2: Tokenizer, smollm2_path: Path) -> None:
    assert smollm2.eos_token_ids == frozenset({2})
    assert smollm2.decode([2], skip_special_tokens=False) == "<|im_end|>"
    assert smollm2.decode([2]) == ""
    assert smollm2.vocab_size == 49152
    assert read_eos_token_ids(files_of(smollm2_path)) == frozenset({2})


@pytest.mark.model
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:2]], ids=["with system", "default system"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_equal_transformers(messages, add_generation_prompt, smollm2: Tokenizer, reference: Any) -> None:
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert smollm2.apply_chat_template(messages, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.model
def test_streams_whole_characters_only(smollm2: Tokenizer) -> None:
    rng = random.Random(1)
    for text in [*TEXTS, *(random_text(rng) for _ in range(300)), "🎉日本" * 60]:
        token_ids = smollm2.encode(text)
        stream = smollm2.stream(skip_special_tokens=False)
        pieces = [stream.step(token_id) for token_id in token_ids]
        assert not any(REPLACEMENT in piece for piece in pieces)
        assert "".join(pieces) + stream.flush() == text


@pytest.mark.model
def test_bytes_of_tokens_join_to_the_text(smollm2: Tokenizer) -> None:
    for text in TEXTS:
        assert b"".join(map(smollm2.token_bytes, smollm2.encode(text))).decode() == text
    assert smollm2.token_bytes(2) == b"<|im_end|>"
    assert smollm2.token_bytes(10**6) == b""


@pytest.mark.model
def test_loads_without_torch_or_transformers(smollm2_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from octavo_engine.model_source import ModelFiles;"
        "from octavo_engine.loading.tokenizer import load_tokenizer;"
        f"load_tokenizer(ModelFiles('', Path({str(smollm2_path)!r})));"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def decode_bytes(token_ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(token_ids).decode("utf-8", "replace")


def stream_bytes(content: bytes) -> tuple[list[str], str]:
    stream = TextStream(decode_bytes)
    return [stream.step(byte) for byte in content], stream.flush()


def test_a_stream_waits_for_the_bytes_of_a_character() -> None:
    pieces, rest = stream_bytes("a🎉b".encode())
    assert pieces == ["a", "", "", "", "🎉", "b"]
    assert rest == ""


def test_characters_of_byte_tokens_stay_whole_one_after_the_other() -> None:
    text = " 世界世界🎉🎉 é" * 12
    vocab = {"<unk>": 0, "\u2581": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    for part in (text, text.replace(" ", "")[:40]):
        stream = TextStream(tokenizer.decode)
        pieces = [stream.step(token_id) for token_id in tokenizer.encode(part).ids]
        assert "".join(pieces) + stream.flush() == part
        assert max(map(len, pieces)) == 1


def test_a_stream_that_ends_inside_a_character_says_so() -> None:
    pieces, rest = stream_bytes("a🎉".encode()[:3])
    assert pieces == ["a", "", ""]
    assert rest == REPLACEMENT


def test_a_stream_goes_on_after_bytes_that_are_no_character() -> None:
    pieces, rest = stream_bytes(b"\xff\xffab\xff" + "é".encode())
    assert "".join(pieces) + rest == f"{REPLACEMENT}{REPLACEMENT}ab{REPLACEMENT}é"


@pytest.mark.parametrize("byte", [0x80, 0xFF, 0xF0])
def test_a_stream_of_nothing_but_bad_bytes_stays_cheap(byte: int) -> None:
    longest = 0

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode_bytes(token_ids)

    stream = TextStream(decode)
    text = "".join(stream.step(byte) for _ in range(1000)) + stream.flush()
    assert set(text) == {REPLACEMENT}
    assert longest < 100


def test_a_stream_equals_decoding_at_once_for_random_bytes() -> None:
    rng = random.Random(2)
    for _ in range(200):
        content = "".join(rng.choice("aé日🎉 \n") for _ in range(rng.randrange(100))).encode()
        pieces, rest = stream_bytes(content)
        assert "".join(pieces) + rest == content.decode()


def byte_level_folder(folder: Path, **config: Any) -> Path:
    """A model folder with a trained byte-level tokenizer and SmolLM2's kind of special tokens."""
    import json

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<end>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(TEXTS, trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8,
        "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 390, "max_position_embeddings": 8,
        "eos_token_id": 1,
    }))  # fmt: skip
    return folder


def test_a_folder_loads_like_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    folder = byte_level_folder(tmp_path / "model", chat_template=template)
    tokenizer, reference = load_tokenizer(files_of(folder)), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.apply_chat_template(CHAT) == reference.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.vocab_size == 390  # the model has no row for the tokenizer's last ten tokens


def test_end_tokens_come_from_every_place_that_names_them(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "model")
    assert read_eos_token_ids(files_of(folder)) == {1}
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert read_eos_token_ids(files_of(folder)) == {1, 2, 7}


def test_a_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(files_of(byte_level_folder(tmp_path / "model")))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        tokenizer.apply_chat_template(CHAT)
    assert caught.value.code == "no_chat_template"


def test_a_given_template_replaces_the_models(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "model", chat_template="theirs")
    own = tmp_path / "own.jinja"
    own.write_text("mine: {{ messages[0].content }}")
    assert load_tokenizer(files_of(folder), own).apply_chat_template(CHAT) == "mine: You are brief."
    with pytest.raises(ModelSourceError, match="cannot read the chat template"):
        load_tokenizer(files_of(folder), tmp_path / "none.jinja")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelSourceError, match="no tokenizer that can be read"):
        load_tokenizer(files_of(folder))


def render(source: str, messages: Sequence[dict[str, Any]] = (), **variables: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **variables)


def test_a_template_has_what_hugging_face_documents() -> None:
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{% generation %}x{% endgeneration %}{{ bos_token }}") == "x<s>"
    assert re.fullmatch(r"\d{4}", render("{{ strftime_now('%Y') }}"))
    assert render("{{ tools | length }} {{ tools is none }}", tools=[1, 2]) == "2 False"
    assert render("{% if tools %}x{% endif %}{{ add_generation_prompt }}") == "True"


def test_a_template_may_refuse_a_conversation() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="chat template refuses"):
        render("{{ messages[0].content + 1 }}", [{"role": "user", "content": "a"}])


def test_a_template_cannot_leave_the_sandbox() -> None:
    with pytest.raises(InvalidRequestError, match="unsafe"):
        render("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequestError, match="unsafe"):
        render("{{ messages.append(1) }}")


def test_a_broken_template_is_refused_at_the_start() -> None:
    with pytest.raises(ModelSourceError, match="not valid Jinja, line 2"):
        ChatTemplate("\n{% if %}", {})


def test_the_final_message_can_be_continued() -> None:
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer"}]
    text = render(source, messages, continue_final_message=True, add_generation_prompt=False)
    assert text == "[a][The answer"
    source = "{% for m in messages %}{{ m.content | trim }}<|im_end|>{% endfor %}"
    messages[1] = {"role": "assistant", "content": " end "}
    assert render(source, messages, continue_final_message=True, add_generation_prompt=False) == "a<|im_end|>end"
    with pytest.raises(InvalidRequestError, match="exclude each other"):
        render(source, messages, continue_final_message=True)


def sentencepiece_metadata() -> dict[str, Any]:
    """A GGUF header with a SentencePiece vocabulary: control tokens, bytes, then pieces, longer ones better."""
    pieces = "▁hello ▁world hello ▁h ello llo el lo ▁w orld or ld l h e o w r d ▁"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces.split(" "), "<tool>"]
    scores = [0.0] * 259 + [len(piece) - 20.0 for piece in pieces.split(" ")] + [0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces.split(" ")) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_a_sentencepiece_vocabulary_encodes_and_decodes() -> None:
    metadata = sentencepiece_metadata()
    backend = tokenizer_from_gguf(metadata)
    assert backend.encode("hello world").ids[0] == 1  # begins with <s> unless the header says otherwise
    for text in ("hello world", "  hello", "é🎉", "hello<tool>world"):
        token_ids = backend.encode(text, add_special_tokens=False).ids
        assert backend.decode(token_ids, skip_special_tokens=False).replace("<tool> ", "<tool>") == text
    without = {**metadata, "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    ends = tokenizer_from_gguf(without).encode("hello").ids
    assert ends[0] != 1
    assert ends[-1] == 2


def test_bytes_of_pieces_keep_their_spaces_and_parts_of_characters() -> None:
    tokenizer = Tokenizer(
        tokenizer_from_gguf(sentencepiece_metadata()), vocab_size=300, eos_token_ids=frozenset(), chat_template=None
    )
    token_ids = tokenizer.encode("hello world é", add_special_tokens=False)
    pieces = [tokenizer.token_bytes(token_id) for token_id in token_ids]
    assert pieces == [b" hello", b" world", b" ", b"\xc3", b"\xa9"]


@pytest.mark.parametrize(("split", "is_whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False)])
def test_a_word_that_is_a_token_needs_no_merges_where_its_family_says_so(split: str, is_whole: bool) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": split, "tokenizer.ggml.bos_token_id": 6,
        "tokenizer.ggml.tokens": ["a", "b", "c", "ab", "bc", "abc", "<s>"],
        "tokenizer.ggml.token_type": [1] * 6 + [3], "tokenizer.ggml.merges": ["b c"],
    }  # fmt: skip
    assert tokenizer_from_gguf(metadata).encode("abc").ids == ([6, 5] if is_whole else [0, 4])
    without = {**metadata, "tokenizer.ggml.add_bos_token": False}
    assert tokenizer_from_gguf(without).encode("abc").ids == ([5] if is_whole else [0, 4])


@pytest.mark.parametrize("field", ["tokens", "scores"])
def test_what_a_tokenizer_needs_is_named(field: str) -> None:
    metadata = sentencepiece_metadata()
    del metadata[f"tokenizer.ggml.{field}"]
    with pytest.raises(UnsupportedModelError, match=f"lacks tokenizer.ggml.{field}"):
        tokenizer_from_gguf(metadata)


def test_unknown_kinds_of_tokenizer_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="'bert' is not supported"):
        tokenizer_from_gguf({"tokenizer.ggml.model": "bert"})
    byte_level = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.pre": "mystery"}
    with pytest.raises(UnsupportedModelError, match=r"'mystery' is not supported; supported: .*smollm"):
        tokenizer_from_gguf(byte_level)
