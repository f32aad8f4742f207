"""Phantoms: synthetic practice scans with labels, drawn from a seed and written in the formats of real studies.

    voxels, labels = phantoms.draw(seed=0, split="train", index=12)
    phantoms.write("practice", validation=150)                  # or: python -m input_pipeline.phantoms --out practice
    phantoms.parse_report("Findings: CT. No lesion. Impression: Normal.")

They show no disease. A whole system can be trained on them within minutes, and its answers can be checked. Real data
belongs to datasets/ and curate/. docs/phantoms.md has images, statistics, and the tests against shortcuts.
"""

from input_pipeline.phantoms.drawing import contrast_to_noise, draw, paint
from input_pipeline.phantoms.plan import describe
from input_pipeline.phantoms.tables import parse_report, report
from input_pipeline.phantoms.writing import write

__all__ = ["contrast_to_noise", "describe", "draw", "paint", "parse_report", "report", "write"]
