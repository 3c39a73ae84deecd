"""Base models: loading, model families, choice of the trained tensors."""

import logging

# bitsandbytes, which PEFT imports, misses a kernel of a model hub that nothing here calls
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
