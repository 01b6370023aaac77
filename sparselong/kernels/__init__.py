"""Kernels by area; each is tested against plain torch code that shares nothing with it."""
