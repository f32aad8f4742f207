"""Packed rows from samples: the mixture, the plan, loading, collating, and the Grain iterators over them.

Reading files, images and text is left to `datasets`, `images` and `text`; nothing here runs on an accelerator.
"""
