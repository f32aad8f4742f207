"""Make text from users, files and servers safe to show in terminals, spreadsheets and messages.

Standard library only. Everything that a program prints passes `printable`, through `console.SafeConsole` or directly.
"""

from __future__ import annotations

import base64
import html
import os
import re
import unicodedata
import urllib.parse
from typing import Any

# Control, format (bidirectional marks, zero width), surrogate, line and paragraph separator characters.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(value: Any, keep: str = "") -> str:
    r"""Return a text or path that is safe to print: control characters and undecodable bytes are escaped.

    A terminal executes "\x1b]..." in a file name, and "\u202e" reverses the text that follows.

    Args:
      keep: characters to leave as they are, such as line breaks.
    """
    text = os.fsdecode(value) if isinstance(value, bytes | os.PathLike) else str(value)
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape", "surrogatepass").decode()
        if c not in keep and unicodedata.category(c) in _UNSAFE
        else c
        for c in text
    )


def spreadsheet_cell(value: Any) -> Any:
    """Return a cell of a CSV report. An apostrophe precedes text that a spreadsheet would run as a formula.

    Use this for reports only: a program that reads the file again would read the apostrophe too.
    """
    if not isinstance(value, str) or not value.lstrip(" ").startswith(_FORMULA):
        return value
    try:
        float(value)
        return value
    except ValueError:
        return f"'{value}"


def redacted(text: str, secret: str) -> str:
    """Remove a secret from a text that may repeat it in full, in parts, masked, or encoded.

    A part is removed if it has at least eight characters, or a third of a longer secret. A masked form such as
    "sk-ab****89yz" is recognized by its first or last four characters.
    """
    if not secret:
        return text
    for form in sorted(_encoded(secret), key=len, reverse=True):
        text = re.sub(re.escape(form), "...", text, flags=re.IGNORECASE)
    if len(secret) >= 12:
        text = _without_parts(text, secret, max(8, len(secret) // 3))
        text = re.sub(rf"{re.escape(secret[:4])}[\w-]{{0,60}}[*•.…x]{{2,60}}[\w-]{{0,60}}", "...", text)
        text = re.sub(rf"[*•…]{{2,60}}{re.escape(secret[-4:])}(?!\w)", "...", text)
    return text


def _encoded(secret: str) -> set[str]:
    """Return the forms of a secret: plain, percent-encoded, HTML, hexadecimal, and base64 at any position of a text."""
    data, forms = secret.encode(), {secret, html.escape(secret), secret.encode("unicode_escape").decode()}
    for _ in range(2):
        forms |= {quote(form, safe="") for form in forms for quote in (urllib.parse.quote, urllib.parse.quote_plus)}
    forms |= {"".join(f"%{byte:02x}" for byte in data), "".join(f"\\u{ord(c):04x}" for c in secret), data.hex()}
    if len(data) >= 6:
        for shift in range(3):  # the secret may start at any of the three bytes of a group
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                whole = encode(bytes(shift) + data).decode().rstrip("=")
                # The first and last characters also depend on the bytes next to the secret.
                forms.add(whole[-(-shift * 8 // 6) : len(whole) - ((shift + len(data)) % 3 > 0)])
    return {form for form in forms if form}


def _without_parts(text: str, secret: str, size: int) -> str:
    """Remove every run of at least `size` characters that the secret contains."""
    parts = {secret[i : i + size] for i in range(len(secret) - size + 1)}
    out, kept, i = [], 0, 0
    while i <= len(text) - size:
        if text[i : i + size] not in parts:
            i += 1
            continue
        end = i + size
        while end < len(text) and text[end - size + 1 : end + 1] in parts:
            end += 1
        out += [text[kept:i], "..."]
        kept = i = end
    return "".join([*out, text[kept:]])
