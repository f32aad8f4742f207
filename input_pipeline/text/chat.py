r"""Encode a sample in the chat template of its model, part by part.

    Text("Be brief.", system), Scan(a), Text("Any edema?", instruction), Text("Mild edema.", response)
    "edema" is a term; a template in the style of ChatML; \n is a token

    block         tokens                                         weights
    template      <|im_start|> system \n                         0
    system        Be Ġbrief .                                    0
    template      <|im_end|> \n <|im_start|> user \n             0
    scan          <image> a0 a1 </image>                         0
    instruction   Any Ġed ema ?                                  0
    template      <|im_end|> \n <|im_start|> assistant \n        0
    response      M ild Ġed ema .                                1 1 3 3 1
    eos           <|im_end|>                                     1
    template      \n                                             0

Answers and the end of each answer are trained, in every turn. The prompt of a question has the same tokens up to the
answer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from input_pipeline.samples import Scan, Text
from input_pipeline.text.blocks import Block, scan_mark, separator, text_block
from input_pipeline.text.terms import TermFinder
from input_pipeline.text.tokenizer import Tokenizer

_MESSAGE = {"system": "system", "response": "assistant"}  # roles of messages; those of other texts are `user`


@dataclasses.dataclass
class Message:
    """A message of a conversation. `role` is that of chat templates."""

    role: str
    parts: list[Text | Scan]


def to_messages(parts: Sequence[Text | Scan]) -> list[Message]:
    """Group the parts of a sample into messages.

    A scan between two texts of an answer belongs to the answer. Any other scan belongs to a message of the user.
    """
    messages: list[Message] = []
    for i, part in enumerate(parts):
        role = _role(parts, i)
        if not messages or messages[-1].role != role:
            messages.append(Message(role, []))
        messages[-1].parts.append(part)
    return messages


def _role(parts: Sequence[Text | Scan], i: int) -> str:
    part = parts[i]
    if isinstance(part, Text):
        return _MESSAGE.get(part.role, "user")
    before = next((p.role for p in reversed(parts[:i]) if isinstance(p, Text)), None)
    after = next((p.role for p in parts[i + 1 :] if isinstance(p, Text)), None)
    return "assistant" if before == after == "response" else "user"


def chat_blocks(
    parts: Sequence[Text | Scan], tokenizer: Tokenizer, terms: TermFinder, num_latents: int, prompt: bool
) -> list[Block]:
    """Encode the parts of a sample in the chat template of the tokenizer, as in the module docstring.

    prompt: the sample ends with a question: stop before the content of the answer.
    """
    messages = to_messages(parts)
    if prompt:
        messages.append(Message("assistant", []))
    pieces = tokenizer.chat.pieces([message.role for message in messages])
    blocks = [Block("template", list(pieces[0].ids))]
    for message, (before, after) in zip(messages, itertools.pairwise(pieces), strict=True):
        if prompt and message is messages[-1]:
            return blocks
        blocks += _content(message.parts, before.separator, tokenizer, terms, num_latents)
        ids = list(after.ids)
        if message.role == "assistant":
            blocks.append(Block("eos", ids[: after.end], [1.0] * after.end))
            del ids[: after.end]
        blocks.append(Block("template", ids))
    return blocks


def _content(
    parts: Sequence[Text | Scan], before: str | None, tokenizer: Tokenizer, terms: TermFinder, num_latents: int
) -> list[Block]:
    """Encode the content of a message. `before` is the separator of its first text from the template."""
    blocks = []
    for i, part in enumerate(parts):
        if isinstance(part, Scan):
            blocks.append(Block("scan", scan_mark(tokenizer, num_latents), scan=part))
            before = None
            continue
        text, following = part.text.strip(), parts[i + 1] if i + 1 < len(parts) else None
        space = separator(part.text, following.text) if isinstance(following, Text) else ""
        if "\n" in space:  # line breaks belong to the text before them
            text, space = text + space, ""
        blocks.append(text_block(part.role, text, before, tokenizer, terms))
        before = space
    return blocks


def answer_separator(tokenizer: Tokenizer, template: str) -> str | None:
    """Return the separator for Tokenizer.encode of an answer to a question."""
    return tokenizer.chat.pieces(("user", "assistant"))[1].separator if template == "chat" else " "
