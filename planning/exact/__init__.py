"""The integer program of a plan, and the solvers that run it."""
