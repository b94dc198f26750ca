"""Live migration of running AMD ROCm processes between hosts."""
