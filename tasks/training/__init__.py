"""How one phase learns: from stored activations, or through the whole network."""
