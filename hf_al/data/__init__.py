"""Text in: sources -> tokenization -> batching."""
