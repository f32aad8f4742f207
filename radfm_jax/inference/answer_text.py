"""Tokens of an answer -> text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from input_pipeline.text.tokenizer import Tokenizer

# Of a character that is spelled in several tokens, the first ones alone decode to this.
HALF_A_CHARACTER = "\ufffd"


class AnswerText:
    """The text of an answer while it grows: all pieces joined are `text`.

    A piece never takes back what an earlier one said: what may still change (half a character, white space that may be
    the end, what may be the beginning of a stop text) is held back until it is decided.

    Attributes:
      ids: tokens of the answer; after a stop text, only as many as it took to write it.
      text: what was given out.
      stopped: whether a stop text came; it is no part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False

    def add(self, ids: Sequence[int]) -> str:
        """The next piece; "" if nothing is certain yet."""
        if self.stopped:
            return ""
        # Token by token, so that where an answer stops does not depend on how many came at a time.
        for token in ids if self._stop else ():
            self.ids.append(int(token))
            whole = self._tokenizer.decode(self.ids).lstrip()
            found = [at for at in map(whole.find, self._stop) if at >= 0]
            if found:
                self.stopped = True
                return self._said(whole[: min(found)].rstrip())
        if not self._stop:
            self.ids += [int(token) for token in ids]
            whole = self._tokenizer.decode(self.ids).lstrip()
        elif not len(ids):
            return ""
        certain = whole.rstrip(HALF_A_CHARACTER)
        certain = certain[: len(certain) - self._begun(certain)].rstrip()
        return self._said(certain)

    def finish(self) -> str:
        """The last piece, when no more tokens come."""
        if self.stopped:
            return ""
        return self._said(self._tokenizer.decode(self.ids).strip())

    def _said(self, text: str) -> str:
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _begun(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        most = max((len(stop) - 1 for stop in self._stop), default=0)
        for n in range(min(most, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stop):
                return n
        return 0
