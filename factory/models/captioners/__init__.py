"""Captioners behind one protocol: vision-language models by path and by address. Measuring is `models/captioner.py`."""
