"""`python -m ps_accordion.launcher` is the `ps-accordion` command."""

from .cli import main

main()
