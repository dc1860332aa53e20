"""How layers and channels are taken out of a model: what calls what, what goes together, and the cut itself."""
