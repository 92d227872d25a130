"""`python -m sbldm_fast` is the command line."""

from .cli import main

main()
