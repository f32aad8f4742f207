"""A SentencePiece model with character offsets and positions at which a text may be cut."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

WORD_REACH = 16  # maximum number of tokens by which a cut moves to a word boundary
CACHED_WORDS = 100_000


class Tokenizer:
    """A SentencePiece model file, plus two image marks above its vocabulary."""

    pad_id = 0

    def __init__(self, path: Path | str, model: bytes | None = None):
        """Load the file, or its bytes `model`. Raises ValueError unless it has BOS, EOS and a dummy prefix."""
        try:
            model = Path(path).read_bytes() if model is None else model
        except OSError as error:
            raise ValueError(f"tokenizer {path} cannot be read ({error.strerror})") from error
        self.path, self._model = str(path), model
        spec = sentencepiece_model_pb2.ModelProto()
        try:
            spec.ParseFromString(model)
            self._words = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # protobuf and SentencePiece define their own exceptions
            raise ValueError(f"tokenizer {path} is not a SentencePiece model ({error})") from error
        if not spec.normalizer_spec.add_dummy_prefix:
            reason = "has no dummy prefix, so the first word of a text would be encoded differently"
            raise ValueError(f"tokenizer {path} {reason}")
        # `_words` starts every text as a word. `_continued` is the same model for text that continues a word.
        spec.normalizer_spec.add_dummy_prefix = False
        self._continued = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())
        self.fingerprint = hashlib.sha256(model).hexdigest()  # recorded in indexes and checkpoints
        self.vocab_size: int = self._words.vocab_size()  # V, the number of pieces of the model
        self.bos_id: int = self._words.bos_id()
        self.eos_id: int = self._words.eos_id()
        self.unk_id: int = self._words.unk_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"tokenizer {path} has no begin-of-text or no end-of-text token")
        self.image_id, self.image_end_id = self.vocab_size, self.vocab_size + 1  # before and after a scan's latents
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

    def __reduce__(self):
        return Tokenizer, (self.path, self._model)  # worker processes do not read the file again

    def encode(self, text: str, *, starts_word: bool = True) -> list[int]:
        """Encode a text without BOS and EOS. Marks and control pieces in it ("<image-1>", "</s>") are text.

        `starts_word`: encode as if a space came before. Raises ValueError if the text has a lone surrogate.
        """
        return self.encode_with_offsets(text, starts_word=starts_word)[0]

    def encode_with_offsets(self, text: str, *, starts_word: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a text. Returns ids and the character offsets [begin, end) of each piece.

        All pieces of a character that is encoded as bytes have the offsets of that character. The word-start mark has
        an empty range unless there is a space in the text.
        """
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
            reason = f"the tokenizer cannot encode this text: {text[:80]!r}"
            if surrogate := re.search("[\ud800-\udfff]", text):
                at = f"lone surrogate {surrogate[0]!r} at character {surrogate.start()}"
                reason = f"the text is not valid Unicode: {at}"
            raise ValueError(reason) from error
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
        """Return the piece of an id, such as "<s>"."""
        return self._words.id_to_piece(token)

    def continues_character(self, token: int) -> bool:
        """Return whether a piece is a byte, but not the first, of a character."""
        return self._continues[token]

    def word_after(self, ids: Sequence[int], position: int) -> int:
        """Return the next position where a text may begin: the start of a word if one is near, else of a character."""
        for i in range(position, min(position + WORD_REACH, len(ids))):
            if self._starts_word[ids[i]]:
                return i
        while position < len(ids) and self._continues[ids[position]]:
            position += 1
        return position

    def word_before(self, ids: Sequence[int], position: int) -> int:
        """Return the last position where a text may end: before a word if one is near, else before a character."""
        if position >= len(ids):
            return len(ids)
        for i in range(position, max(position - WORD_REACH, 0), -1):
            if self._starts_word[ids[i]]:
                return i
        while position > 0 and self._continues[ids[position]]:
            position -= 1
        return position
