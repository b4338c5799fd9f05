"""From text to token ids: the tokenizer, and the syntax of weighted and long prompts."""
