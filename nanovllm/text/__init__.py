"""Between text and token ids: tokenizer, chat templates, incremental detokenizer, stop strings."""
