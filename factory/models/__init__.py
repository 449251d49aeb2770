"""The networks: torch and the libraries of its ecosystem only, in the papers' order. No Ray, no tables."""
