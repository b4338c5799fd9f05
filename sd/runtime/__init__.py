"""How the networks are run: device and precision, fast kernels, recording, offloading, tiling."""
