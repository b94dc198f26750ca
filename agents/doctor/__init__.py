"""``migrate doctor``: what of this host limits migrations, and how to mend it.

Each check looks at one thing and gives findings; what it can't see it says. No agent has to
run, nothing is changed, and no running process is touched.
"""
