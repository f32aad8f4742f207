"""Folders that transformers runs with their own code: a RadFM -> config, tensor names, processor; and back.

`code` has the Python files that every folder gets. They need torch and transformers, and nothing here imports them.
"""
