"""Evidence for the handover: an exhaustive check of its tables, and a simulation of its drivers."""
