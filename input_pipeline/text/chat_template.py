"""Chat templates: the text that a model expects around the messages of a conversation.

A template is rendered once for a sequence of roles, with a unique string in place of each content. The rendered text is
split at these strings. So the pieces of the template are encoded with special tokens, and contents as plain text:

    roles    user, assistant
    pieces   "<|im_start|>user\n"   "<|im_end|>\n<|im_start|>assistant\n"   "<|im_end|>\n"
    contents                     "Any edema?"                           "No."
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from input_pipeline.files import parse_json
from input_pipeline.text.tokenizer import CHAT_TEMPLATE, TOKENIZER_CONFIG

if TYPE_CHECKING:
    from input_pipeline.text.hugging_face import HuggingFaceTokenizer

# What templates that print the date print. The real date would change the tokens of a sample every day.
TODAY = datetime.datetime(2024, 7, 26)
REMEDY = "correct the template, or set data.template='radfm'"


@dataclasses.dataclass(frozen=True)
class Piece:
    """The tokens of a template between two contents."""

    ids: tuple[int, ...]
    end: int  # number of its first tokens that end the content before it, up to the first special token
    separator: str | None  # for Tokenizer.encode of the text after it


def template_source(path: str, files: Mapping[str, bytes]) -> tuple[str, str] | None:
    """Return the chat template in the files of a tokenizer and its name for messages, or None."""
    if CHAT_TEMPLATE in files:
        try:
            return files[CHAT_TEMPLATE].decode(), f"{path}: {CHAT_TEMPLATE}"
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {CHAT_TEMPLATE} is not UTF-8 text ({error})") from None
    config = parse_json(files.get(TOKENIZER_CONFIG, b"{}"), nan=True)
    source, where = config.get("chat_template"), f"{path}: `chat_template` of {TOKENIZER_CONFIG}"
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = next(iter(named.values())) if len(named) == 1 else named.get("default")
        if source is None:
            raise ValueError(f"{where} has the templates {', '.join(map(str, named))}: name one of them `default`")
    if source is not None and not isinstance(source, str):
        raise ValueError(f"{where} must be a text or a list of named texts, not {type(source).__name__}")
    return None if source is None else (source, where)


class ChatTemplate:
    """A chat template of a tokenizer. Raises ValueError if its syntax is wrong."""

    def __init__(self, source: str, where: str, tokenizer: HuggingFaceTokenizer):
        self._where, self._tokenizer = where, tokenizer
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": TODAY.strftime}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ValueError(f"{where} is not a valid template ({line}{error}): {REMEDY}") from None
        self._name = "content"
        while self._name in source:
            self._name += "x"
        self._pieces: dict[tuple[str, ...], tuple[Piece, ...]] = {}

    def texts(self, roles: Sequence[str]) -> list[str]:
        """Return the text before, between and after the contents of messages with these roles.

        Raises ValueError if the template rejects, drops, repeats or reorders a message.
        """
        marks = [f"{self._name}{i}e" for i in range(1, len(roles) + 1)]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        listed = ", ".join(roles)
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=False, tools=None, documents=None,
                **self._tokenizer.special_tokens,
            )  # fmt: skip
        except Exception as error:  # a template can raise any exception
            reason = str(error) or type(error).__name__
            raise ValueError(f"{self._where} fails for the roles {listed} ({reason}): {REMEDY}") from error
        problems = [
            f"{'drops' if not text.count(mark) else 'repeats'} message {i} ({role})"
            for i, (role, mark) in enumerate(zip(roles, marks, strict=True), 1)
            if text.count(mark) != 1
        ]
        positions = [text.find(mark) for mark in marks]
        if not problems and positions != sorted(positions):
            problems = ["changes the order of the messages"]
        if problems:
            raise ValueError(f"{self._where} {', '.join(problems)} for the roles {listed}: {REMEDY}")
        pieces = []
        for mark in marks:
            piece, _, text = text.partition(mark)
            pieces.append(piece)
        return [*pieces, text]

    def pieces(self, roles: Sequence[str]) -> tuple[Piece, ...]:
        """Return the pieces of a conversation as tokens: one before each content, and the last one.

        Raises ValueError as `texts` does, or if an answer does not end with a special token.
        """
        roles = tuple(roles)
        if roles not in self._pieces:
            self._pieces[roles] = tuple(self._encode(i, text, roles) for i, text in enumerate(self.texts(roles)))
        return self._pieces[roles]

    def _encode(self, i: int, text: str, roles: tuple[str, ...]) -> Piece:
        separator: str | None = None
        if i < len(roles):
            text, separator = self._tokenizer.separator_after(text)
        ids = self._tokenizer.encode_template(text, first=i == 0) if text else []
        end = next((n for n, token in enumerate(ids, 1) if self._tokenizer.is_special(token)), 0)
        if i and roles[i - 1] == "assistant" and not end:
            reason = "does not end an answer with a special token, so generation would not stop"
            raise ValueError(f"{self._where} {reason}: add the end token after the content of the assistant")
        return Piece(tuple(ids), end, separator)

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        last = self.pieces(("user", "assistant"))[-1]
        return last.ids[last.end - 1]


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}`, with which some templates mark answers. Its content is rendered."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
