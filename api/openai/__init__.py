"""The OpenAI-compatible routes: how requests are read, run and answered."""
