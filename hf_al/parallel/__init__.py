"""Blocks on stages: where they are, how stages communicate, and who works when."""
