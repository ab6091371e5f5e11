"""The HTTP routes of OpenAI clients and of the shoal command."""
