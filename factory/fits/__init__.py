"""Fits: one objective per file, each four methods, and the one loop that serves them all. No Ray here."""
