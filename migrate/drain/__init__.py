"""Emptying a host: where each process goes, and the policy by which they are moved."""
