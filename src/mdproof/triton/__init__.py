"""Triton without a GPU: exact interpretation, a probe, and compilation in a worker process."""
