"""Parallel execution for data jobs: worker processes, an ordered map that survives crashes, resumable chunks, and Beam.

What the jobs compute belongs to index/, curate/, phantoms/ and batching/.
"""
