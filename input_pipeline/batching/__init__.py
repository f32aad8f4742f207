"""Packed rows from samples: the mixture, the plan, loading, collating, and the Grain iterators over them.

The packages `datasets`, `images` and `text` read the files. Nothing here runs on an accelerator.
"""
