"""Lets `python -m kenspeckle` stand for `ken`."""

from kenspeckle.cli import main

main()
