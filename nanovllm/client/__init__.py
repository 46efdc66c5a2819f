"""Talking to any server with OpenAI's interface: HTTP, event streams, errors in words. No torch."""
