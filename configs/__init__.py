"""One file per experiment (docs/configs.md). A derived config imports its parent and changes some fields."""
