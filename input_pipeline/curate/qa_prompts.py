"""Prompts for a language model in the form of the paper's Figure 3, and the checks of its answers.

Pairs about sizes and ages belong to MedMD, as in the figure's example. `radmd` removes them (Table 2).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

from input_pipeline.curate.language import is_english

RULES = (
    "You write questions and answers about radiologic images, for teaching a model that will see the image and nothing "
    "else. You are given text that was written about the image; you cannot see the image itself.\n"
    "Rules:\n"
    "- Write two or three questions, each followed by its answer, in this form and nothing besides:\n"
    "User: <question>\nAssistant: <answer>\n"
    "- Ask only what somebody who looks at the image can answer: what kind of image it is, what it shows, where, on "
    "which side, how it looks, what diagnosis it suggests. Do not ask about symptoms, history, treatment, laboratory "
    "values or outcome.\n"
    '- Do not speak of the text: write "in the image", never "the report says", "as mentioned" or "in this case".\n'
    "- Do not give dates or names of people, neither in questions nor in answers.\n"
    "- Make the questions different from each other. Let the answers be short, and true to the text; do not add "
    "anything to it.\n"
    "- Give no medical advice. If the text says nothing about an image, answer with the single word NONE."
)

# (text, turns), written for this project.
EXAMPLES = (
    (
        "Findings: Wedge-shaped consolidation in the lateral segment of the right middle lobe, abutting the pleura. No "
        "effusion. Heart size normal. Impression: Right middle lobe pneumonia.",
        "User: Which lobe of the lung is abnormal in the image?\nAssistant: The right middle lobe.\n"
        "User: How does the abnormality look?\nAssistant: It is a wedge-shaped consolidation that touches the pleura.\n"
        "User: Is there fluid in the pleural space?\nAssistant: No, there is no pleural effusion.",
    ),
    (
        "Findings: The left kidney holds a 14 mm calculus in the renal pelvis with dilated calyces. The right "
        "kidney is unremarkable. Impression: Obstructing left renal calculus with hydronephrosis.",
        "User: What is seen in the left renal pelvis?\nAssistant: A calculus.\n"
        "User: How large is the calculus?\nAssistant: 14 mm.\n"
        "User: What does the image suggest as the cause of the dilated calyces?\nAssistant: Obstruction by the "
        "calculus, with hydronephrosis on the left.",
    ),
)


def messages(text: str) -> list[dict[str, str]]:
    """Return the system rules, the examples as turns of a conversation, and the text (paper, Figure 3)."""
    out = [{"role": "system", "content": RULES}]
    for example, turns in EXAMPLES:
        out += [{"role": "user", "content": example}, {"role": "assistant", "content": turns}]
    return [*out, {"role": "user", "content": text}]


class Pair(NamedTuple):
    question: str
    answer: str


# A label begins a line, or follows the turn before it on the same line, as in Figure 3. There a short label must follow
# the end of a sentence: "hepatitis A: ..." is not a turn.
_TURN = re.compile(
    r"^(?:[^\S\n]|[*_#>-])*(?:\d+[.)]\s*)?(?P<line>User|Human|Question|Q|Assistant|Answer|A)[\s*_]*:[\s*_]*"
    r"|(?:(?<=[.?!]\s)\d+[.)]\s*)?(?<=\s)[*_]*(?-i:(?P<speaker>User|Human|Assistant))[*_]*:[\s*_]*"
    r"|(?<=[.?!]\s)(?:\d+[.)]\s*)?[*_]*(?-i:(?P<short>Question|Q|Answer|A))[*_]*:[\s*_]*",
    re.IGNORECASE | re.MULTILINE,
)
_SPEAKERS = frozenset({"user", "human", "assistant"})
_QUESTIONER = frozenset({"user", "human", "question", "q"})
_REFUSAL = re.compile(
    r"^\W*(?:I['’]?m\s+(?:very\s+)?sorry|sorry\b|I\s+(?:can(?:not|['’]t)|am\s+(?:not\s+able|unable))|"
    r"as\s+an?\s+AI\b|unfortunately)",
    re.IGNORECASE,
)


def parse_turns(text: str, truncated: bool = False) -> tuple[list[Pair], str]:
    """Return the pairs of an answer, and the reason if there are none: "refused", "nothing to ask" or "no turns".

    truncated: the answer ended at the length limit, so its last turn is incomplete and is dropped.
    """
    plain = text.strip()
    marks = list(_TURN.finditer(plain))
    if marks and marks[0][marks[0].lastgroup].lower() in _SPEAKERS:
        marks = [mark for mark in marks if mark.lastgroup != "short"]  # "Two panels. A: axial CT." within a turn
    if not marks:
        if plain.strip(" .`*").upper() == "NONE":
            return [], "nothing to ask"
        return [], "refused" if _REFUSAL.search(plain) else "no turns"
    turns = []  # (whether it is a question, text)
    for k, mark in enumerate(marks):
        end = marks[k + 1].start() if k + 1 < len(marks) else len(plain)
        label, turn = mark[mark.lastgroup].lower(), " ".join(plain[mark.end() : end].split())
        turns.append((label in _QUESTIONER, turn.strip("*_`\\ ")))
    if truncated:
        turns.pop()
    pairs = [
        Pair(first, second)
        for (is_question, first), (is_next_question, second) in itertools.pairwise(turns)
        if is_question and not is_next_question
    ]
    return pairs, "" if pairs else "no turns"


_ABOUT_TEXT = re.compile(
    r"\b(?:mention(?:ed|s)?|(?:the|this|that|radiology|case|given|provided)\s+(?:report|text|case|passage|context|"
    r"discussion|paragraph|sentence|caption|description|article|authors?)|according\s+to\s+the\s+(?!image|scan|x-?ray|ct|mri|"
    r"picture|figure|ultrasound|radiograph)|described\s+in|stated|as\s+reported|reported\s+(?:in|by)|impression\s+(?:section|says))\b",
    re.IGNORECASE,
)
_DATE = re.compile(
    r"\b(?:(?:19|20)\d\d|\d{1,2}[./]\d{1,2}[./]\d{2,4}|(?:January|February|March|April|June|July|August|September|"
    r"October|November|December)\s+(?:\d|of\b)|\d+(?:st|nd|rd|th)\s+(?:of\s+)?(?:January|February|March|April|May|June|July|"
    r"August))"
)
_PERSON = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof)\.?\s+[A-Z]")
_NOT_VISIBLE = re.compile(
    r"\b(?:symptom|complain(?:t|ed)?|present(?:ed|ing)\s+with|(?:medical|family|clinical|surgical|"
    r"past)\s+histor(?:y|ies)|history\s+of|treat(?:ed|ment)|therap(?:y|ies)|medications?|drugs?|antibiotics?|surgery\s+(?:was|performed)|"
    r"prognosis|outcome|follow(?:ed)?[- ]up\s+(?:plan|visit|period)|laboratory|lab\s+(?:test|value|result)s?|"
    r"blood\s+(?:test|pressure|count)s?|serum|haemoglobin|hemoglobin|leu[ck]ocyt\w+|fever|temperature|pain(?:ful)?\b|occupation|smok(?:er|ing)|"
    r"why\s+did\s+the\s+patient|gender|what\s+(?:is|was)\s+the\s+sex)",
    re.IGNORECASE,
)
_NO_ANSWER = re.compile(
    r"\b(?:can(?:not|['’]t)\s+be\s+(?:determined|seen|answered|inferred)|not\s+(?:specified|provided|stated|"
    r"mentioned|given|available)|no\s+information|unknown|consult\s+(?:a|your|with)|seek\s+medical|I\s+(?:can(?:not|['’]t)|don['’]t))\b",
    re.IGNORECASE,
)


# Reason to reject a pair -> test of (question, answer, both as one text).
_REJECTIONS: dict[str, Callable[[str, str, str], object]] = {
    "a question or an answer is blank": lambda question, answer, both: not question or not answer,
    "the question does not end with a question mark": lambda question, answer, both: not question.endswith("?"),
    "too long": lambda question, answer, both: len(question) > 400 or len(answer) > 1500,
    "not English": lambda question, answer, both: not is_english(both, min_words=8),
    "image marks": lambda question, answer, both: "<image" in both.lower() or "\x00" in both,
    "it refers to the text": lambda question, answer, both: _ABOUT_TEXT.search(both),
    "it states a date": lambda question, answer, both: _DATE.search(both),
    "it names a person": lambda question, answer, both: _PERSON.search(both),
    "the image cannot answer it": lambda question, answer, both: _NOT_VISIBLE.search(question),
    "it is not answered": lambda question, answer, both: _NO_ANSWER.search(answer) or _REFUSAL.search(answer),
}


def rejection(pair: Pair) -> str:
    """Return why a pair is not used, or ""."""
    both = " ".join(pair)
    return next((reason for reason, holds in _REJECTIONS.items() if holds(*pair, both)), "")


def usable_pairs(text: str, truncated: bool, count: Callable[[str], None]) -> list[Pair]:
    """Return the pairs of an answer that can be used. `count` is called with the label of every outcome."""
    pairs, reason = parse_turns(text, truncated)
    if reason:
        count(f"answers: {reason}")
    kept: dict[str, Pair] = {}
    for pair in pairs:
        reason = rejection(pair)
        folded = " ".join(re.findall(r"\w+", pair.question.lower()))
        if not reason and folded in kept:
            reason = "asked twice"
        if reason:
            count(f"pairs dropped: {reason}")
        else:
            kept[folded] = pair
            count("pairs kept")
    return list(kept.values())
