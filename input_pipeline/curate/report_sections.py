"""Sections of free-text radiology reports, by their headings."""

from __future__ import annotations

import re

# A heading is a line that starts with capitals and a colon: "FINDINGS:", "FINDINGS AND IMPRESSION:".
_HEADING = re.compile(r"^[ \t]*(?P<name>[A-Z][A-Z ,/&()-]{2,60}?)[ \t]*:", re.MULTILINE)
NAMES = {  # heading -> section
    "FINDINGS": "findings",
    "FINDING": "findings",
    "IMPRESSION": "impression",
    "IMPRESSIONS": "impression",
    "CONCLUSION": "impression",
    "CONCLUSIONS": "impression",
    "FINDINGS AND IMPRESSION": "findings",
    "FINDINGS/IMPRESSION": "findings",
    "INDICATION": "indication",
    "REASON FOR EXAM": "indication",
    "REASON FOR EXAMINATION": "indication",
    "CLINICAL INFORMATION": "indication",
    "CLINICAL HISTORY": "indication",
    "HISTORY": "indication",
    "EXAMINATION": "examination",
    "EXAM": "examination",
    "TECHNIQUE": "technique",
    "COMPARISON": "comparison",
    "COMPARISONS": "comparison",
    "WET READ": "wet read",
    "NOTIFICATION": "notification",
    "NOTIFICATIONS": "notification",
    "NOTIFICATION(S)": "notification",
    "RECOMMENDATION": "recommendation",
    "RECOMMENDATIONS": "recommendation",
    "RECOMMENDATION(S)": "recommendation",
    "ADDENDUM": "addendum",
    "PROVISIONAL FINDINGS IMPRESSION (PFI)": "addendum",
    "DOSE": "technique",
}


def sections(report: str) -> list[tuple[str, str]]:
    """Return (heading in capitals, text on one line) of each section, in order. The text before a heading is dropped.

    "FINAL REPORT\\n INDICATION: Cough.\\n FINDINGS:\\n Clear lungs." -> [("INDICATION", "Cough."), ("FINDINGS", ...)]
    """
    headings = list(_HEADING.finditer(report))
    ends = [heading.start() for heading in headings[1:]] + [len(report)]
    return [
        (" ".join(heading["name"].split()), " ".join(report[heading.end() : end].split()))
        for heading, end in zip(headings, ends, strict=True)
    ]


def named(found: list[tuple[str, str]]) -> dict[str, str]:
    """Return {section of NAMES: text}. The last one of repeated sections counts: addenda come first.

    Other headings within findings or impression belong to its text: "FINDINGS: LUNGS: Clear."
    """
    texts: list[tuple[str, list[str]]] = []
    for heading, text in found:
        if heading in NAMES:
            texts.append((NAMES[heading], [text]))
        elif texts and texts[-1][0] in ("findings", "impression"):
            texts[-1][1].append(f"{heading}: {text}")
    return {section: text for section, parts in texts if (text := " ".join(part for part in parts if part))}
