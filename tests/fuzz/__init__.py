"""Broken and hostile input, made from a seed, through everything that reads: `make fuzz SECONDS=60`."""
