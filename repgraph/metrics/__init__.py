"""Numbers about a layer or a pair of layers, one published idea per file."""
