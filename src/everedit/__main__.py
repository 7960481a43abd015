"""``python -m everedit``: the command line."""

from everedit.cli.main import main

main()
