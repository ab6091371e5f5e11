"""The HTTP routes: OpenAI's, and those of the shoal command."""
