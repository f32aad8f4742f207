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
    "RECOMMENDATION": "recommendation",
    "RECOMMENDATIONS": "recommendation",
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
    """Return {section of NAMES: text}. The last one of repeated sections counts: addenda come first."""
    return {NAMES[heading]: text for heading, text in found if heading in NAMES and text}
