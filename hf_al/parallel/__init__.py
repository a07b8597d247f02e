"""Blocks on stages: placement and what one stage does."""
