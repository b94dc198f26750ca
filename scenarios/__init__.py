"""Drills, workloads, simulation, benchmarks and the lab."""
