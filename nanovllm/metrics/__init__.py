"""What operators watch: the engine's events and the server's requests as metrics."""
