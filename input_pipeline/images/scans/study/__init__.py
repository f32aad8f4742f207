"""Studies: DICOM files of several series in a folder, a DICOMDIR, a zip or a tar -> one series as a scan.

containers -> members (files) -> instances (headers) -> series (what belongs together) -> a selected one -> voxels.
Reading the pixels of one volume belongs to dicom.py.
"""
