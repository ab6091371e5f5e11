"""The coordinator: it admits agents, plans and loads models, and runs requests."""
