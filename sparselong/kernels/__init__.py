"""Kernels: one operation a file, each with a plain reference beside it that shares no code."""
