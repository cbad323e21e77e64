"""The pytest end of mdproof."""
