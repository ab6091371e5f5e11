"""Messages between agents, coordinator and peers: codec, framing, limits, connections."""
