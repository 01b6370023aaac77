"""Captured decoding at batch 1 over a cache of fixed size."""
