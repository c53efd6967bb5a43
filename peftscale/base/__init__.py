"""The frozen base: packed, sharded, loaded, and passed through. Nothing in here is ever trained."""

import logging

# On a CPU with AVX512-BF16 bitsandbytes warns at import that it lacks a kernel of the hub, for a product that is never
# used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)
