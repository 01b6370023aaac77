"""Kernels: a folder an operation. tests/references/ holds a definition of each, apart from them."""
