"""`python -m input_pipeline.series`: lists the series of a DICOM study, draws them, and writes them as NIfTI.

Finding and reading series belongs to images/scans/study. Nothing here shows a name, an id, a date or a UID of a header.
"""
