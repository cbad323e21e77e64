"""Deep learning: the implementations its articles explain."""
