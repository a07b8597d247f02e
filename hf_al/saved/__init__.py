"""What can be done with finished models: classify new text, inspect them, compare runs."""
