"""The part of hf_al that travels to the Hub with the weights: torch, transformers, huggingface_hub and siblings only."""
