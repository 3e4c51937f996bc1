"""Text out of a language model: prompts, the KV cache, decoding, sampling and streaming."""
