"""From text to token ids: the tokenizer, and the prompt syntax of the web UI."""
