"""Files of requests in OpenAI's batch format, worked through by an engine here or by a server."""
