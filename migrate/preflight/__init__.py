"""What can be known of a migration before anything is touched.

``facts`` are what a process needs of its host, by /proc alone; ``local`` finds what no host
could take; ``here`` is the other host's view of the same facts, and ``compare`` says what
is missing there. Nothing in it stops, traces or changes a process.
"""
