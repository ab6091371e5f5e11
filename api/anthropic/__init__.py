"""Anthropic's Messages API: its requests as chats, and its form of answers."""
