"""Categories for the counts in reports: the modalities of scans."""

from __future__ import annotations

# Names (as in figure 4 of the paper) of DICOM codes and of families with a single modality.
MODALITIES = {
    "CT": "CT", "MR": "MRI", "CR": "X-ray", "DX": "X-ray", "RG": "X-ray", "PX": "X-ray", "IO": "X-ray",
    "MG": "mammography", "US": "ultrasound", "IVUS": "ultrasound", "PT": "PET", "NM": "nuclear medicine",
    "XA": "angiography", "RF": "fluoroscopy", "OT": "other", "SC": "other",
}  # fmt: skip
FAMILY_MODALITIES = {
    "mimic_cxr": "X-ray", "cxr_mix": "X-ray", "vindr_pcxr": "X-ray", "vindr_spinexr": "X-ray",
    "vindr_mammo": "mammography",
}  # fmt: skip
UNKNOWN = "not stated"


def modality_name(code: str, family: str) -> str:
    """Return the modality of a scan, from its file, or else from the data set that lists it."""
    return MODALITIES.get(code, code) if code else FAMILY_MODALITIES.get(family, UNKNOWN)
