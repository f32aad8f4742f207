"""Tokens of an answer -> text, incrementally."""

from __future__ import annotations

from collections.abc import Sequence

from input_pipeline.text.tokenizer import Tokenizer


class AnswerText:
    """The text of an answer while it is generated; the pieces concatenate to `text`.

    Text is emitted only when later tokens cannot change it: an incomplete character, trailing white space and a
    possible start of a stop text are kept back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self.ids: list[int] = []  # tokens of the answer; after a stop text, only those needed to write it
        self.text = ""  # emitted so far
        self.stopped = False  # whether a stop text occurred, which is not part of `text`

    def add(self, ids: Sequence[int]) -> str:
        """Add tokens and return the next piece of text, which may be empty."""
        if self.stopped or not len(ids):
            return ""
        # With stop texts, decode token by token: the end must not depend on the chunk size.
        for chunk in ([token] for token in ids) if self._stop else (ids,):
            self.ids += map(int, chunk)
            decoded = self._tokenizer.decode(self.ids).lstrip() if self._stop else ""
            starts = [start for start in map(decoded.find, self._stop) if start >= 0]
            if starts:
                self.stopped = True
                return self._emit(decoded[: min(starts)].rstrip())
        final = self._tokenizer.decode_complete(self.ids).lstrip()
        return self._emit(final[: len(final) - self._partial_stop(final)].rstrip())

    def finish(self) -> str:
        """Return the remaining text after the last token."""
        return "" if self.stopped else self._emit(self._tokenizer.decode(self.ids).strip())

    def _emit(self, text: str) -> str:
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _partial_stop(self, text: str) -> int:
        """Return the number of characters at the end of `text` that may start a stop text."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
