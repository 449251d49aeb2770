"""Stages: plain classes, loaded in `__init__`, working in `__call__(batch)`, rows in and rows out. No Ray here."""
