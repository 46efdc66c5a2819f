"""Talking to any server with OpenAI's interface: httpx2, and errors in words. No torch."""
