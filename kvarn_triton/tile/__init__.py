"""One tile of a page in registers: what programs of several kernels do with it. No launches."""
