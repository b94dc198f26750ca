"""A simulated KFD node: the ioctl ABI over a UNIX socket, one process a host."""
