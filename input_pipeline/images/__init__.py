"""Scan files to model input: readers (scans/), volumes of the model's sizes, and the planes sent to the device.

Text, tables and packing do not belong here. This package imports nothing from the rest of input_pipeline except
`samples`.
"""
