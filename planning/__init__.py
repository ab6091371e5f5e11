"""Which devices run which layers at how many bits: numbers in, plans out. No I/O, no server."""
