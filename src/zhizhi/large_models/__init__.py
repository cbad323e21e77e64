"""Large models: the implementations its articles explain."""
