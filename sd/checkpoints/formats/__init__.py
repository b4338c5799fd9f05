"""From the bytes of a file to named tensors, safely."""
