"""`python -m gracec` is the command `gracec`."""

from gracec.cli import main

if __name__ == "__main__":
    main()
