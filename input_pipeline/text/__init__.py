"""Text to tokens: tokenizers, chat templates, token layouts, medical terms, and sentence and measurement rules for reports.

Reading tables and packing rows do not belong here.
"""
