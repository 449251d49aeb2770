"""dermafactory: a distributed dataset factory on Ray for synthetic dermatology."""

import logging

__version__ = "0.1.0"

# diffusers imports torchao where it is installed, and warns that it does not know its newest tensors, which no
# checkpoint here holds; torch warns that torchao registers its enums in an old way.
for _name in ("diffusers.quantizers.torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
