"""`python -m distill`."""

from .core.cli import main

if __name__ == "__main__":
    main()
