"""Benchmarks: figures for a person to read, never a test's verdict."""
