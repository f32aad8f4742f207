"""Mesh and sharding, start and liveness of several processes, signals and hangs, and every use of private APIs.

Training, checkpoint formats and the model are not here. Nothing here knows what a run computes.
"""
