"""One migration: plan, phases, driver, handover, recovery."""
