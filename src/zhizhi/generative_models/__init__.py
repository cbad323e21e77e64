"""Generative models: the implementations its articles explain."""
