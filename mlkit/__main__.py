"""`python -m mlkit` is the same as `mlkit`."""

from mlkit.cli.main import main

if __name__ == "__main__":
    main()
