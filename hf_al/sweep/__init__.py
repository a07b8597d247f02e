"""`hf-al sweep`: the best settings of each arm, by validation."""
