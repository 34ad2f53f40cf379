"""Snakemake as a script, for a Python that has already imported it."""

from snakemake.cli import main

if __name__ == "__main__":
    main()
