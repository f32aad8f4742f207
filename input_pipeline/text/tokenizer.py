"""A SentencePiece model as the pipeline uses it: ids with character offsets, and where a text may be cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

# A cut moves to the nearest word, but not further than this many tokens.
WORD_REACH = 16
WORDS_KEPT = 100_000


class Tokenizer:
    """A SentencePiece model file, and two image marks above its vocabulary.

    Attributes:
      vocab_size: V, pieces of the model.
      bos_id, eos_id: as in the model (1 and 2 for LLaMA); pad_id is 0.
      image_id, image_end_id: V and V + 1, the marks before and after a scan's latents.
      fingerprint: SHA-256 of the model file, for indices and checkpoints.
    """

    pad_id = 0

    def __init__(self, path: Path | str):
        """Raises ValueError: no such file, no SentencePiece model, or one without BOS, EOS or a dummy prefix."""
        self.path = str(path)
        try:
            self._load(Path(path).read_bytes())
        except OSError as error:
            raise ValueError(f"tokenizer {path} cannot be read ({error.strerror})") from error

    def _load(self, model: bytes) -> None:
        spec = sentencepiece_model_pb2.ModelProto()
        try:
            spec.ParseFromString(model)
            self._words = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # protobuf and SentencePiece have exception classes of their own
            raise ValueError(f"tokenizer {self.path} is no SentencePiece model ({error})") from error
        if not spec.normalizer_spec.add_dummy_prefix:
            raise ValueError(f"tokenizer {self.path} has no dummy prefix: words at the start of a text look different")
        # The same model for text that continues without a space. Each text starts as a word in `_words`.
        spec.normalizer_spec.add_dummy_prefix = False
        self._continued = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())
        self._model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._words.vocab_size()
        self.bos_id: int = self._words.bos_id()
        self.eos_id: int = self._words.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"tokenizer {self.path} has no begin-of-text or no end-of-text token")
        self.image_id, self.image_end_id = self.vocab_size, self.vocab_size + 1
        pieces = [p.piece for p in spec.pieces]
        kinds = [p.type for p in spec.pieces]
        byte = sentencepiece_model_pb2.ModelProto.SentencePiece.BYTE
        control = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
        self._is_byte = [kind == byte for kind in kinds]
        self._is_control = [kind == control or i == self._words.unk_id() for i, kind in enumerate(kinds)]
        self._starts_word = [piece.startswith("▁") for piece in pieces]
        user_defined = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
        # Where no piece reaches over a space, words can be encoded one by one, and most have been seen before.
        self._by_word = (
            spec.normalizer_spec.name == "identity"
            and not spec.normalizer_spec.remove_extra_whitespaces
            and user_defined not in kinds
            and not any("▁" in piece.lstrip("▁") or (piece.startswith("▁▁") and piece.strip("▁")) for piece in pieces)
        )
        self._seen: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}
        # Bytes 80 to BF continue a UTF-8 character.
        self._continues = [b and 0x80 <= int(p[1:-1], 16) < 0xC0 for p, b in zip(pieces, self._is_byte, strict=True)]

    def __reduce__(self):
        return _unpickle, (self.path, self._model)  # workers do not read the file again

    def encode(self, text: str, *, starts_word: bool = True) -> list[int]:
        """Ids of a text, without BOS and EOS. Marks and control pieces written in it ("<image-1>", "</s>") are text.

        Args:
          starts_word: whether the first piece is marked as the start of a word, as if a space stood before it.
        Raises:
          ValueError: a text that is not valid Unicode (a lone surrogate).
        """
        return self.encode_with_offsets(text, starts_word=starts_word)[0]

    def encode_with_offsets(self, text: str, *, starts_word: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters [begin, end) of the text that each stands for.

        The pieces of a character that is spelled in bytes all stand for that character. The mark of a word's start
        belongs to no character where there is no space in the text.
        """
        if not self._by_word or not text or "  " in text or "▁" in text or text[0] == " " or text[-1] == " ":
            return self._encode(self._words if starts_word else self._continued, text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for k, word in enumerate(text.split(" ")):
            if k or starts_word:
                found = self._seen.get(word)
                if found is None:
                    if len(self._seen) >= WORDS_KEPT:
                        self._seen.clear()
                    found = self._seen[word] = self._encode(self._words, word)
            else:
                found = self._encode(self._continued, word)
            ids += found[0]
            first = len(offsets)
            offsets += [(begin + at, end + at) for begin, end in found[1]]
            if k:  # the space is the mark of the word's start
                offsets[first] = (at - 1, offsets[first][1])
            at += len(word) + 1
        return ids, offsets

    def _encode(self, model, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            result = model.encode(text, return_type="offset_mapping")
        except (RuntimeError, TypeError, UnicodeError) as error:
            raise _not_unicode(text) from error
        ids, offsets = result["ids"], result["offsets"]
        for i, token in enumerate(ids):
            begin, end = offsets[i]
            if begin == end and self._is_byte[token]:
                offsets[i] = (begin, begin + 1)
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; BOS, EOS, unknown pieces, and everything from V on have none."""
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._words.decode([i for i in kept if not self._is_control[i]])

    def continues_character(self, token: int) -> bool:
        """Whether a piece is a later byte of a character that is spelled in bytes."""
        return self._continues[token]

    def starts_word(self, token: int) -> bool:
        """Whether a piece begins with the mark of a word's start."""
        return self._starts_word[token]

    def word_after(self, ids: Sequence[int], at: int) -> int:
        """The first position from `at` on where a text may begin: a word, if one is near, or else a character."""
        for i in range(at, min(at + WORD_REACH, len(ids))):
            if self._starts_word[ids[i]]:
                return i
        while at < len(ids) and self._continues[ids[at]]:
            at += 1
        return at

    def word_before(self, ids: Sequence[int], at: int) -> int:
        """The last position up to `at` where a text may end: before a word, if one is near, or else a character."""
        if at >= len(ids):
            return len(ids)
        for i in range(at, max(at - WORD_REACH, 0), -1):
            if self._starts_word[ids[i]]:
                return i
        while at > 0 and self._continues[ids[at]]:
            at -= 1
        return at


def _unpickle(path: str, model: bytes) -> Tokenizer:
    tokenizer = Tokenizer.__new__(Tokenizer)
    tokenizer.path = path
    tokenizer._load(model)
    return tokenizer


def _not_unicode(text: str) -> ValueError:
    where = next((i for i, c in enumerate(text) if 0xD800 <= ord(c) < 0xE000), None)
    if where is None:
        return ValueError(f"the tokenizer cannot encode this text: {text[:80]!r}")
    return ValueError(f"the text is not valid Unicode: lone surrogate {text[where]!r} at character {where}")
