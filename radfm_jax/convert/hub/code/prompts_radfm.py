"""Prompts -> token ids, in the layout of the training of the model. It needs tokenizers and sentencepiece, not PyTorch.

A part of a prompt is (role, text) or (role, number of a scan). Letters: V vocabulary, L visual tokens of a scan.
"""

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from .scans_radfm import require

MARK, MARK_LIKE = re.compile(r"<image-([0-9]+)>"), re.compile(r"<\s*+image[\s_-]*+[0-9]*+\s*+>", re.IGNORECASE)
CLOSING = re.compile(r"[)\]},;?!%]|[.:](?!\d)")
TODAY = datetime.datetime(2024, 7, 26)  # what chat templates print as the date, as in training
IMAGE_KEYS = {"type", "image", "path", "url", "window"}  # of an image in a message
Part = tuple[str, str | int]


class Texts:
    """Texts -> ids. Special tokens in the text of a user are text; those of a chat template are parsed.

    A separator is the white space between the text before and this text; None: a scan, a special token or nothing.
    """

    def __init__(self, tokenizer: Any, file: str, stop_ids: Sequence[int]):
        self.tokenizer = tokenizer
        if file.endswith(".model"):  # transformers' conversion encodes white space in another way
            path = getattr(tokenizer, "vocab_file", None)
            require(path and Path(path).is_file(), f"the folder lacks {file}", "export it again")
            model = sentencepiece_model_pb2.ModelProto.FromString(Path(path).read_bytes())
            self.start = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString()).encode
            model.normalizer_spec.add_dummy_prefix = False
            self.after = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString()).encode
            self.encode = lambda text, separator=None: (self.after if separator == "" else self.start)(text)
            return
        spec = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        for token in spec["added_tokens"]:
            token["special"] |= token["content"] in tokenizer.all_special_tokens or token["id"] in stop_ids
        self.special = [token for token in spec["added_tokens"] if token["special"]]
        self.special_ids = {token["id"] for token in self.special}
        self.start, self.after = encoder(spec), encoder(without_prefix(spec))
        self.parse = encoder(spec, parse=True)

    def encode(self, text: str, separator: str | None = None) -> list[int]:
        return self.start(text) if separator is None else self.after(separator + text)

    def pieces(self, roles: list[str]) -> list[tuple[list[int], str | None]]:
        """Return the ids of the chat template before each content, and the separator of that content."""
        marks = [f"content{i}of{len(roles)}" for i in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        text, pieces = self.tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=TODAY.strftime), []
        for i, mark in enumerate(marks):
            require(text.count(mark) == 1, f"the chat template drops or repeats message {i + 1}", "use other roles")
            piece, _, text = text.partition(mark)
            pieces.append(self.template_piece(piece, first=i == 0))
        return pieces

    def template_piece(self, text: str, first: bool) -> tuple[list[int], str | None]:
        kept, separator = text.rstrip(" "), text[len(text.rstrip(" ")) :]
        ids = self.parse(kept)
        last = next((token for token in self.special if ids and ids[-1] == token["id"]), None)
        if not kept or last:  # spaces belong to the content, unless the special token absorbs them
            begins = self.special and self.parse(self.special[0]["content"] + "a")[1:] == self.start("a")
            if (last and last["rstrip"]) or not separator:
                separator = None if begins or not kept else ""
        if not first and ids and ids[0] not in self.special_ids:  # it continues the content before it
            starts = [kept.find(token["content"]) for token in self.special if token["content"] in kept]
            cut = min(starts, default=len(kept))
            ids = self.after(kept[:cut]) + self.parse(kept[cut:])
        return ids, separator


def encoder(spec: dict, parse: bool = False) -> Any:
    """Return the function text -> ids of a tokenizer.json. parse: special tokens are parsed."""
    own = tokenizers.Tokenizer.from_str(json.dumps(spec))
    own.encode_special_tokens = not parse
    return lambda text: own.encode(text, add_special_tokens=False).ids


def without_prefix(spec: Any) -> Any:
    """Return a tokenizer.json without the white space that it puts before a text."""
    if isinstance(spec, list):
        return [without_prefix(x) for x in spec if not (isinstance(x, dict) and x.get("type") == "Prepend")]
    if not isinstance(spec, dict):
        return spec
    changes = {"prepend_scheme": "never"} if spec.get("type") == "Metaspace" else {}
    changes |= {"add_prefix_space": False} if spec.get("add_prefix_space") else {}
    nested = ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers")
    plain = {**spec, **changes} | {name: without_prefix(spec[name]) for name in nested if name in spec}
    first = plain.get("normalizer")
    return plain | {"normalizer": None} if isinstance(first, dict) and first.get("type") == "Prepend" else plain


def clean(text: str) -> str:
    return text.replace("\r\n", "\n").strip()


def separator(left: str | None, right: str) -> str:
    """Return the white space between a text (None: a scan or the beginning) and the next text."""
    if left is not None:
        space = left[len(left.rstrip()) :] + right[: len(right) - len(right.lstrip())]
        if lines := space.replace("\r\n", "\n").count("\n"):
            return "\n" * lines
        if left.rstrip().endswith(("(", "[", "{")):
            return ""
    return "" if CLOSING.match(right.lstrip()) else " "


def place_scans(texts: list[str], scans: int, place: str) -> list[list[str | int]]:
    """Split texts at marks: ["Was <image-2>.", "And <image-1>?"] -> [["Was ", 1, "."], ["And ", 0, "?"]].

    Without marks all scans are before the first text, or with place "last" after the last one.
    """
    wrong = [mark for text in texts for mark in MARK_LIKE.findall(text) if not MARK.fullmatch(mark)]
    require(not wrong, f"{', '.join(wrong)} is not a valid mark", "write <image-1>")
    split = [[int(s) - 1 if i % 2 else s for i, s in enumerate(MARK.split(text))] for text in texts]
    split = [[piece for piece in pieces if piece != ""] for pieces in split]
    used = {piece for pieces in split for piece in pieces if isinstance(piece, int)}
    if not used and place == "first":
        split[0] = [*range(scans), *split[0]]
    elif not used:
        split[-1] += range(scans)
    require(not used or used == {*range(scans)}, f"the marks do not fit {scans} scans", "use <image-1>, <image-2>, ...")
    return split


def prompt_parts(
    prompt: str, scans: int, template: str, context="", place="first", system="", history=()
) -> list[Part]:
    """Return texts and scans in reading order, with the roles system, context, instruction and response."""
    written = all(isinstance(text, str) for text in (prompt, context, system))
    require(written, "the prompt, `context` or `system` is not a text", "pass one text for all questions")
    pairs = all(isinstance(turn, (list, tuple)) and [*map(type, turn)] == [str, str] for turn in history)
    require(pairs, "`history` is not a list of (question, answer)", "use apply_chat_template for messages")
    prompt, context = clean(prompt), clean(context)
    require(prompt and place in ("first", "last"), "the prompt is empty, or `place` is not first or last", "correct it")
    turns = [(clean(question), clean(answer)) for question, answer in history]
    if template == "radfm":
        context, turns = clean("\n".join([context, *map(" ".join, turns)])), []
    placed = place_scans([context, *(question for question, _ in turns), prompt], scans, place)
    parts: list[Part] = [("system", system)]
    for i, (pieces, answer) in enumerate(zip(placed, [None, *(answer for _, answer in turns), None], strict=True)):
        parts += [("instruction" if i else "context", piece) for piece in pieces]
        parts += [("response", answer)] if answer else []
    parts = [(role, part) for role, part in parts if isinstance(part, int) or part.strip()]
    require(any(isinstance(part, str) for _, part in parts), "the prompt has scans but no text", "write a question")
    return parts


def neighbours(parts: list[Part], i: int) -> tuple[str | None, str | None]:
    """Return the roles of the texts before and after a scan."""
    before = next((role for role, part in reversed(parts[:i]) if isinstance(part, str)), None)
    return before, next((role for role, part in parts[i + 1 :] if isinstance(part, str)), None)


def prompt_ids(parts: list[Part], mark: list[int], texts: Texts, preparation: dict, bos: int | None) -> list[int]:
    """Return the ids of a prompt. Each scan becomes the ids `mark`."""
    if preparation["preprocess"] == "released":
        return released_ids(parts, mark, texts, bos)
    if preparation["template"] == "radfm":
        return radfm_ids(parts, mark, texts, bos)
    if parts[0][0] == "rendered":
        return rendered_ids([part for _, part in parts], mark, texts)
    return chat_ids(parts, mark, texts)


def radfm_ids(parts: list[Part], mark: list[int], texts: Texts, bos: int | None) -> list[int]:
    """Return BOS, texts with the white space between them, and `mark` for every scan."""
    ids, left = [] if bos is None else [bos], None
    for (_, part), (_, following) in zip(parts, [*parts[1:], ("", None)], strict=True):
        if isinstance(part, int):
            ids, left = ids + mark, None
            continue
        space = separator(left, part)
        before = None if left is None and space else space if space == " " else ""
        lines = "" if isinstance(following, int) else separator(part, following or "x")
        ids, left = ids + texts.encode(part.strip() + lines.strip(" "), before), part
    return ids


def chat_ids(parts: list[Part], mark: list[int], texts: Texts) -> list[int]:
    """Return the ids in the chat template of the tokenizer, up to the answer."""
    messages: list[tuple[str, list]] = []
    for i, (role, part) in enumerate(parts):
        if isinstance(part, int):  # a scan between two texts of an answer belongs to the answer
            role = "response" if neighbours(parts, i) == ("response", "response") else "instruction"
        role = {"system": "system", "response": "assistant"}.get(role, "user")
        if not messages or messages[-1][0] != role:
            messages.append((role, []))
        messages[-1][1].append(part)
    messages.append(("assistant", []))
    ids: list[int] = []
    for (_, content), (piece, before) in zip(messages, texts.pieces([r for r, _ in messages]), strict=True):
        ids += piece
        for part, following in zip(content, [*content[1:], None], strict=False):
            if isinstance(part, int):
                ids, before = ids + mark, None
                continue
            space = separator(part, following) if isinstance(following, str) else ""
            lines, space = (space, "") if "\n" in space else ("", space)
            ids, before = ids + texts.encode(part.strip() + lines, before), space
    return ids


def rendered_ids(pieces: list[str | int], mark: list[int], texts: Texts) -> list[int]:
    """Return the ids of a rendered chat template with marks. Its special tokens are parsed."""
    pieces = [piece.lstrip() if i and isinstance(piece, str) else piece for i, piece in enumerate(pieces)]
    return [token for piece in pieces for token in (mark if isinstance(piece, int) else texts.parse(piece))]


def released_ids(parts: list[Part], mark: list[int], texts: Texts, bos: int) -> list[int]:
    """Return the ids as the released code: a scan at the end of the text is before its last character."""
    text, scans = "", []
    for i, (_, part) in enumerate(parts):
        if isinstance(part, int):
            before, after = neighbours(parts, i)
            text = text.rstrip()
            scans.append(len(text) if before == after is not None else max(len(text) - 1, 0))
        else:
            text = text.rstrip() + separator(text, part) + part.lstrip() if text else part
    segments, start = [], 0
    for position in sorted(scans):
        segments += [text[start:position]] if position > start else []
        start = max(start, position)
        segments.append(None)
    segments += [text[start:]] if text[start:] else []
    ids = [bos]
    for i, segment in enumerate(segments):
        if segment is not None:
            segment = segment.lstrip() if i else segment
            segment = segment.rstrip() if i + 1 < len(segments) else segment
        ids += mark if segment is None else texts.encode(segment)
    return ids


def question_of(messages: list[dict]) -> tuple[str, list, str, list[tuple[str, str]]]:
    """Return the last question, the scans, the system text and the earlier (question, answer) of messages."""
    scans, system, turns = [], "", []
    for message in messages:
        text, content = "", message.get("content")
        for item in content if isinstance(content, (list, tuple)) else [{"type": "text", "text": content}]:
            if (kind := item.get("type")) == "image":
                require(message["role"] != "system", "a system message has a scan", "move it to a question")
                wrong = {key for key, value in item.items() if value is not None} - IMAGE_KEYS
                require(not wrong, f"an image of a message has the key {', '.join(wrong)}", "use image and window")
                keys = [key for key in ("image", "path", "url") if item.get(key) is not None]
                require(keys, "an image of a message has no scan", 'write {"type": "image", "image": ...}')
                scans.append({"image": item[keys[0]], "window": item.get("window")})
                text += f"<image-{len(scans)}>"
            else:
                known = kind == "text" and isinstance(item.get("text"), str)
                require(known, f"a message has {kind!r} without text", 'use {"type": "text", "text": ...} or an image')
                require(not MARK_LIKE.search(item["text"]), "a text has a mark", 'write {"type": "image", ...}')
                text += item["text"]
        if message["role"] == "system":
            system = f"{system}\n{text}".strip()
        elif turns and turns[-1][0] == message["role"]:
            turns[-1] = (message["role"], f"{turns[-1][1]}\n{text}")
        else:
            turns.append((message["role"], text))
    roles, texts = [role for role, _ in turns], [text for _, text in turns]
    alternate = len(roles) % 2 and roles == ["user", *["assistant", "user"] * (len(roles) // 2)]
    require(alternate, "the messages are not questions and answers that end with a question", "alternate the roles")
    require(not any(MARK.search(text) for text in texts[1::2]), "an answer has a scan", "move it to a question")
    return texts[-1], scans, system, list(zip(texts[:-1:2], texts[1::2], strict=True))
