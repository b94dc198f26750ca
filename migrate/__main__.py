"""``python -m migrate``: the same as the console script."""

from migrate.cli.main import main

main()
