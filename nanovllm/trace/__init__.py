"""Events of the engine and the sinks that receive them."""
