"""Tools that build MedMD and RadMD (paper, section 3): `python -m input_pipeline.curate TOOL`, docs/curate.md.

Each tool reads files in their published form and writes tables that `input_pipeline.datasets` reads. Code that reads
those tables for training is not here.
"""
