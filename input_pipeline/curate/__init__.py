"""Builds MedMD and RadMD (paper, section 3): `python -m input_pipeline.curate TOOL`, docs/building.md.

Each tool reads files as their owners publish them and writes the layouts that `input_pipeline.datasets` reads.
"""
