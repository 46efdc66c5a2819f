"""Model families: a config reader each, and the decoder that they share."""
