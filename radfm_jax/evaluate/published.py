"""Published results (arXiv 2308.02463, Table 4) in per cent. The paper does not state the method of its intervals.

Tables show them next to our results, marked as published.
"""

from __future__ import annotations

MODELS = ("OpenFlamingo", "MedVInT", "RadFM")
CASES = {"modality": 17_896, "diagnosis": 129_985, "vqa": 154_540, "report": 6_552, "rationale": 1_392}

# task -> metric -> (value, low, high) of each model
TABLE = {
    "modality": {
        "accuracy": ((14.47, 12.67, 16.61), (86.19, 84.33, 87.62), (86.33, 85.55, 87.13)),
    },
    "diagnosis": {
        "accuracy": ((53.76, 53.35, 54.19), (54.96, 54.04, 55.88), (77.88, 77.47, 78.25)),
        "f1": ((23.08, 22.44, 23.84), (45.94, 44.83, 47.04), (77.20, 76.78, 77.62)),
    },
    "vqa": {
        "bleu": ((13.23, 13.11, 13.35), (14.07, 13.79, 14.28), (31.43, 31.20, 31.65)),
        "rouge": ((21.16, 20.93, 21.38), (18.85, 18.57, 19.08), (36.84, 36.58, 37.14)),
        "umls_precision": ((14.55, 14.34, 14.76), (13.09, 12.78, 13.39), (34.13, 33.81, 34.47)),
        "umls_recall": ((14.56, 14.33, 14.79), (10.52, 10.26, 10.78), (30.11, 29.68, 30.25)),
    },
    "report": {
        "bleu": ((7.37, 6.54, 8.21), (1.99, 1.63, 2.47), (14.68, 14.12, 15.20)),
        "rouge": ((9.49, 8.59, 10.35), (4.31, 3.95, 4.79), (20.71, 20.33, 21.19)),
        "umls_precision": ((8.86, 7.91, 9.81), (6.90, 5.81, 7.98), (23.42, 22.79, 24.10)),
        "umls_recall": ((5.88, 5.07, 6.69), (1.85, 1.43, 2.26), (13.21, 12.76, 13.76)),
    },
    "rationale": {
        "bleu": ((3.06, 2.21, 4.05), (1.30, 0.48, 2.28), (11.56, 10.25, 13.02)),
        "rouge": ((5.10, 4.09, 6.20), (2.10, 1.29, 2.95), (20.56, 19.26, 21.97)),
        "umls_precision": ((8.03, 6.17, 9.88), (9.63, 7.68, 11.57), (31.19, 28.42, 33.60)),
        "umls_recall": ((2.07, 1.14, 3.22), (1.45, 0.59, 2.31), (13.03, 11.66, 14.36)),
    },
}  # fmt: skip


def values(model: str, task: str) -> dict[str, tuple[float, float, float]]:
    """Return metric -> (value, low, high) as fractions of 1; empty if the paper has none."""
    k = MODELS.index(model)
    return {metric: tuple(x / 100 for x in rows[k]) for metric, rows in TABLE.get(task, {}).items()}
