"""Tokenizers of Hugging Face: tokenizer.json, with the special tokens and the chat template next to it.

tokenizer.json contains a byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) or a SentencePiece-style vocabulary (Llama 2,
Mistral, Gemma, Phi-3). The latter may put a word-start mark before a text, and then a text that continues another one
needs the same tokenizer without this mark.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from input_pipeline.files import parse_json
from input_pipeline.text.chat_template import ChatTemplate, template_source
from input_pipeline.text.tokenizer import (
    GENERATION_CONFIG,
    HUGGING_FACE,
    HUGGING_FACE_FILES,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    Tokenizer,
    encoding_error,
)

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")  # the special tokens that templates may use
MORE = ("additional_special_tokens", "extra_special_tokens")  # lists of other special tokens
_WHITE_SPACE = frozenset(b" \t\n\r")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json. Raises ValueError if it is invalid, has no end token, or has more ids than the model."""

    kind = "Hugging Face tokenizer"

    def __init__(self, path: str, files: Mapping[str, bytes], vocab_size: int | None = None):
        self.path, self.files = path, {name: files[name] for name in HUGGING_FACE_FILES if name in files}
        config = self._json(TOKENIZER_CONFIG)
        self._named = self._json(SPECIAL_TOKENS) | {name: config[name] for name in (*NAMES, *MORE) if name in config}
        spec, self._text = self._marked_spec()
        try:
            self._initial = self._continued = _opened(self._text)
        except Exception as error:  # the library raises bare exceptions
            raise ValueError(f"tokenizer {path}: {HUGGING_FACE} is invalid ({error})") from error
        if (without := _without_prefix(spec)) != spec:
            self._continued = _opened(json.dumps(without))
        self._pieces = {token: piece for piece, token in self._initial.get_vocab(with_added_tokens=True).items()}
        self._added = self._initial.get_added_tokens_decoder()
        self._special = frozenset(token for token, added in self._added.items() if added.special)
        self.size = 1 + max(self._pieces, default=-1)
        self._set_special_tokens()
        self.vocab_size = self._model_size(vocab_size)
        self._tabulate(_types(spec, "ByteLevel"))

    # --- special tokens -----------------------------------------------------------------------------------------------

    def _json(self, name: str) -> dict:
        """Return the content of one of the JSON files; {} without it."""
        try:
            value = parse_json(self.files.get(name, b"{}"), nan=True)
        except ValueError as error:
            raise ValueError(f"tokenizer {self.path}: {name} is not JSON ({error})") from None
        if not isinstance(value, dict):
            raise ValueError(f"tokenizer {self.path}: {name} must be an object")
        return value

    def _marked_spec(self) -> tuple[dict, str]:
        """Return tokenizer.json with all tokens that the configs name marked as special, as an object and as text."""
        try:
            text = self.files[HUGGING_FACE].decode()
            spec = json.loads(text)  # without the checks of `parse_json`, which take seconds for a large vocabulary
            added = spec.get("added_tokens", [])
            before = [token["special"] for token in added]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"tokenizer {self.path}: {HUGGING_FACE} is invalid ({error!r})") from None
        named, ends = [self._named.get(name) for name in NAMES], self._end_ids()
        for more in map(self._named.get, MORE):
            named += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
        contents = [_content(token) for token in named]
        for token in added:
            token["special"] |= token.get("content") in contents or token.get("id") in ends
        return spec, text if before == [token["special"] for token in added] else json.dumps(spec)

    def _end_ids(self) -> list:
        ends = self._json(GENERATION_CONFIG).get("eos_token_id")
        return [] if ends is None else ends if isinstance(ends, list) else [ends]

    def _set_special_tokens(self) -> None:
        self.special_tokens: dict[str, str] = {}
        for name in NAMES:
            if (token := _content(self._named.get(name))) is None:
                continue
            if not isinstance(token, str) or self._initial.token_to_id(token) is None:
                reason = f"`{name}` of {TOKENIZER_CONFIG} is {token!r}, which is not in its vocabulary"
                raise ValueError(f"tokenizer {self.path}: {reason}: correct `{name}`")
            self.special_tokens[name] = token
        own = {name: self._initial.token_to_id(token) for name, token in self.special_tokens.items()}
        ends = self._end_ids()
        if bad := [i for i in ends if type(i) is not int or i not in self._pieces]:
            reason = f"`eos_token_id` of {GENERATION_CONFIG} contains {bad[0]!r}, which is not in its vocabulary"
            raise ValueError(f"tokenizer {self.path}: {reason}: correct `eos_token_id`")
        stops = list(dict.fromkeys([own["eos_token"]] if "eos_token" in own else []) | dict.fromkeys(ends))
        if not stops:
            raise ValueError(
                f"tokenizer {self.path} has no end-of-text token: set `eos_token` in {TOKENIZER_CONFIG} next to "
                f"{HUGGING_FACE}"
            )
        self.stop_ids, self.eos_id = tuple(stops), stops[0]
        self.pad_id, self.unk_id = own.get("pad_token", self.eos_id), own.get("unk_token")
        # BOS counts only if the model sees it before every text. Many tokenizers name one and never use it.
        begin, plain = (self._initial.encode("a", add_special_tokens=special).ids[0] for special in (True, False))
        self.bos_id = begin if begin != plain else own.get("bos_token")
        if not self._json(TOKENIZER_CONFIG).get("add_bos_token", begin != plain):
            self.bos_id = None

    def _model_size(self, vocab_size: int | None) -> int:
        """Return V. Special tokens may be above it, because only a chat template could use them."""
        if vocab_size is None:
            return self.size
        used = {*self.stop_ids} | ({self.bos_id} - {None})
        size = 1 + max(token for token in self._pieces if token not in self._special or token in used)
        if size > vocab_size:
            raise ValueError(
                f"tokenizer {self.path} has {size} ids, but the model has {vocab_size} (model.llama.vocab_size): "
                "pass the tokenizer of the model"
            )
        return vocab_size

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of tokenizer.json, the ids of the special tokens and the chat template."""
        source = template_source(self.path, self.files)
        ids = [self.bos_id, self.eos_id, *self.stop_ids, self.pad_id]
        digest = hashlib.sha256(self.files[HUGGING_FACE])
        digest.update(json.dumps([ids, self.special_tokens, source and source[0]]).encode())
        return digest.hexdigest()

    # --- texts --------------------------------------------------------------------------------------------------------

    def encode_with_offsets(
        self, text: str, *, separator: str | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        if separator is None:
            return _encode(self._initial, text)
        ids, offsets = _encode(self._continued, separator + text)
        n = len(separator)
        return ids, [(max(begin - n, 0), max(end - n, 0)) for begin, end in offsets] if n else offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self._initial.decode([int(i) for i in ids if i in self._pieces and not self.is_special(i)])

    def piece(self, token: int) -> str:
        return self._pieces.get(token, "")

    def is_special(self, token: int) -> bool:
        return token in self._special or token in self.stop_ids

    def _tabulate(self, byte_level: bool) -> None:
        """Find the ids that begin inside a character, start with white space, or end a line."""
        self._continues, self._starts, self._ends_line = (bytearray(self.size) for _ in range(3))
        for token, piece in self._pieces.items():
            if token in self._added or not piece:
                first, last = ord(piece[:1] or "x"), ord(piece[-1:] or "x")
                continues = False
            elif byte_level:
                first, last = _BYTES.get(piece[0], 0), _BYTES.get(piece[-1], 0)
                continues = 0x80 <= first < 0xC0
            else:
                is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
                first = last = int(piece[3:5], 16) if is_byte else 0
                continues = 0x80 <= first < 0xC0
                if not is_byte:
                    first, last = (ord(" ") if c == "▁" else ord(c) for c in (piece[0], piece[-1]))
            self._continues[token], self._ends_line[token] = continues, last == ord("\n")
            self._starts[token] = first in _WHITE_SPACE

    def continues_character(self, token: int) -> bool:
        return bool(self._continues[token]) if 0 <= token < self.size else False

    def starts_word(self, ids: Sequence[int], position: int) -> bool:
        own, before = ids[position], ids[position - 1] if position else -1
        return bool((own < self.size and self._starts[own]) or (0 <= before < self.size and self._ends_line[before]))

    # --- chat templates -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def chat(self) -> ChatTemplate:
        source = template_source(self.path, self.files)
        if source is None:
            raise ValueError(
                f"tokenizer {self.path} has no chat template: add chat_template.jinja, or `chat_template` in "
                f"{TOKENIZER_CONFIG}, or set data.template='radfm'"
            )
        return ChatTemplate(*source, self)

    @functools.cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """The tokenizer that parses special tokens."""
        parsing = _opened(self._text)
        parsing.encode_special_tokens = False
        return parsing

    def encode_template(self, piece: str, *, first: bool) -> list[int]:
        """Encode a piece of a chat template, in which special tokens are parsed. `first`: it begins the text."""
        encoding = self._parsing.encode(piece, add_special_tokens=False)
        ids = encoding.ids
        if not first:  # up to the first special token, the piece continues the text before it
            begin = next((b for i, (b, _) in zip(ids, encoding.offsets, strict=True) if i in self._special), len(piece))
            ids = _encode(self._continued, piece[:begin])[0]
            ids = ids + self._parsing.encode(piece[begin:], add_special_tokens=False).ids
        if beyond := [self._pieces[i] for i in ids if i >= self.vocab_size]:
            reason = f"the chat template uses {beyond[0]!r}, which is above the {self.vocab_size} ids of the model"
            raise ValueError(f"tokenizer {self.path}: {reason}: pass the tokenizer of the model")
        return ids

    def separator_after(self, piece: str) -> tuple[str, str | None]:
        """Split a piece of a chat template into the piece to encode, and the `separator` of the text after it.

        Spaces at its end belong to the first word of that text, unless the special token before them absorbs them.
        """
        kept = piece.rstrip(" ")
        spaces = piece[len(kept) :]
        ids = self._parsing.encode(kept, add_special_tokens=False).ids
        if not kept or (ids and ids[-1] in self._special):
            absorbs = bool(ids) and self._added[ids[-1]].rstrip
            if absorbs or not spaces:
                return kept, None if self._prefixes_sections or not kept else ""
        return kept, spaces

    @functools.cached_property
    def _prefixes_sections(self) -> bool:
        """Whether the text after a special token gets a word-start mark, as the beginning of a text does."""
        special = next(iter(self._added[token].content for token in self._special), None)
        if special is None:
            return False
        return self._parsing.encode(special + "a", add_special_tokens=False).ids[1:] == self.encode("a")


def _opened(text: str) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json, for which special tokens are text."""
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _content(token: Any) -> Any:
    """Return the text of a token in a config, which may be an object with more fields."""
    return token.get("content") if isinstance(token, dict) else token


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises bare exceptions
        raise encoding_error(text) from error
    return encoding.ids, encoding.offsets


def _without_prefix(spec: Any) -> Any:
    """Return a tokenizer's description without the white space that it puts before a text."""
    if isinstance(spec, list):
        return [_without_prefix(x) for x in spec if not (isinstance(x, dict) and x.get("type") == "Prepend")]
    if not isinstance(spec, dict):
        return spec
    plain = dict(spec)
    if plain.get("type") == "Metaspace":
        plain["prepend_scheme"] = "never"
    if plain.get("add_prefix_space"):  # of ByteLevel, and of Metaspace in older files
        plain["add_prefix_space"] = False
    parts = ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers")
    plain |= {name: _without_prefix(plain[name]) for name in parts if name in plain}
    if isinstance(plain.get("normalizer"), dict) and plain["normalizer"].get("type") == "Prepend":
        plain["normalizer"] = None
    return plain


def _types(spec: dict, kind: str) -> bool:
    """Return whether a tokenizer's description contains a pre-tokenizer or a decoder of a type."""
    parts = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer"), spec.get("decoder")])
    return f'"type": "{kind}"' in parts


def _byte_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTES = _byte_characters()
