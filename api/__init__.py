"""The coordinator over HTTP: routes of OpenAI's clients, of the shoal command, and the page."""
