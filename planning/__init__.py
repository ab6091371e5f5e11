"""Plans which device runs which layers at how many bits. It has no sockets and no server."""
