"""Text to tokens: tokenizer, token layouts, medical terms, and sentence and measurement rules for reports.

Reading tables and packing rows do not belong here.
"""
