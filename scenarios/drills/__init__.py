"""Drills: real agents hurt at named moments, and who owns the process afterwards."""
