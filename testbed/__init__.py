"""Labs as emulated hosts on one Linux machine: networks, links, shares of a processor, faults."""
