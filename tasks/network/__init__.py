"""EfficientNetB0 as a model: its weights, its files, and the engine that runs it."""
