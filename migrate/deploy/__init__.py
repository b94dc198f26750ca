"""Agents put on hosts by SSH: checked, installed, enrolled, started, verified, removed."""
