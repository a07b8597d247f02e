"""What travels to the Hub with the weights: these files import torch, transformers, huggingface_hub and each other."""
