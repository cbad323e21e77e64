"""Reinforcement learning: the implementations its articles explain."""
