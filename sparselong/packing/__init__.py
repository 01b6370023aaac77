"""Bit-exact pack and unpack of every stored weight format, in plain torch."""
