"""Text to tokens: tokenizers, chat templates, token layouts, medical terms, and rules for sentences and measurements.

Reading tables and packing rows do not belong here.
"""
