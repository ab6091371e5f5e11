"""The coordinator: it admits agents, plans and loads models, and answers over HTTP."""
