"""One file an experiment (docs/configs.md); a derived one imports its parent and states the differences."""
