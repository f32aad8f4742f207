"""The tokenizer interface, and `load_tokenizer`, which opens SentencePiece models and Hugging Face tokenizers."""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from input_pipeline.text.chat_template import ChatTemplate

SENTENCEPIECE, HUGGING_FACE = "tokenizer.model", "tokenizer.json"
CHAT_TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
GENERATION_CONFIG, SPECIAL_TOKENS = "generation_config.json", "special_tokens_map.json"
# The files of a Hugging Face tokenizer. All but the first are optional.
HUGGING_FACE_FILES = (HUGGING_FACE, TOKENIZER_CONFIG, CHAT_TEMPLATE, GENERATION_CONFIG, SPECIAL_TOKENS)

WORD_REACH = 16  # maximum number of tokens by which a cut moves to a word boundary
INCOMPLETE_CHARACTER = "\ufffd"  # what the bytes of a part of a character decode to


class Tokenizer(abc.ABC):
    """Text to ids and back, plus two image marks above the vocabulary of the model.

    Letters: V ids of the model's vocabulary. A tokenizer may have fewer: the embeddings of many models are padded.
    """

    kind: ClassVar[str]  # name of the format, for messages
    path: str  # the file or folder, for messages
    files: Mapping[str, bytes]  # what `load_tokenizer` needs to make this tokenizer again; stored in checkpoints
    fingerprint: str  # SHA-256 of everything that changes the behaviour; recorded in indexes and checkpoints
    size: int  # number of ids that the tokenizer knows
    vocab_size: int  # V
    bos_id: int | None  # begins every text; None if the model has no such token
    eos_id: int  # ends every answer in the form `radfm`
    stop_ids: tuple[int, ...]  # tokens that end a generated answer, `eos_id` first
    pad_id: int
    unk_id: int | None  # stands for text that is not in the vocabulary; None if every text is

    @property
    def image_id(self) -> int:
        """The mark before the latents of a scan."""
        return self.vocab_size

    @property
    def image_end_id(self) -> int:
        """The mark after the latents of a scan."""
        return self.vocab_size + 1

    def __reduce__(self):
        return _load_again, (self.path, dict(self.files), self.vocab_size)  # workers do not read the files again

    def encode(self, text: str, *, separator: str | None = None) -> list[int]:
        """Encode a text without BOS and EOS. Image marks and special tokens in it ("<image-1>", "</s>") are text.

        Args:
          separator: white space between the text before and this text, "" or spaces. None: no text comes before,
            because this is the beginning or follows a scan.
        Raises:
          ValueError: the text has a lone surrogate.
        """
        return self.encode_with_offsets(text, separator=separator)[0]

    @abc.abstractmethod
    def encode_with_offsets(
        self, text: str, *, separator: str | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a text. Returns ids and the character range [begin, end) of each token in the text.

        All tokens of a character that is encoded as bytes have the range of that character. A token that only stands
        for white space before the text has an empty range.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids. Special tokens, unknown tokens, and ids that the tokenizer does not know give no text."""

    def decode_complete(self, ids: Sequence[int]) -> str:
        """Decode the beginning of a text without an incomplete character at its end. More ids never change the result.

        So an answer can be shown while it is generated.
        """
        return self.decode(ids).rstrip(INCOMPLETE_CHARACTER)

    @abc.abstractmethod
    def piece(self, token: int) -> str:
        """Return an id as it is written in the vocabulary, such as "<s>"; "" for an unknown id."""

    @abc.abstractmethod
    def is_special(self, token: int) -> bool:
        """Return whether an id is a special token, which no text of a user encodes to."""

    @abc.abstractmethod
    def continues_character(self, token: int) -> bool:
        """Return whether a token begins inside a character."""

    @abc.abstractmethod
    def starts_word(self, ids: Sequence[int], position: int) -> bool:
        """Return whether a word begins with the token at a position."""

    @property
    @abc.abstractmethod
    def chat(self) -> ChatTemplate:
        """The chat template. Raises ValueError if there is none, or if it is invalid."""

    def word_after(self, ids: Sequence[int], position: int) -> int:
        """Return the next position where a text may begin: the start of a word if one is near, else of a character."""
        for i in range(position, min(position + WORD_REACH, len(ids))):
            if self.starts_word(ids, i):
                return i
        while position < len(ids) and self.continues_character(ids[position]):
            position += 1
        return position

    def word_before(self, ids: Sequence[int], position: int) -> int:
        """Return the last position where a text may end: before a word if one is near, else before a character."""
        if position >= len(ids):
            return len(ids)
        for i in range(position, max(position - WORD_REACH, 0), -1):
            if self.starts_word(ids, i):
                return i
        while position > 0 and self.continues_character(ids[position]):
            position -= 1
        return position


def load_tokenizer(
    path: Path | str, *, files: Mapping[str, bytes] | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """Open a tokenizer.

        load_tokenizer("tokenizer.model")            a SentencePiece model
        load_tokenizer("Qwen3-8B/tokenizer.json")    Hugging Face, with the other HUGGING_FACE_FILES of its folder
        load_tokenizer("Qwen3-8B")                   a folder: tokenizer.json, or tokenizer.model if there is none

    Args:
      files: `Tokenizer.files`, instead of reading them; `path` is then only a name for messages.
      vocab_size: V, the number of ids of the model; None: that of the tokenizer. A Hugging Face tokenizer may have
        fewer. A SentencePiece model must have as many.
    Raises:
      ValueError: a file cannot be read or is invalid, there is no end token, or the tokenizer has more ids than the
        model.
    """
    files = read_tokenizer_files(path) if files is None else files
    if HUGGING_FACE in files:
        from input_pipeline.text.hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer(str(path), files, vocab_size)
    from input_pipeline.text.sentencepiece_model import SentencePieceTokenizer

    return SentencePieceTokenizer(str(path), files, vocab_size)


def _load_again(path: str, files: Mapping[str, bytes], vocab_size: int) -> Tokenizer:
    return load_tokenizer(path, files=files, vocab_size=vocab_size)


def read_tokenizer_files(path: Path | str) -> dict[str, bytes]:
    """Return {name: content} of the files of a tokenizer. Raises ValueError if there are none or one is unreadable."""
    path = Path(path)
    if path.is_dir():
        if not (path / HUGGING_FACE).is_file() and not (path / SENTENCEPIECE).is_file():
            raise ValueError(
                f"tokenizer {path} has neither {HUGGING_FACE} nor {SENTENCEPIECE}: pass a folder or a file with one"
            )
        path /= HUGGING_FACE if (path / HUGGING_FACE).is_file() else SENTENCEPIECE
    if path.suffix != ".json":
        return {SENTENCEPIECE: _read(path)}
    others = (path.with_name(name) for name in HUGGING_FACE_FILES[1:])
    return {HUGGING_FACE: _read(path)} | {file.name: _read(file) for file in others if file.is_file()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer {path} cannot be read ({error.strerror})") from error


def encoding_error(text: str) -> ValueError:
    """Return the error for a text that cannot be encoded."""
    reason = f"the tokenizer cannot encode this text: {text[:80]!r}"
    if surrogate := re.search("[\ud800-\udfff]", text):
        at = f"lone surrogate {surrogate[0]!r} at character {surrogate.start()}"
        reason = f"the text is not valid Unicode: {at}"
    return ValueError(reason)
