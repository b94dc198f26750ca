"""The kernel fusion driver (KFD): its ABI, typed calls, and a simulated node."""
