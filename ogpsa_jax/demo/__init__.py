"""The embedded demonstration: its world, its small model, its run."""
