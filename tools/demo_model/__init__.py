"""Makes the two models inside the package: data, tokenizer, training, evaluation, export."""
