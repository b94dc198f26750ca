"""The lab: virtual GPU hosts with the real amdkfd driver, over GPUs made of software.

``python -m scenarios.lab`` builds and runs them; ``docs/lab.md`` explains what is real.
"""
