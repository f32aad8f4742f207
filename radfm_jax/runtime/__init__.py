"""Mesh and sharding, start and liveness of several processes, signals and hangs, and every use of private APIs."""
