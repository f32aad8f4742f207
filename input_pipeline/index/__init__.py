"""The index: `prepare` reads and checks all data once, and training reads only its result.

    tables -> scans -> rows as tokens -> reports -> index files

Samples are defined in datasets/, scans are decoded in images/, and data sets are built in curate/.
"""
