"""Python tooling: the implementations its articles explain."""
