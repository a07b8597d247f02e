"""Blocks on stages: where they are, how they are reached, and what one stage does."""
