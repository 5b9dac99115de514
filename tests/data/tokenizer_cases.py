"""Small tokenizers of every kind, trained when a test asks for them, and a writer of GGUF files."""

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CORPUS = [
    "The old lighthouse keeper counted the ships that passed before sunrise.",
    "Water boils at a lower temperature on top of a high mountain; 1987 was a year.",
    "She opened the letter slowly, afraid of what her brother might have written!",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.  Zwei  Leerzeichen.",
    "def add(a, b):\n    return a + b  # a tiny function",
    "positive negative neutral yes no true false",
]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)


def byte_level(folder: Path, *, config: Mapping[str, Any] | None = None) -> Path:
    """The tokenizer.json of a byte-level BPE like GPT-2's, with the files beside it."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIAL],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    config = {"eos_token": "<|im_end|>"} if config is None else config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def sentencepiece_model(*, prefix: bool) -> bytes:
    """A SentencePiece BPE with bytes for what has no piece, like Llama's."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=["<tool>"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def llama_metadata(model: bytes, *, prefix: bool, **more: Any) -> dict[str, Any]:
    """The metadata of a GGUF file with this SentencePiece model, as llama.cpp writes it."""
    import sentencepiece

    read = sentencepiece.SentencePieceProcessor(model_proto=model)
    kinds = []
    for i in range(len(read)):
        if read.is_unknown(i):
            kinds.append(2)
        elif read.is_control(i):
            kinds.append(3)
        elif read.is_byte(i):
            kinds.append(6)
        else:
            kinds.append(4 if read.id_to_piece(i) == "<tool>" else 1)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [read.id_to_piece(i) for i in range(len(read))],
        "tokenizer.ggml.scores": [read.get_score(i) for i in range(len(read))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
        **more,
    }


def gpt2_metadata(tokenizer_json: Path, pre: str, **more: Any) -> dict[str, Any]:
    """The metadata of a GGUF file with this byte-level BPE."""
    model = json.loads(tokenizer_json.read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": CHAT,
        **more,
    }


def write_gguf(path: Path, metadata: Mapping[str, Any]) -> Path:
    """A GGUF file of version 3 without tensors."""
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata))
    for key, value in metadata.items():
        data += _string(key) + _value(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    return struct.pack("<I", 9) + _array(value)


def _array(values: Sequence[Any]) -> bytes:
    kind = {str: 8, int: 5, float: 6}[type(values[0])]
    start = struct.pack("<IQ", kind, len(values))
    if kind == 8:
        return start + b"".join(map(_string, values))
    return start + struct.pack(f"<{len(values)}{'i' if kind == 5 else 'f'}", *values)
