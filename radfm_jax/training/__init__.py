"""Training: experiment configs, the state and its step, the loop, and what a run logs.

The network belongs in `models`, checkpoint files in `checkpoints`. Data workers must not import this package.
"""
