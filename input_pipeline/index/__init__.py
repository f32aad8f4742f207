"""The index: `prepare` reads and checks all data once, and training reads only its result.

    tables -> scans -> rows as tokens -> reports -> index files

What a sample is belongs to datasets/, how a scan is decoded to images/, and building data sets to curate/.
"""
