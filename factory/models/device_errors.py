"""What an error tells of the device that it was met on."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is of memory that was not to be had, on a GPU or in torch's or Python's own allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def breaks_the_device(error: BaseException) -> bool:
    """Whether an error leaves the process with a GPU that answers every further call with it."""
    return isinstance(error, torch.AcceleratorError)
