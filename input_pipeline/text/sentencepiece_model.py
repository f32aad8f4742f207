"""SentencePiece models with a dummy prefix, such as that of LLaMA and RadFM."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NoReturn

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from input_pipeline.text.tokenizer import SENTENCEPIECE, Tokenizer, encoding_error

CACHED_WORDS = 100_000


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Raises ValueError unless it has BOS, EOS and a dummy prefix."""

    kind = "SentencePiece model"
    pad_id = 0

    def __init__(self, path: str, files: Mapping[str, bytes], vocab_size: int | None = None):
        self.path, self.files, model = path, {SENTENCEPIECE: files[SENTENCEPIECE]}, files[SENTENCEPIECE]
        spec = sentencepiece_model_pb2.ModelProto()
        try:
            spec.ParseFromString(model)
            self._words = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # protobuf and SentencePiece define their own exceptions
            raise ValueError(f"tokenizer {path} is not a SentencePiece model ({error})") from error
        if not spec.normalizer_spec.add_dummy_prefix:
            reason = "has no dummy prefix, so the first word of a text would be encoded differently"
            raise ValueError(f"tokenizer {path} {reason}: pass the tokenizer.json of the model")
        # `_words` starts every text as a word. `_continued` is the same model for text that continues a word.
        spec.normalizer_spec.add_dummy_prefix = False
        self._continued = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.size = self.vocab_size = self._words.vocab_size()
        if vocab_size not in (None, self.size):
            reason = f"has {self.size} pieces, but the model has {vocab_size} ids"
            raise ValueError(f"tokenizer {path} {reason}: pass the model's own tokenizer")
        self.bos_id: int = self._words.bos_id()
        self.eos_id: int = self._words.eos_id()
        self.unk_id: int = self._words.unk_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"tokenizer {path} has no begin-of-text or no end-of-text token")
        self.stop_ids = (self.eos_id,)
        pieces, kinds = [p.piece for p in spec.pieces], [p.type for p in spec.pieces]
        types = sentencepiece_model_pb2.ModelProto.SentencePiece
        self._is_byte = [kind == types.BYTE for kind in kinds]
        self._is_control = [kind == types.CONTROL or i == self.unk_id for i, kind in enumerate(kinds)]
        self._starts_word = [piece.startswith("▁") for piece in pieces]
        # If no piece spans a space, words can be encoded separately, and most of them come from the cache.
        self._by_word = (
            spec.normalizer_spec.name == "identity"
            and not spec.normalizer_spec.remove_extra_whitespaces
            and types.USER_DEFINED not in kinds
            and not any("▁" in piece.lstrip("▁") or (piece.startswith("▁▁") and piece.strip("▁")) for piece in pieces)
        )
        self._cache: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}
        # Bytes 0x80 to 0xBF continue a UTF-8 character.
        self._continues = [b and 0x80 <= int(p[1:-1], 16) < 0xC0 for p, b in zip(pieces, self._is_byte, strict=True)]

    def encode_with_offsets(
        self, text: str, *, separator: str | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a text. A separator of spaces, or none, marks the first piece as the start of a word.

        The word-start mark has an empty range unless there is a space in the text.
        """
        starts_word = separator != ""
        if not self._by_word or not text or "  " in text or "▁" in text or text[0] == " " or text[-1] == " ":
            return self._encode(self._words if starts_word else self._continued, text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for k, word in enumerate(text.split(" ")):
            if k or starts_word:
                encoded = self._cache.get(word)
                if encoded is None:
                    if len(self._cache) >= CACHED_WORDS:
                        self._cache.clear()
                    encoded = self._cache[word] = self._encode(self._words, word)
            else:
                encoded = self._encode(self._continued, word)
            ids += encoded[0]
            first = len(offsets)
            offsets += [(begin + start, end + start) for begin, end in encoded[1]]
            if k:  # the word-start mark covers the space
                offsets[first] = (start - 1, offsets[first][1])
            start += len(word) + 1
        return ids, offsets

    def _encode(self, model, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            result = model.encode(text, return_type="offset_mapping")
        except (RuntimeError, TypeError, UnicodeError) as error:
            raise encoding_error(text) from error
        ids, offsets = result["ids"], result["offsets"]
        for i, token in enumerate(ids):
            begin, end = offsets[i]
            if begin == end and self._is_byte[token]:
                offsets[i] = (begin, begin + 1)
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids. BOS, EOS, unknown pieces and ids from V on give no text."""
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._words.decode([i for i in kept if not self._is_control[i]])

    def piece(self, token: int) -> str:
        return self._words.id_to_piece(token) if 0 <= token < self.size else ""

    def is_special(self, token: int) -> bool:
        return 0 <= token < self.size and self._is_control[token]

    def continues_character(self, token: int) -> bool:
        return self._continues[token]

    def starts_word(self, ids: Sequence[int], position: int) -> bool:
        return self._starts_word[ids[position]]

    @property
    def chat(self) -> NoReturn:
        raise ValueError(
            f"tokenizer {self.path} is a SentencePiece model, which has no chat template: pass the folder of the model "
            "with its tokenizer.json, or set data.template='radfm'"
        )
