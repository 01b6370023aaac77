"""Stage 02: the base checkpoint, layer by layer, into the packed one."""
