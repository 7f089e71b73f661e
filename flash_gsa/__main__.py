"""`python -m flash_gsa …`: the command line, also where the package is only on the path and not installed."""

from flash_gsa.cli import main

if __name__ == "__main__":
    main()
