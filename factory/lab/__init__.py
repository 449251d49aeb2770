"""The papers' experiments on a run's tables: resumable, with intervals, and whatever the numbers say. No Ray here."""
